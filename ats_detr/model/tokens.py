"""The feature pyramid as one sequence of tokens, with its geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ats_detr.kernels import TokenGeometry, TokenPlan, token_geometry


@dataclass
class Tokens:
    """All S tokens of B images: levels flattened row-major and concatenated, finest first."""

    features_BSC: Tensor
    geometry: TokenGeometry
    level_embed_LC: Tensor
    """Added to the positions of each level."""

    @staticmethod
    def from_pyramid(
        pyramid: Sequence[Tensor], sizes_B2: Tensor, padded_size: tuple[int, int], level_embed_LC: Tensor
    ) -> Tokens:
        """Tokens of maps [B, C, H_l, W_l].

        Args:
            sizes_B2: integers, (height, width) of each image without padding.
            padded_size: (height, width) of the batch.
        """
        shapes = tuple((level_map.shape[2], level_map.shape[3]) for level_map in pyramid)
        features_BSC = torch.cat([level_map.flatten(2).transpose(1, 2) for level_map in pyramid], 1)
        return Tokens(features_BSC, token_geometry(sizes_B2, padded_size, shapes), level_embed_LC)

    def rows(self, plan: TokenPlan | None) -> tuple[Tensor, Tensor]:
        """Positions [K, C] and references [K, L, 2] of the kept tokens; without a plan, of all. See `TokenGeometry`."""
        return self.geometry.rows(plan, self.level_embed_LC, self.features_BSC.dtype)
