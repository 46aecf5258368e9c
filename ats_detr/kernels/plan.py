"""TokenPlan: which tokens of a batch are kept, packed image after image. Made once by the selector and passed down."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

MAX_TOKENS_OF_BATCH = 2**30
"""Tokens of all images together; their indices are int32."""


@dataclass(frozen=True)
class TokenPlan:
    """The kept tokens of a batch of B images with S tokens each, as K consecutive rows.

    Within an image the tokens are in ascending index order. Neighbouring rows then sample neighbouring pixels, which
    keeps the gathers of deformable attention in the cache. All tensors are int32, contiguous, and on one device.
    """

    token_index_K: Tensor
    """Index of each kept token within its image, 0..S-1."""
    image_index_K: Tensor
    """Image of each kept token, 0..B-1, ascending."""
    offsets_B1: Tensor
    """[B+1] first packed row of each image; the last entry is the number of rows in use."""
    slot_BS: Tensor
    """[B, S] packed row of each token, -1 for tokens that are not kept."""
    exact: bool = True
    """Whether all K rows are in use. False: K is a capacity, and only the device knows how many rows are in use. The
    unused rows are at the end; they hold token 0 of the last image, and the kernels neither read nor write them."""
    row_starts: tuple[int, ...] | None = None
    """`offsets_B1` on the host, if creating the plan needed a device-to-host synchronisation."""

    def __post_init__(self) -> None:
        index_tensors = (self.token_index_K, self.image_index_K, self.offsets_B1, self.slot_BS)
        if (
            any(tensor.dtype != torch.int32 or not tensor.is_contiguous() for tensor in index_tensors)
            or tuple(tensor.ndim for tensor in index_tensors) != (1, 1, 1, 2)
            or self.token_index_K.shape != self.image_index_K.shape
            or self.offsets_B1.shape[0] != self.slot_BS.shape[0] + 1
        ):
            raise ValueError(
                "the tensors of a plan must be contiguous int32 of shapes [K], [K], [B+1] and [B, S], got "
                + ", ".join(f"{list(tensor.shape)} of {tensor.dtype}" for tensor in index_tensors)
            )

    @property
    def num_rows(self) -> Tensor | None:
        """int32 [1] number of rows in use, on the device; None if all are."""
        return None if self.exact else self.offsets_B1[-1:]

    @property
    def flat_index_K(self) -> Tensor:
        """[K] int64 row of each kept token in a [B*S, ...] view of the dense tokens."""
        num_tokens = self.slot_BS.shape[1]
        return self.image_index_K.long() * num_tokens + self.token_index_K.long()

    def starts_on_host(self) -> tuple[int, ...]:
        """`offsets_B1` as integers. Synchronises with the device unless the plan holds them already."""
        return tuple(self.offsets_B1.tolist()) if self.row_starts is None else self.row_starts

    @staticmethod
    def from_mask(keep_BS: Tensor, capacity: int | None = None) -> TokenPlan:
        """The plan that keeps exactly the True entries of `keep_BS` (bool [B, S]).

        Without a capacity there are as many rows as kept tokens, which needs a device-to-host synchronisation. With one
        there are `capacity` rows (at most B * S), no synchronisation, and tokens past the capacity are dropped.
        """
        if keep_BS.ndim != 2 or keep_BS.dtype != torch.bool:
            raise ValueError(f"keep {list(keep_BS.shape)} of {keep_BS.dtype}: must be [B, S] of torch.bool")
        keep_BS = keep_BS.contiguous()
        batch, num_tokens = keep_BS.shape
        if batch * num_tokens > MAX_TOKENS_OF_BATCH:
            raise ValueError(f"{batch} x {num_tokens} tokens exceed the maximum of {MAX_TOKENS_OF_BATCH}")
        slot_BS = (keep_BS.flatten().cumsum(0) - 1).view_as(keep_BS)
        exact = capacity is None
        row_starts = None
        if capacity is None:
            row_starts = (0, *accumulate(keep_BS.sum(1).tolist()))
            capacity = row_starts[-1]
        else:
            capacity = min(capacity, batch * num_tokens)
            keep_BS = keep_BS & (slot_BS < capacity)
        # Tokens that are not kept share one more row, which is cut off.
        rows = torch.where(keep_BS, slot_BS, capacity).flatten()
        position = torch.arange(batch * num_tokens, device=keep_BS.device)
        flat_K = rows.new_full((capacity + 1,), (batch - 1) * num_tokens).scatter(0, rows, position)
        flat_K = flat_K[:capacity]
        offsets_B1 = torch.cat([rows.new_zeros(1), keep_BS.sum(1).cumsum(0)])
        image_index_K = flat_K // max(1, num_tokens)
        token_index_K = flat_K - image_index_K * num_tokens
        slot_BS = slot_BS.masked_fill(~keep_BS, -1)
        return TokenPlan(
            token_index_K.int(), image_index_K.int(), offsets_B1.int(), slot_BS.int(), exact, row_starts
        )
