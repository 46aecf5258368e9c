"""Token selection: the number of tokens that each image keeps, and their indices (ATS-DETR, section 3.2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ats_detr.kernels import TokenGeometry, packed_linear, select_tokens, zero_padding
from ats_detr.kernels.dispatch import choose_backend
from ats_detr.model.output import TokenScores


class TokenSelector(nn.Module):
    """Scores all tokens and keeps the best of each image, up to the image's budget.

    A fixed budget (Sparse DETR, teachers of ATS-DETR) keeps int(n * max_ratio) + 1 of n valid tokens. An adaptive
    budget (ATS-DETR, section 3.2) classifies the image into one of `num_budgets` ratios, evenly spaced from
    `min_ratio` to `max_ratio`, and keeps max(int(n * ratio) + 1, min_tokens) tokens. The number is at most n.

    Args:
        width: channels of a token.
        min_ratio: smallest keep ratio.
        max_ratio: largest keep ratio; the keep ratio of a fixed budget.
        num_budgets: number of ratios. 1: a fixed budget.
        min_tokens: minimum number of kept tokens (adaptive budgets only).
        masked_mean: average the global half of the features over valid tokens only, and fill padding with the lowest
            score of the image, so the budget does not depend on padding. False: average over all positions and fill
            with the lowest score of the batch, as the published checkpoints require.
    """

    def __init__(
        self,
        width: int,
        min_ratio: float,
        max_ratio: float,
        num_budgets: int = 1,
        min_tokens: int = 0,
        masked_mean: bool = True,
    ) -> None:
        super().__init__()
        self.min_ratio, self.max_ratio = min_ratio, max_ratio
        self.num_budgets, self.min_tokens, self.masked_mean = num_budgets, min_tokens, masked_mean
        half, quarter = width // 2, width // 4
        self.embed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.score = nn.Sequential(
            nn.Linear(width, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), RankingLayer(quarter, 1)
        )
        self.budget: nn.Sequential | None = None
        if num_budgets > 1:
            self.budget = nn.Sequential(nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, num_budgets))

    def forward(
        self,
        features_BSC: Tensor,
        geometry: TokenGeometry,
        keep_ratio: Tensor | float | None = None,
        cost: Tensor | float | None = None,
    ) -> TokenScores:
        """Scores, budgets and the selection. Scores and budget logits have gradients.

        Args:
            features_BSC: tokens to score.
            geometry: of the tokens.
            keep_ratio: ratios in (0, 1] that replace the budgets: float [B], or one for all images. None: the fixed or
                the chosen budget. Budget logits are computed in any case.
            cost: of tokens in the choice among several budgets, see `choose_budgets`.
        """
        padding_mask_BS, num_valid_B = geometry.padding_mask_BS, geometry.num_valid_B
        embedded_BSC = self.embed(features_BSC)
        local_BSC, global_BSC = embedded_BSC.chunk(2, dim=-1)
        if self.masked_mean:
            # At least float32: sums over tens of thousands of tokens overflow float16.
            exact = torch.promote_types(global_BSC.dtype, torch.float32)
            if torch.is_grad_enabled():
                global_BSC = global_BSC * ~padding_mask_BS[..., None]
            else:  # padded rows only; their scores are replaced
                zero_padding(embedded_BSC, padding_mask_BS)
            total_BC = global_BSC.sum(1, dtype=exact)
            global_BC = (total_BC / num_valid_B.clamp(min=1)[:, None]).to(global_BSC.dtype)
        else:
            global_BC = global_BSC.mean(1)
        hidden_BSC = torch.cat([local_BSC, global_BC[:, None].expand_as(local_BSC)], -1)
        scores_BS = self.score(hidden_BSC).squeeze(-1)
        if self.masked_mean:
            lowest = scores_BS.masked_fill(padding_mask_BS, torch.inf).amin(1, keepdim=True)
            scores_BS = torch.where(padding_mask_BS, lowest, scores_BS)
        else:
            scores_BS = torch.where(padding_mask_BS, scores_BS.min(), scores_BS)
        budget_logits = None if self.budget is None else self.budget(global_BC)
        budget_B = None
        largest = self.max_ratio if self.budget is None else min(max(self.max_ratio, 0.01), 0.99)
        if keep_ratio is not None:
            largest = keep_ratio if isinstance(keep_ratio, float) else 1.0
        elif budget_logits is None:
            keep_ratio = self.max_ratio
        else:
            budget_B = self.choose_budgets(budget_logits, cost)
            keep_ratio = self.ratio_of_budget(budget_B)
        num_kept_B = self.num_tokens(num_valid_B, keep_ratio)
        capacity = self._capacity(scores_BS, largest)
        plan = select_tokens(scores_BS.detach(), num_kept_B, padding_mask_BS, capacity=capacity)
        return TokenScores(scores_BS, num_valid_B, num_kept_B, budget_logits, plan, budget_B)

    def _capacity(self, scores_BS: Tensor, largest: float) -> int | None:
        """Number of rows of the plan that suffices up to the ratio `largest`, without device-to-host synchronisation.

        None (exactly the number of kept tokens) in training, since only such plans have gradients, and with the
        reference operators, which would compute unused rows.
        """
        if torch.is_grad_enabled() or not (
            choose_backend(scores_BS) == "triton" or torch.compiler.is_compiling()
        ):
            return None
        batch, num_tokens = scores_BS.shape
        most = math.ceil(num_tokens * largest) + 1
        return batch * min(num_tokens, max(most, self.min_tokens))

    def fix_ratio(self, ratio: float) -> None:
        """Replace the budgets by one keep ratio for all images."""
        self.budget, self.min_tokens = None, 0
        self.min_ratio = self.max_ratio = ratio

    def choose_budgets(self, budget_logits: Tensor, cost: Tensor | float | None = None) -> Tensor:
        """int64 [B] index of the budget of each image, from logits [B, num_budgets]; the smallest of equal ones.

        Maximises logit - cost * ratio. With two budgets this is a threshold on the difference of the logits. A larger
        cost never gives an image a larger budget.

        Args:
            cost: a number, or a scalar tensor on the device, of any sign. None: 0, as trained.
        """
        if cost is not None:
            ratio_R = self.ratio_of_budget(torch.arange(self.num_budgets, device=budget_logits.device))
            budget_logits = budget_logits.float() - cost * ratio_R
        return budget_logits.argmax(-1)

    def ratio_of_budget(self, budget_B: Tensor) -> Tensor:
        """float32 keep ratio of each budget index, within 0.01..0.99 as published."""
        step = (self.max_ratio - self.min_ratio) / (self.num_budgets - 1)
        return (self.min_ratio + step * budget_B).clamp(0.01, 0.99)

    def num_tokens(self, num_valid_B: Tensor, keep_ratio: Tensor | float) -> Tensor:
        """Number of tokens to keep of each image, int64 [B], at a ratio for each image or for all."""
        num_kept_B = (num_valid_B * keep_ratio).long() + 1
        if self.min_tokens > 1:
            num_kept_B = num_kept_B.clamp(min=self.min_tokens)
        return num_kept_B.minimum(num_valid_B)


class RankingLayer(nn.Linear):
    """A linear layer with float32 results, see `ranking_logits`."""

    def forward(self, x: Tensor) -> Tensor:
        return ranking_logits(x, self.weight, self.bias)


def ranking_logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b in float32, also under autocast, because 16-bit scores would have thousands of ties."""
    is_small = x.dtype == weight.dtype and x.element_size() == 2
    if is_small and not torch.is_grad_enabled() and choose_backend(x) == "triton":
        # The kernel multiplies 16-bit factors exactly; PyTorch would round the result.
        return packed_linear(x.flatten(0, -2), weight, bias, dtype=torch.float32).unflatten(0, x.shape[:-1])
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float(), bias.float())
