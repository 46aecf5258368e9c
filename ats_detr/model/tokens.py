"""The feature pyramid as one sequence of tokens, with its geometry."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ats_detr.kernels import TokenGeometry, TokenPlan


@dataclass
class Tokens:
    """All S tokens of B images: levels flattened row-major and concatenated, finest first."""

    features_BSC: Tensor
    geometry: TokenGeometry
    level_embed_LC: Tensor
    """Added to the positions of each level."""

    def rows(self, plan: TokenPlan | None) -> tuple[Tensor, Tensor]:
        """Positions [K, C] and references [K, L, 2] of the kept tokens; without a plan, of all. See `TokenGeometry`."""
        return self.geometry.rows(plan, self.level_embed_LC, self.features_BSC.dtype)
