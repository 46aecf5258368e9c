"""The geometry of the tokens of a padded batch: from image sizes, without reading any map.

Images are padded at the bottom and right. A cell of a level is valid if its nearest pixel is, as in nearest-neighbour
interpolation of the padding mask (DETR).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ats_detr.kernels.dispatch import FLOATS, INTEGERS, check_tensors, invalid, no_transforms, operator
from ats_detr.kernels.levels import LevelShapes, as_level_shapes, beyond_kernels, num_tokens_of, pairs
from ats_detr.kernels.plan import TokenPlan

TEMPERATURE = 10000.0
REFERENCE_EPS = 1e-5
"""Smallest distance of a reference from 0 and 1 when its logit is computed (Deformable DETR)."""
LARGEST_LOGIT = math.log((1 - REFERENCE_EPS) / REFERENCE_EPS)


@dataclass(frozen=True)
class TokenGeometry:
    """Where the S tokens of B images are: levels flattened row-major and concatenated, finest first."""

    level_shapes: tuple[tuple[int, int], ...]
    """(height, width) of each level; S is the sum of their products."""
    counts_BL2: Tensor
    """int32 (columns, rows) of each level that are not padding."""
    valid_ratios_BL2: Tensor
    """float32 share of each level's (columns, rows) that is not padding."""
    num_valid_B: Tensor
    """int64 number of tokens that are not padding."""
    padding_mask_BS: Tensor
    """Bool, True on padding."""
    proposals_BS4: Tensor
    """float32 initial box of each token as logits, cxcywh: centred on the token, with a width and height of 0.05 *
    2^level of the unpadded image. Boxes with a coordinate outside (0.01, 0.99) and those of padded tokens are invalid:
    +inf (sigmoid: the box (1, 1, 1, 1))."""
    allowed_BS: Tensor
    """Bool, False where the proposal is invalid."""

    def rows(
        self,
        plan: TokenPlan | None,
        level_embed_LC: Tensor,
        dtype: torch.dtype = torch.float32,
        *,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Positions and references of the kept tokens; without a plan, of all tokens.

        Args:
            level_embed_LC: embedding of each level, with C a multiple of 4. Gets a gradient.
            dtype: of the positions.

        Returns:
            The position of each row, [K, C]: C/2 sine features of y, then of x, relative to the unpadded image, plus
            the level's embedding; unspecified for padded tokens. And its centre (x, y), normalised to the padded map of
            every level, float32 [K, L, 2].
        """
        check_tensors(level_embed=level_embed_LC)
        num_levels = len(self.level_shapes)
        if not (
            level_embed_LC.ndim == 2
            and level_embed_LC.shape[0] == num_levels
            and level_embed_LC.shape[1] % 4 == 0
            and level_embed_LC.numel()
            and level_embed_LC.dtype in FLOATS
        ):
            raise invalid("level_embed", level_embed_LC, f"[{num_levels}, a multiple of 4], floating point")
        if dtype not in FLOATS:
            raise ValueError(f"dtype {dtype}: must be floating point")
        if plan is not None and plan.slot_BS.shape != self.padding_mask_BS.shape:
            raise invalid(
                "plan.slot_BS", plan.slot_BS, f"{list(self.padding_mask_BS.shape)} like the geometry"
            )
        index = (
            (None, None, None) if plan is None else (plan.token_index_K, plan.image_index_K, plan.num_rows)
        )
        positions_KC, references_KL2, _ = _rows(
            self.counts_BL2, self.valid_ratios_BL2, *index, level_embed_LC, _flat(self.level_shapes), dtype,
            backend=backend, limitation=beyond_kernels(self.level_shapes) or no_transforms(),
        )  # fmt: skip
        return positions_KC, references_KL2


def token_geometry(
    sizes_B2: Tensor, padded_size: tuple[int, int], level_shapes: LevelShapes, *, backend: str | None = None
) -> TokenGeometry:
    """The geometry of all tokens.

    Args:
        sizes_B2: integers, (height, width) of each image without padding, at least 1.
        padded_size: (height, width) of the batch.
        level_shapes: (height, width) of each level, at least one.

    Raises ValueError for shapes, dtypes or sizes that do not fit together.
    """
    check_tensors(sizes=sizes_B2)
    if not (sizes_B2.ndim == 2 and sizes_B2.shape[1] == 2 and sizes_B2.dtype in INTEGERS):
        raise invalid("sizes", sizes_B2, "[B, 2], integers")
    if len(padded_size) != 2 or any(side < 1 for side in padded_size):
        raise ValueError(f"padded_size {tuple(padded_size)}: must be two integers >= 1")
    shapes = as_level_shapes(level_shapes)
    if isinstance(shapes, Tensor) or not shapes:
        raise ValueError(f"level_shapes {level_shapes}: must be (height, width) of at least one level")
    limitation = beyond_kernels(shapes) or no_transforms()
    tensors = _geometry(sizes_B2, *padded_size, _flat(shapes), backend=backend, limitation=limitation)
    return TokenGeometry(tuple(shapes), *tensors)


def encode_boxes(boxes_cxcywh: Tensor, width: int, *, backend: str | None = None) -> Tensor:
    """float32 encoding [..., 2 * width] of boxes [..., 4] in 0..1: `width / 2` sine features for each of cx, cy, w, h.

    (Efficient DETR.) `width` is a multiple of 4. The kernel's sines of numbers beyond +-150 are unspecified.
    """
    check_tensors(boxes=boxes_cxcywh)
    if boxes_cxcywh.shape[-1:] != (4,) or boxes_cxcywh.dtype not in FLOATS:
        raise invalid("boxes", boxes_cxcywh, "[..., 4], floating point")
    if width < 0 or width % 4:
        raise ValueError(f"width {width}: must be a multiple of 4")
    return _encode(boxes_cxcywh, width // 2, backend=backend, limitation=no_transforms())


def refine_boxes(
    offset_BQ4: Tensor, reference_BQ4: Tensor, valid_ratios_BL2: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes of predicted offsets, and the references of the next layer (Deformable DETR, appendix A.4).

    Args:
        offset_BQ4: floating point; its gradient reaches the boxes only.
        reference_BQ4: float32 logits of the current references.

    Returns:
        float32: the boxes, sigmoid(offset + reference), cxcywh [B, Q, 4]; their logits, clamped to +-LARGEST_LOGIT;
        and the boxes normalised to the padded map of each level, [B * Q, L, 4]. The last two have no gradient.
    """
    check_tensors(offset=offset_BQ4, reference=reference_BQ4, valid_ratios=valid_ratios_BL2)
    if not (offset_BQ4.ndim == 3 and offset_BQ4.shape[2] == 4 and offset_BQ4.is_floating_point()):
        raise invalid("offset", offset_BQ4, "[B, Q, 4], floating point")
    if reference_BQ4.shape != offset_BQ4.shape or reference_BQ4.dtype != torch.float32:
        raise invalid("reference", reference_BQ4, f"{list(offset_BQ4.shape)} of torch.float32")
    ratios = valid_ratios_BL2
    if not (ratios.ndim == 3 and ratios.shape[::2] == (offset_BQ4.shape[0], 2) and ratios.dtype in FLOATS):
        raise invalid("valid_ratios", ratios, f"[{offset_BQ4.shape[0]}, L, 2], floating point")
    limitation = no_transforms()
    if torch.is_grad_enabled() and (offset_BQ4.requires_grad or reference_BQ4.requires_grad):
        return _refine.definition(offset_BQ4, reference_BQ4, valid_ratios_BL2)
    return _refine(offset_BQ4, reference_BQ4, valid_ratios_BL2, backend=backend, limitation=limitation)


def sine_features(angle: Tensor, num_features: int) -> Tensor:
    """Sine (even) and cosine (odd) features [..., n, num_features] of angles [..., n] in radians (DETR, appendix A.4).

    Frequencies decrease geometrically from 1 to about 1 / TEMPERATURE.
    """
    exponent = torch.arange(num_features, dtype=torch.float32, device=angle.device).div(
        2, rounding_mode="floor"
    )
    angle = angle[..., None] / TEMPERATURE ** (2 * exponent / num_features)
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)


