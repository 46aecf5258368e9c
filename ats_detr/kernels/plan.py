"""TokenPlan: which tokens of a batch are kept, packed image after image. Made once, passed down, never recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenPlan:
    """Where the kept tokens of a batch of B images lie, out of S tokens per image; K rows are packed one after another.

    Within an image the tokens are in ascending index order: neighbouring rows then sample neighbouring pixels, which
    keeps the gathers of deformable attention in the cache. All tensors are int32 and stay on the device.
    """

    token_index_K: Tensor
    """Index of each kept token within its image, 0..S-1."""
    image_index_K: Tensor
    """Image each kept token belongs to, 0..B-1, ascending."""
    offsets_B1: Tensor
    """[B+1] first packed row of each image; the last entry is the number of rows in use."""
    slot_BS: Tensor
    """[B, S] packed row of each token, -1 where the token is not kept."""
    exact: bool = True
    """Whether all K rows are in use. False: K is a capacity, only the device knows how many rows are used;
    the others name token 0 of the last image, and the kernels neither read nor write them."""
    row_starts: tuple[int, ...] | None = None
    """`offsets_B1` on the host, where making the plan had to wait for the device anyway."""

    @property
    def counts_B(self) -> Tensor:
        """[B] kept tokens of each image."""
        return self.offsets_B1.diff()

    @property
    def num_rows(self) -> Tensor | None:
        """int32 [1] rows in use, on the device; None where all are."""
        return None if self.exact else self.offsets_B1[-1:]

    @property
    def flat_index_K(self) -> Tensor:
        """[K] int64 row of each kept token in a [B*S, ...] view of the dense tokens."""
        num_tokens = self.slot_BS.shape[1]
        return self.image_index_K.long() * num_tokens + self.token_index_K.long()

    def image_slices(self) -> list[slice]:
        """Packed rows of each image."""
        return [slice(a, b) for a, b in pairwise(self.starts_on_host())]

    def starts_on_host(self) -> tuple[int, ...]:
        """`offsets_B1` as numbers; waits for the device unless the plan holds them already."""
        return tuple(self.offsets_B1.tolist()) if self.row_starts is None else self.row_starts

    @staticmethod
    def from_mask(keep_BS: Tensor, capacity: int | None = None) -> TokenPlan:
        """The plan that keeps exactly the True entries of `keep_BS` (bool [B, S]).

        Without a capacity there are as many rows as tokens kept (waits for the device); with one there are
        `capacity` rows, the device is not waited for, and tokens past the capacity are dropped.
        """
        batch, num_tokens = keep_BS.shape
        slot_BS = (keep_BS.flatten().cumsum(0) - 1).view_as(keep_BS)
        exact = capacity is None
        row_starts = None
        if exact:
            row_starts = (0, *accumulate(keep_BS.sum(1).tolist()))
            capacity = row_starts[-1]
        else:
            capacity = min(capacity, batch * num_tokens)
            keep_BS = keep_BS & (slot_BS < capacity)
        rows = torch.where(
            keep_BS, slot_BS, capacity
        ).flatten()  # tokens that are not kept share a row that is cut off
        position = torch.arange(batch * num_tokens, device=keep_BS.device)
        flat_K = rows.new_full((capacity + 1,), (batch - 1) * num_tokens).scatter(0, rows, position)[
            :capacity
        ]
        offsets_B1 = torch.cat([rows.new_zeros(1), keep_BS.sum(1).cumsum(0)])
        image_index_K = flat_K // max(1, num_tokens)
        token_index_K = flat_K - image_index_K * num_tokens
        slot_BS = slot_BS.masked_fill(~keep_BS, -1)
        return TokenPlan(
            token_index_K.int(), image_index_K.int(), offsets_B1.int(), slot_BS.int(), exact, row_starts
        )
