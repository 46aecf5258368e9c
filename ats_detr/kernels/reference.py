"""The operators in plain PyTorch. These are the definitions: they serve the CPU, and every kernel is tested
against them.

Shape legend: B images, S tokens of the whole pyramid, K kept tokens of the batch (packed), N rows of queries (packed,
image after image), Q queries of one image, H heads, D channels of a head, L levels, P points, C = H * D channels.
`level_shapes` is a tuple of (height, width), finest level first; S is the sum of their products.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from ats_detr.kernels.levels import LevelShapes
from ats_detr.kernels.plan import TokenPlan


# -------------------------------------------------------------------------------- multi-scale deformable attention
def sampling_locations(
    reference_points: Tensor, offsets: Tensor, level_shapes: LevelShapes | Tensor
) -> Tensor:
    """Normalised (x, y) at which each query samples each level, [N, H, L, P, 2].

    Args:
        reference_points: [N, L, 2] points, or [N, L, 4] boxes (cx, cy, w, h), normalised to each level's full map.
        offsets: [N, H, L, P, 2] (x, y): in pixels of the level for points; in units of half the box divided by P
            for boxes (Deformable DETR, eq. 2 and its appendix on boxes as references).
    """
    offsets, reference_points = _at_least_float32(offsets), _at_least_float32(reference_points)
    if reference_points.shape[-1] == 2:
        return reference_points[:, None, :, None] + offsets / _width_height(level_shapes, offsets)[:, None]
    centre, size = reference_points[:, None, :, None].split(2, -1)
    return centre + offsets / offsets.shape[-2] * size * 0.5


def _width_height(level_shapes: LevelShapes | Tensor, like: Tensor) -> Tensor:
    """[L, 2] (width, height) of each level, in the dtype and on the device of `like`."""
    if not isinstance(level_shapes, Tensor):
        level_shapes = torch.tensor(level_shapes, dtype=like.dtype).view(-1, 2)
    # no wait for a GPU; not in a CUDA graph
    return level_shapes.flip(-1).to(like.device, like.dtype, non_blocking=True)


def attention_weights(logits: Tensor) -> Tensor:
    """Softmax of [..., L, P] logits over levels and points together, at least float32."""
    return _at_least_float32(logits).flatten(-2).softmax(-1).view_as(logits)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def multi_scale_deformable_attention(
    value_BSHD: Tensor,
    level_shapes: LevelShapes,
    locations_BQHLP2: Tensor,
    weights_BQHLP: Tensor,
    num_points: Sequence[int] = (),
) -> Tensor:
    """The classical operator of Deformable DETR (eq. 3): weighted bilinear samples of every level, [B, Q, H*D].

    A sample at normalised (x, y) reads pixel (x*W - 0.5, y*H - 0.5) bilinearly; pixels outside the map count as 0.
    A sample whose location is NaN or infinite is NaN. num_points: see `sample_packed`.
    """
    batch, num_queries = locations_BQHLP2.shape[:2]
    locations, weights = locations_BQHLP2.flatten(0, 1), weights_BQHLP.flatten(0, 1)
    out = sample_packed(value_BSHD, level_shapes, locations, weights, num_points=num_points)
    return out.unflatten(0, (batch, num_queries))


def deformable_attention(
    value_BSHD: Tensor,
    level_shapes: LevelShapes,
    reference_points: Tensor,
    offsets_NHLP2: Tensor,
    logits_NHLP: Tensor,
    image_index_N: Tensor | None = None,
    num_rows: Tensor | None = None,
) -> Tensor:
    """Deformable attention of packed queries from raw projections, [N, H*D]: softmax and locations included.

    Args:
        value_BSHD: projected values of all tokens, padded tokens already zeroed.
        reference_points: [N, L, 2] or [N, L, 4], see `sampling_locations`.
        image_index_N: int32, ascending: the image each query attends to. None: N = B*Q queries, Q for every image.
        num_rows: int32 [1]: queries in use; later rows of the result mean nothing (here: zeros).
    """
    locations = sampling_locations(reference_points, offsets_NHLP2, level_shapes)
    weights = attention_weights(logits_NHLP)
    return sample_packed(value_BSHD, level_shapes, locations, weights, image_index_N, num_rows)


def sample_packed(
    value_BSHD: Tensor,
    level_shapes: LevelShapes,
    locations_NHLP2: Tensor,
    weights_NHLP: Tensor,
    image_index_N: Tensor | None = None,
    num_rows: Tensor | None = None,
    num_points: Sequence[int] = (),
) -> Tensor:
    """`multi_scale_deformable_attention` of packed queries, [N, H*D] in the value's dtype, computed in at
    least float32.

    Every sample of a query whose image index is not in 0..B-1 has the location NaN.
    num_points: points of each level, where they differ: the tensors are then [N, H, P, 2] and [N, H, P] with the P
    points of all levels, level after level.
    """
    batch, num_queries = value_BSHD.shape[0], locations_NHLP2.shape[0]
    if num_rows is not None:
        used = min(max(int(num_rows), 0), num_queries)
        if image_index_N is None:
            image_index_N = _image_of_each_query(batch, num_queries, value_BSHD.device)
        samples = locations_NHLP2[:used], weights_NHLP[:used], image_index_N[:used]
        out = sample_packed(value_BSHD, level_shapes, *samples, num_points=num_points)
        return F.pad(out, (0, 0, 0, num_queries - used))
    inputs = (value_BSHD, locations_NHLP2, weights_NHLP)
    dtype = reduce(torch.promote_types, [tensor.dtype for tensor in inputs], torch.float32)
    value, locations, weights = (tensor.to(dtype) for tensor in inputs)
    if value.numel() == 0 or weights.numel() == 0:  # sums of nothing, with gradients of 0
        nothing = sum(tensor.flatten()[:0].sum() for tensor in (value, locations, weights))
        return (nothing + value.new_zeros(num_queries, value.shape[2:].numel())).to(value_BSHD.dtype)
    if not num_points:
        num_points = [weights.shape[3]] * len(level_shapes)
        locations, weights = locations.flatten(2, 3), weights.flatten(2)
    counts, order_N = [num_queries // batch] * batch, None
    if image_index_N is None:
        image_N = _image_of_each_query(batch, num_queries, value_BSHD.device)
    else:
        image_N = image_index_N.long().clamp(0, batch - 1)
        outside_N = image_N != image_index_N
        if outside_N.any():
            locations = locations.masked_fill(outside_N[:, None, None, None], torch.nan)
    shape_of_point = [shape for shape, n in zip(level_shapes, num_points, strict=True) for _ in range(n)]
    pixels = locations.detach() * _width_height(shape_of_point, locations)
    weights = weights * torch.where(pixels.isfinite().all(-1), 1.0, torch.nan)
    if value_BSHD.device.type == "cpu" and not torch.is_grad_enabled():
        return _gather(value, level_shapes, num_points, locations, weights, image_N).to(value_BSHD.dtype)
    if image_index_N is not None:
        counts = torch.bincount(image_N, minlength=batch).tolist()
        if (image_N[1:] < image_N[:-1]).any():
            order_N = image_N.argsort(stable=True)
            locations, weights = locations[order_N], weights[order_N]
    out = _sample(value, level_shapes, num_points, locations, weights, counts)
    if order_N is not None:
        out = out[order_N.argsort()]
    return out.to(value_BSHD.dtype)


def _image_of_each_query(batch: int, num_queries: int, device: torch.device) -> Tensor:
    """[N] where each image has as many queries as any other."""
    return torch.arange(batch, device=device).repeat_interleave(num_queries // max(1, batch))


def _gather(
    value_BSHD: Tensor,
    level_shapes: LevelShapes,
    num_points: Sequence[int],
    locations_NHP2: Tensor,
    weights_NHP: Tensor,
    image_N: Tensor,
) -> Tensor:
    """What `_sample` computes, as weighted sums of the value's rows, read where they lie.

    No map is transposed, no sample stored, and ragged images need no loop: 57 ms instead of 114 ms for two
    images of 1,782 queries at R50 shapes (one CPU thread, 2026-11-23).
    Its gradients would take longer than those of `_sample`.
    """
    num_tokens, num_heads, head_dim = value_BSHD.shape[1:]
    num_queries = len(locations_NHP2)
    if value_BSHD.stride()[1:] != (num_heads * head_dim, head_dim, 1):
        value_BSHD = value_BSHD.contiguous()
    height_width_L2 = torch.tensor(level_shapes)
    area_L = height_width_L2.prod(-1)
    level_P = torch.arange(len(num_points)).repeat_interleave(torch.tensor(num_points))
    start_P = (area_L.cumsum(0) - area_L)[level_P]
    height_P, width_P = height_width_L2.to(locations_NHP2.dtype)[level_P].unbind(1)
    x, y = locations_NHP2.unbind(-1)
    x, y = x * width_P - 0.5, y * height_P - 0.5
    left, right, left_share, right_share = _neighbours(x, width_P)
    top, bottom, top_share, bottom_share = _neighbours(y, height_P)
    top_share, bottom_share = top_share * weights_NHP, bottom_share * weights_NHP
    if area_L.max() > 2**24:  # beyond the integers that float32 holds
        left, right, top, bottom = (cell.double() for cell in (left, right, top, bottom))
    top, bottom = top * width_P, bottom * width_P
    shares = [share * side for share in (top_share, bottom_share) for side in (left_share, right_share)]
    cells = [(row + column) for row in (top, bottom) for column in (left, right)]
    first_N1P = image_N[:, None, None] * num_tokens + start_P
    head_H11 = torch.arange(num_heads)[:, None, None]
    row = (torch.stack(cells, -1).long() + first_N1P[..., None]) * num_heads + head_H11
    out = F.embedding_bag(
        row.view(num_queries * num_heads, -1),
        value_BSHD.reshape(-1, head_dim),
        mode="sum",
        per_sample_weights=torch.stack(shares, -1).view(num_queries * num_heads, -1),
    )
    return out.view(num_queries, num_heads * head_dim)


def _neighbours(x: Tensor, size_P: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The cells before and after pixel coordinate `x` and their bilinear shares; outside 0..size-1: an inner cell
    and the share 0."""
    x = x.nan_to_num(-2.0, -2.0, -2.0).clamp(min=-2.0).minimum(size_P + 1)
    before = x.floor()
    after_share = x - before
    last = size_P - 1
    before_share = (1 - after_share) * ((before >= 0) & (before <= last))
    after_share = after_share * ((before >= -1) & (before < last))
    return (
        before.clamp(min=0).minimum(last),
        (before + 1).clamp(min=0).minimum(last),
        before_share,
        after_share,
    )


