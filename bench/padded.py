"""The sparse encoder as published: a baseline of `bench.latency`, written from its description.

Every image of a batch has as many query rows as the image with the largest budget; the surplus rows are computed and
discarded. Each layer projects the values of the whole memory, and rows are gathered and scattered image by image, which
needs a device-to-host synchronisation for the counts. Weights, attention operator and results equal those of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ats_detr.model.attention import project_values
from ats_detr.model.encoder import Encoder, EncoderLayer
from ats_detr.model.output import TokenScores
from ats_detr.model.tokens import Tokens


def encode_padded(encoder: Encoder, tokens: Tokens, selection: TokenScores) -> Tensor:
    """The memory [B, S, C] that `encoder(tokens, selection.plan)` computes from packed rows."""
    num_kept = selection.num_kept_B.tolist()
    scores_BS = selection.scores_BS.masked_fill(tokens.geometry.padding_mask_BS, -torch.inf)
    # Best first: the surplus rows of an image are its next best tokens.
    index_BQ = scores_BS.topk(max(num_kept), dim=1).indices

    def gather(dense: Tensor) -> Tensor:
        return torch.stack([rows[index] for rows, index in zip(dense, index_BQ, strict=True)])

    memory_BSC = tokens.features_BSC
    batch = len(memory_BSC)
    positions_BSC, references_BSL2 = (dense.unflatten(0, (batch, -1)) for dense in tokens.rows(None))
    rows_BQC, positions_BQC, references_BQL2 = map(gather, (memory_BSC, positions_BSC, references_BSL2))
    for layer in encoder.layers:
        assert isinstance(layer, EncoderLayer)
        rows_BQC = _refine(layer, rows_BQC, positions_BQC, references_BQL2, memory_BSC, tokens)
        memory_BSC = torch.stack(
            [
                image_SC.index_copy(0, index[:count], rows[:count])
                for image_SC, index, rows, count in zip(memory_BSC, index_BQ, rows_BQC, num_kept, strict=True)
            ]
        )
    return memory_BSC


def _refine(
    layer: EncoderLayer,
    rows_BQC: Tensor,
    positions_BQC: Tensor,
    references_BQL2: Tensor,
    memory_BSC: Tensor,
    tokens: Tokens,
) -> Tensor:
    """One layer on padded queries, [B, Q, C]."""
    attention = layer.attention
    (value_BSC,) = project_values([attention], memory_BSC, tokens.geometry.padding_mask_BS)
    offsets, logits = attention.project_query(rows_BQC.flatten(0, 1), positions_BQC.flatten(0, 1))
    gathered = attention.attend(
        value_BSC, tokens.geometry.level_shapes, references_BQL2.flatten(0, 1), offsets, logits
    )
    gathered = attention.output_proj(gathered).view_as(rows_BQC)
    return layer.feedforward(layer.attention_norm(rows_BQC + gathered))
