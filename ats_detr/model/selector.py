"""The heart of ATS-DETR: how many tokens an image gets, and which."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ats_detr.kernels import select_tokens
from ats_detr.kernels.backend import choose_backend
from ats_detr.model.output import TokenScores


class TokenSelector(nn.Module):
    """Scores every token and keeps the best of each image, within the image's budget.

    A fixed budget (Sparse DETR, ATS-DETR's teachers) keeps int(n * keep_ratio) + 1 of n valid tokens. An
    adaptive one (ATS-DETR, section 3.2) classifies the image into one of `num_budgets` ratios, evenly spaced
    from `min_ratio` to `max_ratio`, and keeps max(int(n * ratio) + 1, min_tokens). Never more than n.

    Args:
        masked_mean: average the global half of the features over valid tokens only, and fill padding with the
            image's own lowest score, so that its budget does not depend on its padding. False: as published,
            over all positions and with the lowest score of the whole batch (so the published checkpoints were
            trained).
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
            nn.Linear(width, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 1)
        )
        self.budget: nn.Sequential | None = None
        if num_budgets > 1:
            self.budget = nn.Sequential(nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, num_budgets))

    def forward(self, features_BSC: Tensor, padding_mask_BS: Tensor) -> TokenScores:
        """Score tokens [B, S, C], decide budgets, and select. Gradients flow to the scores and the budget
        logits.
        """
        valid_BS = ~padding_mask_BS
        num_valid_B = valid_BS.sum(1)
        local_BSC, global_BSC = self.embed(features_BSC).chunk(2, dim=-1)
        if self.masked_mean:
            # In float32 at least: sums of ten thousands of tokens overflow float16.
            exact = torch.promote_types(global_BSC.dtype, torch.float32)
            total_BC = (global_BSC * valid_BS[..., None]).sum(1, dtype=exact)
            global_BC = (total_BC / num_valid_B.clamp(min=1)[:, None]).to(global_BSC.dtype)
        else:
            global_BC = global_BSC.mean(1)
        hidden_BSC = torch.cat([local_BSC, global_BC[:, None].expand_as(local_BSC)], -1)
        *hidden_layers, last = cast(list[nn.Linear], list(self.score))
        for layer in hidden_layers:
            hidden_BSC = layer(hidden_BSC)
        scores_BS = ranking_logits(hidden_BSC, last.weight, last.bias).squeeze(-1)
        if self.masked_mean:
            lowest = scores_BS.masked_fill(padding_mask_BS, torch.inf).amin(1, keepdim=True)
            scores_BS = torch.where(padding_mask_BS, lowest, scores_BS)
        else:
            scores_BS = torch.where(padding_mask_BS, scores_BS.min(), scores_BS)
        budget_logits_BR = None if self.budget is None else self.budget(global_BC)
        num_kept_B = self.num_tokens(num_valid_B, budget_logits_BR)
        plan = select_tokens(
            scores_BS.detach(), num_kept_B, padding_mask_BS, capacity=self._capacity(scores_BS)
        )
        return TokenScores(scores_BS, num_valid_B, num_kept_B, budget_logits_BR, plan)

    def _capacity(self, scores_BS: Tensor) -> int | None:
        """Rows that suffice for any budgets, so that nobody waits for the device to learn how many are kept.

        None, exactly as many as are kept, in training (such plans have gradients) and where the reference
        operators run, on which unused rows would be computed.
        """
        if torch.is_grad_enabled() or not (
            choose_backend(scores_BS) == "triton" or torch.compiler.is_compiling()
        ):
            return None
        batch, num_tokens = scores_BS.shape
        ratio = self.max_ratio if self.budget is None else min(max(self.max_ratio, 0.01), 0.99)
        most = math.ceil(num_tokens * ratio) + 1
        return batch * min(num_tokens, max(most, self.min_tokens))

    def fix_ratio(self, ratio: float) -> None:
        """From now on keep this share of every image."""
        self.budget = None
        self.min_ratio = self.max_ratio = ratio

    def num_tokens(self, num_valid_B: Tensor, budget_logits_BR: Tensor | None) -> Tensor:
        """int64 [B] tokens to keep of each image."""
        if budget_logits_BR is None:
            num_kept_B = (num_valid_B * self.max_ratio).long() + 1
        else:
            step = (self.max_ratio - self.min_ratio) / (self.num_budgets - 1)
            ratio_B = self.min_ratio + step * budget_logits_BR.argmax(-1)
            num_kept_B = (num_valid_B * ratio_B.clamp(0.01, 0.99)).long() + 1
            num_kept_B = num_kept_B.clamp(min=self.min_tokens)
        return num_kept_B.minimum(num_valid_B)


def ranking_logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b in float32, also under autocast: thousands of 16-bit scores would tie."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float(), bias.float())