def _flat(level_shapes: LevelShapes) -> list[int]:
    return [side for shape in level_shapes for side in shape]


# ------------------------------------------------------------------------------------------------ the custom operators
def _cells(sizes: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Level [S], (column, row) [S, 2] and (width, height) of the level [S, 2] of all tokens, int64."""
    levels = []
    for level, (height, width) in enumerate(pairs(sizes)):
        cell = torch.arange(height * width, device=device)
        of_level = [torch.full_like(cell, number) for number in (level, width, height)]
        levels.append(torch.stack([*of_level, cell % width, cell // width], 1))
    level_S1, full_S2, cell_S2 = torch.cat(levels).split([1, 2, 2], 1)
    return level_S1[:, 0], cell_S2, full_S2


def _valid(image_side_B: Tensor, padded: int, cells: int) -> Tensor:
    """int32 [B]: how many of `cells` cells have a nearest pixel inside the image."""
    nearest = torch.arange(cells, device=image_side_B.device, dtype=torch.float32)
    if cells != padded:  # the quotient is rounded to float32
        nearest = (nearest * (nearest.new_full((), padded) / cells)).floor()
    return (nearest < image_side_B[:, None]).sum(1, dtype=torch.int32)


@operator("geometry.token_geometry")
def _geometry(
    sizes: Tensor, height: int, width: int, levels: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors of a TokenGeometry. `levels`: height and width of each level."""
    shapes = pairs(levels)
    counts_BL2 = torch.stack(
        [torch.stack([_valid(sizes[:, 1], width, w), _valid(sizes[:, 0], height, h)], 1) for h, w in shapes],
        1,
    )
    ratios_BL2 = torch.stack(
        [
            torch.stack([counts_B2[:, 0] / w, counts_B2[:, 1] / h], 1)
            for (h, w), counts_B2 in zip(shapes, counts_BL2.unbind(1), strict=True)
        ],
        1,
    )
    level_S, cell_S2, _ = _cells(levels, sizes.device)
    counts_BS2 = counts_BL2[:, level_S]
    padding_BS = (cell_S2 >= counts_BS2).any(-1)
    # Divided in float32, as published: border cells lie on the bounds.
    centre_BS2 = (cell_S2 + 0.5) / counts_BS2
    side_S2 = torch.full_like(cell_S2, 0.05, dtype=torch.float32) * 2.0 ** level_S[:, None]
    boxes_BS4 = torch.cat([centre_BS2, side_S2.expand_as(centre_BS2)], -1)
    allowed_BS = ((boxes_BS4 > 0.01) & (boxes_BS4 < 0.99)).all(-1) & ~padding_BS
    proposals_BS4 = torch.log(boxes_BS4 / (1 - boxes_BS4)).masked_fill(~allowed_BS[..., None], torch.inf)
    num_valid_B = counts_BL2.long().prod(2).sum(1)
    return counts_BL2, ratios_BL2, num_valid_B, padding_BS, proposals_BS4, allowed_BS


@_geometry.register_fake
def _(sizes: Tensor, height: int, width: int, levels: Sequence[int]) -> tuple[Tensor, ...]:
    batch, num_levels, num_tokens = sizes.shape[0], len(levels) // 2, num_tokens_of(pairs(levels))
    shapes = (
        ((batch, num_levels, 2), torch.int32), ((batch, num_levels, 2), torch.float32), ((batch,), torch.int64),
        ((batch, num_tokens), torch.bool), ((batch, num_tokens, 4), torch.float32),
        ((batch, num_tokens), torch.bool),
    )  # fmt: skip
    return tuple(sizes.new_empty(shape, dtype=dtype) for shape, dtype in shapes)


@operator("geometry.token_rows")
def _rows(
    counts: Tensor, ratios: Tensor, token_index: Tensor | None, image_index: Tensor | None, num_rows: Tensor | None,
    level_embed: Tensor, levels: Sequence[int], dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Positions [K, C], references [K, L, 2], and the level of each row, int32 [K]."""
    level_S, cell_S2, full_S2 = _cells(levels, counts.device)
    if token_index is None or image_index is None:
        token_K = torch.arange(len(level_S), device=counts.device).repeat(len(counts))
        image_K = torch.arange(len(counts), device=counts.device).repeat_interleave(len(level_S))
    else:
        image_K, token_K = image_index.long(), token_index.long()
    level_K, cell_K2 = level_S[token_K], cell_S2[token_K]
    counts_K2, ratios_KL2 = counts[image_K, level_K], ratios[image_K]
    # As published: a cell whose column or row is padding has a count of 0 along the other axis.
    other_K2 = (cell_K2 < counts_K2).flip(1)
    last_K2 = torch.where(other_K2, counts_K2, 0).float()
    count_K2 = torch.minimum(cell_K2 + 1, last_K2)
    angle_K2 = (count_K2 - 0.5) / (last_K2 + 1e-6) * (2 * math.pi)
    positions_KC = sine_features(angle_K2.flip(1), level_embed.shape[1] // 2).flatten(1)
    centre_K2 = (cell_K2 + 0.5) / (ratios[image_K, level_K] * full_S2[token_K])
    references_KL2 = centre_K2[:, None] * ratios_KL2
    # Cast before it is indexed: the gradient, a sum over thousands of rows, is then not added in 16 bits.
    embed_LC = level_embed.to(torch.promote_types(level_embed.dtype, torch.float32))
    return (positions_KC + embed_LC[level_K]).to(dtype), references_KL2, level_K.int()


@_rows.register_fake
def _(
    counts: Tensor, ratios: Tensor, token_index: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _, _, level_embed, levels, dtype = others
    length = len(counts) * num_tokens_of(pairs(levels)) if token_index is None else token_index.shape[0]
    return (
        ratios.new_empty(length, level_embed.shape[1], dtype=dtype),
        ratios.new_empty(length, ratios.shape[1], 2),
        counts.new_empty(length),
    )


def _save_rows(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.dtype = inputs[5].dtype
    ctx.num_levels = len(inputs[5])
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate_rows(ctx: Any, grad_positions: Tensor, *_: Any) -> tuple:
    (level_K,) = ctx.saved_tensors
    levels_L1 = torch.arange(ctx.num_levels, device=level_K.device, dtype=level_K.dtype)[:, None]
    belongs_LK = (level_K == levels_L1).to(grad_positions.dtype)
    return (None,) * 5 + ((belongs_LK @ grad_positions).to(ctx.dtype), None, None)


_rows.register_autograd(_differentiate_rows, _save_rows)


@operator("geometry.encode_boxes")
def _encode(boxes: Tensor, num_features: int) -> Tensor:
    return sine_features(boxes.float() * (2 * math.pi), num_features).flatten(-2)


@_encode.register_fake
def _(boxes: Tensor, num_features: int) -> Tensor:
    return boxes.new_empty(*boxes.shape[:-1], 4 * num_features, dtype=torch.float32)


@operator("geometry.refine_boxes")
def _refine(offset: Tensor, reference: Tensor, ratios: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = offset.float() + reference
    boxes = logits.sigmoid()
    on_levels = boxes.detach()[:, :, None] * ratios.repeat(1, 1, 2)[:, None]
    return boxes, logits.detach().clamp(-LARGEST_LOGIT, LARGEST_LOGIT), on_levels.flatten(0, 1)


@_refine.register_fake
def _(offset: Tensor, reference: Tensor, ratios: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_queries, _ = reference.shape
    on_levels = reference.new_empty(batch * num_queries, ratios.shape[1], 4)
    return torch.empty_like(reference), torch.empty_like(reference), on_levels