def _sample(
    value_BSHD: Tensor,
    level_shapes: LevelShapes,
    num_points: Sequence[int],
    locations_NHP2: Tensor,
    weights_NHP: Tensor,
    counts: list[int],
) -> Tensor:
    """[N, H*D]; the first counts[0] rows read image 0, the next counts[1] image 1, and so on. One dtype throughout."""
    if len(set(counts)) > 1:  # ragged: one image at a time, so that each pays for its own queries only
        parts = zip(
            value_BSHD.split(1),
            locations_NHP2.split(counts),
            weights_NHP.split(counts),
            counts,
            strict=True,
        )
        return torch.cat([_sample(v, level_shapes, num_points, x, w, [n]) for v, x, w, n in parts])
    batch, _, num_heads, head_dim = value_BSHD.shape
    num_rows, _, points_of_all = weights_NHP.shape
    num_queries = counts[0] if counts else 0
    # grid_sample is undefined for NaN and huge coordinates: -9 is outside of every map
    near = ((locations_NHP2 - 0.5).abs() < 4).all(-1, keepdim=True)
    grid = torch.where(near, locations_NHP2 * 2 - 1, -9.0)
    grid = grid.reshape(batch, num_queries, num_heads, points_of_all, 2).transpose(1, 2).flatten(0, 1)
    samples = []
    levels = value_BSHD.split([height * width for height, width in level_shapes], dim=1)
    for value, points, shape in zip(levels, grid.split(list(num_points), 2), level_shapes, strict=True):
        image = value.permute(0, 2, 3, 1).reshape(batch * num_heads, head_dim, *shape)
        samples.append(F.grid_sample(image, points, padding_mode="zeros", align_corners=False))
    weights = weights_NHP.reshape(batch, num_queries, num_heads, points_of_all)
    weights = weights.transpose(1, 2).reshape(batch * num_heads, 1, num_queries, points_of_all)
    out = (torch.cat(samples, dim=-1) * weights).sum(-1)
    out = out.view(batch, num_heads * head_dim, num_queries)
    return out.transpose(1, 2).reshape(num_rows, num_heads * head_dim)


