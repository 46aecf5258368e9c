"""TokenPlan: which tokens of a batch are kept, packed image after image. Made once, passed down, never recomputed."""

from __future__ import annotations

from dataclasses import dataclass

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
    """[B+1] first packed row of each image; the last entry is the number of rows in use (K unless a capacity was
    asked for; rows from there on carry no token)."""
    slot_BS: Tensor
    """[B, S] packed row of each token, -1 where the token is not kept."""

    @property
    def counts_B(self) -> Tensor:
        """[B] kept tokens of each image."""
        return self.offsets_B1.diff()

    @property
    def flat_index_K(self) -> Tensor:
        """[K] int64 row of each kept token in a [B*S, ...] view of the dense tokens."""
        num_tokens = self.slot_BS.shape[1]
        return self.image_index_K.long() * num_tokens + self.token_index_K.long()

    def image_slices(self) -> list[slice]:
        """Packed rows of each image, on the host (waits for the device)."""
        starts = self.offsets_B1.tolist()
        return [slice(a, b) for a, b in zip(starts[:-1], starts[1:], strict=True)]

    @staticmethod
    def from_mask(keep_BS: Tensor) -> TokenPlan:
        """The plan that keeps exactly the True entries of `keep_BS` (bool [B, S]; waits for the device)."""
        image_index_K, token_index_K = keep_BS.nonzero(as_tuple=True)
        counts_B = keep_BS.sum(1)
        offsets_B1 = torch.cat([counts_B.new_zeros(1), counts_B.cumsum(0)])
        slot_BS = keep_BS.flatten().cumsum(0).sub(1).view_as(keep_BS).masked_fill(~keep_BS, -1)
        return TokenPlan(token_index_K.int(), image_index_K.int(), offsets_B1.int(), slot_BS.int())
