"""The feature pyramid as one sequence of tokens, with its geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ats_detr.model.positions import encode_grid


@dataclass
class Tokens:
    """All S tokens of B images: levels flattened row-major and concatenated, finest first."""

    features_BSC: Tensor
    positions_BSC: Tensor
    """Sine encoding plus level embedding."""
    padding_mask_BS: Tensor
    """Bool, True on padding."""
    level_shapes: tuple[tuple[int, int], ...]
    """(height, width) of each level; S is the sum of their products."""
    valid_ratios_BL2: Tensor
    """Share of each level's (columns, rows) that is not padding."""
    _proposals: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    @staticmethod
    def from_pyramid(
        pyramid: Sequence[Tensor], padding_mask_BHW: Tensor, level_embedding_LC: Tensor
    ) -> Tokens:
        """Tokens of maps [B, C, H_l, W_l].

        Args:
            padding_mask_BHW: bool, True on padded pixels; resized to each level by nearest neighbour.
            level_embedding_LC: added to the positions of each level.
        """
        features, positions, masks, ratios = [], [], [], []
        for level, level_map in enumerate(pyramid):
            mask = F.interpolate(padding_mask_BHW[:, None].float(), size=level_map.shape[-2:])[:, 0].bool()
            encoding = encode_grid(mask, level_map.shape[1]).flatten(1, 2) + level_embedding_LC[level]
            features.append(level_map.flatten(2).transpose(1, 2))
            positions.append(encoding.to(level_map.dtype))
            masks.append(mask.flatten(1))
            ratios.append(torch.stack([(~mask[:, 0]).float().mean(1), (~mask[:, :, 0]).float().mean(1)], -1))
        return Tokens(
            torch.cat(features, 1),
            torch.cat(positions, 1),
            torch.cat(masks, 1),
            tuple((level_map.shape[2], level_map.shape[3]) for level_map in pyramid),
            torch.stack(ratios, 1),
        )

    def reference_points(self) -> Tensor:
        """Centre (x, y) of each token, normalised to the padded map of every level, float32 [B, S, L, 2]."""
        centres = []
        for level, (height, width) in enumerate(self.level_shapes):
            x_S, y_S = cell_centres(height, width, self.valid_ratios_BL2.device).unbind(-1)
            column_share_B1, row_share_B1 = self.valid_ratios_BL2[:, level, :, None].unbind(1)
            centres.append(torch.stack([x_S / (column_share_B1 * width), y_S / (row_share_B1 * height)], -1))
        return torch.cat(centres, 1)[:, :, None] * self.valid_ratios_BL2[:, None]

    @property
    def proposals(self) -> tuple[Tensor, Tensor]:
        """Initial box of each token as logits, float32 [B, S, 4] cxcywh, and its validity, bool [B, S].

        The box is centred on the token; its width and height are 0.05 * 2^level of the unpadded image. Boxes with a
        coordinate outside (0.01, 0.99) and padded tokens are invalid, with logits +inf (sigmoid: the box (1, 1, 1, 1)).
        The result is cached.
        """
        if self._proposals is None:  # functools.cached_property takes a lock, which compilers cannot trace
            self._proposals = self._make_proposals()
        return self._proposals

    def _make_proposals(self) -> tuple[Tensor, Tensor]:
        boxes = []
        for level, ((height, width), mask_BS) in enumerate(
            zip(self.level_shapes, self._split(self.padding_mask_BS), strict=True)
        ):
            valid_BHW = ~mask_BS.view(-1, height, width)
            # Integers divided in float32, as published: border cells of large maps lie exactly on the bounds 0.01 and
            # 0.99.
            size_B2 = torch.stack([valid_BHW[:, 0].sum(1), valid_BHW[:, :, 0].sum(1)], -1)
            centre = cell_centres(height, width, mask_BS.device) / size_B2[:, None]
            boxes.append(torch.cat([centre, torch.full_like(centre, 0.05 * 2.0**level)], -1))
        boxes_BS4 = torch.cat(boxes, 1)
        allowed_BS = ((boxes_BS4 > 0.01) & (boxes_BS4 < 0.99)).all(-1) & ~self.padding_mask_BS
        logits = torch.log(boxes_BS4 / (1 - boxes_BS4))
        return logits.masked_fill(~allowed_BS[..., None], torch.inf), allowed_BS

    def _split(self, tensor_BS: Tensor) -> tuple[Tensor, ...]:
        return tensor_BS.split([height * width for height, width in self.level_shapes], dim=1)


def cell_centres(height: int, width: int, device: torch.device) -> Tensor:
    """Centres (x, y) of the cells of a map in cell units, row-major, float32 [height * width, 2]."""
    y = torch.arange(height, dtype=torch.float32, device=device) + 0.5
    x = torch.arange(width, dtype=torch.float32, device=device) + 0.5
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