# ------------------------------------------------------------------------------------------------- token selection
def select_tokens(
    scores_BS: Tensor, num_keep_B: Tensor, padding_mask_BS: Tensor | None, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The num_keep_B[i] best-scored tokens of each image i, as the tensors of a `TokenPlan` with `capacity` rows.

    Ties go to the lower index, NaN counts as the largest score (as in torch.topk), and a padded token is selected only
    if no valid one is left (padded tokens: lower index first). Asking for more than S tokens keeps all S.
    """
    # CUDA sorts 16-bit NaNs by their sign, and a cast from float32 may produce a negative one.
    scores_BS = scores_BS.masked_fill(scores_BS.isnan(), torch.nan)
    if padding_mask_BS is not None:
        scores_BS = scores_BS.masked_fill(padding_mask_BS, 0.0)  # padded tokens are all alike
    order = scores_BS.sort(dim=1, descending=True, stable=True).indices
    if padding_mask_BS is not None:
        valid_first = padding_mask_BS.gather(1, order).int().sort(dim=1, stable=True).indices
        order = order.gather(1, valid_first)
    kept_by_rank = torch.arange(scores_BS.shape[1], device=scores_BS.device) < num_keep_B[:, None]
    plan = TokenPlan.from_mask(torch.zeros_like(kept_by_rank).scatter(1, order, kept_by_rank), capacity)
    return plan.token_index_K, plan.image_index_K, plan.offsets_B1, plan.slot_BS


# ------------------------------------------------------------------------------------ dense tokens and packed rows
def pack(
    token_index_K: Tensor,
    image_index_K: Tensor,
    slot_BS: Tensor,
    num_rows: Tensor | None,
    dense: Sequence[Tensor],
) -> list[Tensor]:
    """Kept rows [K, ...] of each dense tensor [B, S, ...]; rows past `num_rows` are rows of unspecified tokens."""
    index_K = _flat_index(token_index_K, image_index_K, slot_BS)
    return [tensor.flatten(0, 1).index_select(0, index_K) for tensor in dense]


def scatter(
    memory: Tensor | None,
    rows: Tensor | None,
    token_index_K: Tensor,
    image_index_K: Tensor,
    slot_BS: Tensor,
    num_rows: Tensor | None,
) -> Tensor:
    """A new [B, S, ...]: the packed row (None: zeros) of each kept token, `memory` (None: zeros) at the others."""
    if memory is None or rows is None or num_rows is not None:
        return merge(slot_BS, rows, memory)
    index_K = _flat_index(token_index_K, image_index_K, slot_BS)
    return memory.flatten(0, 1).index_copy(0, index_K, rows).view_as(memory)


def scatter_(
    memory: Tensor,
    rows: Tensor,
    token_index_K: Tensor,
    image_index_K: Tensor,
    slot_BS: Tensor,
    num_rows: Tensor | None,
) -> None:
    """`scatter` in place."""
    if num_rows is None:
        memory[image_index_K.long(), token_index_K.long()] = rows
    else:
        memory.copy_(merge(slot_BS, rows, memory))


def merge(slot_BS: Tensor, rows: Tensor | None, memory: Tensor | None) -> Tensor:
    """`scatter` by the packed row of each token."""
    like, leading = (rows, 1) if memory is None else (memory, 2)
    shape = (*slot_BS.shape, *like.shape[leading:])
    kept = (slot_BS >= 0).view(*slot_BS.shape, *[1] * (len(shape) - 2))
    zero = like.new_zeros(())
    kept_rows = zero
    if rows is not None and rows.shape[0]:
        kept_rows = rows.index_select(0, slot_BS.clamp(min=0).flatten().long()).view(shape)
    return torch.where(kept, kept_rows, zero if memory is None else memory).expand(shape).contiguous()


def _flat_index(token_index_K: Tensor, image_index_K: Tensor, slot_BS: Tensor) -> Tensor:
    """[K] int64 row of each kept token in a [B*S, ...] view of the dense tokens."""
    return image_index_K.long() * slot_BS.shape[1] + token_index_K.long()


# ------------------------------------------------------------------------------------ linear layers of packed rows
def packed_linear(
    x_KC: Tensor,
    weight_FC: Tensor,
    bias_F: Tensor,
    num_rows: Tensor | None,
    add_KC: Tensor | None,
    dtype: torch.dtype,
    relu: bool,
) -> Tensor:
    """(x + add) W^T + b, [K, F], with `relu` at least 0. Factors have the weight's dtype; sums are not rounded to it if
    `dtype` is wider. Rows past `num_rows` (int [1]) are unspecified."""
    used = _rows_in_use(x_KC, num_rows)
    x = x_KC[:used] if add_KC is None else x_KC[:used] + add_KC[:used]
    exact = torch.promote_types(weight_FC.dtype, dtype)
    out = _linear(x.to(weight_FC.dtype), weight_FC.to(exact), bias_F)
    return _to_capacity((out.relu() if relu else out).to(dtype), x_KC)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x.to(weight.dtype), weight, bias.to(weight.dtype))


def packed_linear_norm(
    x_KC: Tensor,
    weight_FC: Tensor,
    bias_F: Tensor,
    residual_KF: Tensor,
    norm_weight_F: Tensor,
    norm_bias_F: Tensor,
    eps: float,
    num_rows: Tensor | None,
) -> Tensor:
    """LayerNorm(residual + x W^T + b), [K, F], normalised in at least float32, in the residual's dtype."""
    used = _rows_in_use(x_KC, num_rows)
    total = _at_least_float32(residual_KF[:used] + _linear(x_KC[:used], weight_FC, bias_F))
    norm_weight_F, norm_bias_F = norm_weight_F.to(total.dtype), norm_bias_F.to(total.dtype)
    out = F.layer_norm(total, norm_weight_F.shape, norm_weight_F, norm_bias_F, eps)
    return _to_capacity(out.to(residual_KF.dtype), x_KC)


def packed_feedforward(
    x_KC: Tensor,
    weight1_FC: Tensor,
    bias1_F: Tensor,
    weight2_CF: Tensor,
    bias2_C: Tensor,
    norm_weight_C: Tensor,
    norm_bias_C: Tensor,
    eps: float,
    num_rows: Tensor | None,
) -> Tensor:
    """LayerNorm(x + relu(x W1^T + b1) W2^T + b2), the feed-forward network of a post-norm transformer layer."""
    x = x_KC[: _rows_in_use(x_KC, num_rows)]
    hidden = _linear(x, weight1_FC, bias1_F).relu_()
    out = packed_linear_norm(hidden, weight2_CF, bias2_C, x, norm_weight_C, norm_bias_C, eps, None)
    return _to_capacity(out, x_KC)


def _rows_in_use(x_KC: Tensor, num_rows: Tensor | None) -> int:
    """On the CPU the rows in use. On other devices all rows, because reading their number would synchronise."""
    if num_rows is None or num_rows.device.type != "cpu":
        return x_KC.shape[0]
    return min(max(0, int(num_rows)), x_KC.shape[0])


def _to_capacity(out: Tensor, x_KC: Tensor) -> Tensor:
    missing = x_KC.shape[0] - out.shape[0]
    return F.pad(out, (0, 0, 0, missing)) if missing else out


# ------------------------------------------------------------------------------- convolutions with their epilogue
def fused_convolution(
    x_BCHW: Tensor,
    weight_FCHW: Tensor,
    scale_F: Tensor | None = None,
    bias_F: Tensor | None = None,
    residual_BFHW: Tensor | None = None,
    relu: bool = False,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """ReLU(conv(x, weight) * scale + bias + residual), [B, F, H', W'] in x's dtype."""
    inner = bias_F.to(x_BCHW.dtype) if bias_F is not None and scale_F is None else None
    out = F.conv2d(x_BCHW, weight_FCHW, inner, tuple(stride), tuple(padding), tuple(dilation), groups)
    affine_relu_(out, scale_F, None if scale_F is None else bias_F, residual_BFHW, relu)
    return out


def affine_relu_(
    x_BCHW: Tensor,
    scale_C: Tensor | None,
    bias_C: Tensor | None,
    residual_BCHW: Tensor | None,
    relu: bool,
) -> None:
    """x = ReLU(x * scale + bias + residual), computed in at least float32."""
    # One 16-bit sum is rounded once in any case.
    total = x_BCHW if scale_C is None and bias_C is None else _at_least_float32(x_BCHW)
    if scale_C is not None:
        total.mul_(scale_C[:, None, None])
    if bias_C is not None:
        total.add_(bias_C[:, None, None])
    if residual_BCHW is not None:
        total.add_(residual_BCHW)
    if relu:
        total.relu_()
    if total is not x_BCHW:
        x_BCHW.copy_(total)


def affine_relu_max_pool(
    x_BCHW: Tensor, scale_C: Tensor | None = None, bias_C: Tensor | None = None
) -> Tensor:
    """The 3x3 maximum of ReLU(x * scale + bias) with stride 2 and padding 1, [B, C, ceil(H / 2), ceil(W / 2)]."""
    x_BCHW = x_BCHW.clone()
    affine_relu_(x_BCHW, scale_C, bias_C, None, True)
    return F.max_pool2d(x_BCHW, 3, 2, 1)


# ---------------------------------------------------------------------------------- decoder cross-attention map (DAM)
def deformable_attention_map(
    reference_points: Tensor,
    offsets_NHLP2: Tensor,
    logits_NHLP: Tensor,
    level_shapes: LevelShapes,
    num_images: int,
) -> Tensor:
    """How much attention each token receives, float32 [B, S]: weights spread bilinearly, summed over queries and heads.

    Sparse DETR's DAM, of N = B*Q queries: around (x*W, y*H) *without* the half-pixel shift of the sampling itself; the
    corners are the floor and the floor + 1, and corners outside the map are dropped. Carries no gradient.
    """
    shape = (num_images, logits_NHLP.shape[0] // max(1, num_images))
    weights = attention_weights(logits_NHLP.detach()).float().unflatten(0, shape)
    locations = sampling_locations(reference_points.detach(), offsets_NHLP2.detach(), level_shapes)
    sizes = [height * width for height, width in level_shapes]
    start_L1 = torch.tensor([0, *accumulate(sizes)][:-1], device=weights.device, dtype=torch.long)[:, None]
    width_L1, height_L1 = _width_height(level_shapes, weights)[..., None].unbind(1)
    x, y = locations.float().unflatten(0, shape).unbind(-1)
    x, y = x * width_L1, y * height_L1
    x0, y0 = x.floor(), y.floor()
    map_BS = weights.new_zeros(weights.shape[0], sum(sizes))
    for column, row in ((x0, y0), (x0 + 1, y0), (x0, y0 + 1), (x0 + 1, y0 + 1)):
        inside = (column >= 0) & (column < width_L1) & (row >= 0) & (row < height_L1)
        share = weights * (1 - (x - column).abs()) * (1 - (y - row).abs())
        cell = torch.where(inside, row, 0).long() * width_L1.long() + torch.where(inside, column, 0).long()
        token = torch.where(inside, start_L1 + cell, 0)
        map_BS.scatter_add_(1, token.flatten(1), torch.where(inside, share, 0).flatten(1))
    return map_BS
