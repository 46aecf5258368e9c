"""The complete model: images -> pyramid -> tokens -> selection -> encoder -> queries -> decoder -> predictions.

One class for the whole family: Deformable DETR, Efficient DETR, Sparse DETR, ATS-DETR and its teachers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ats_detr.batch import ImageBatch
from ats_detr.config import Config, ModelConfig
from ats_detr.kernels import encode_boxes, fused_convolution, group_norm_, refine_boxes, token_geometry
from ats_detr.kernels.dispatch import autocast, choose_backend, runs_inside_graph
from ats_detr.kernels.geometry import REFERENCE_EPS
from ats_detr.model.attention import DeformableAttention
from ats_detr.model.backbone import Backbone, to_channels_first
from ats_detr.model.casting import cast_weights
from ats_detr.model.decoder import Decoder, PredictionHead
from ats_detr.model.encoder import Encoder
from ats_detr.model.output import DetectorOutput, Prediction, TokenScores
from ats_detr.model.selector import TokenSelector, ranking_logits
from ats_detr.model.tokens import Tokens


class Detr(nn.Module):
    """A deformable detection transformer with an optional token selector.

    Args:
        backbone: feature maps at strides 8, 16 and 32.
        encoder: encoder for tokens of `width` channels.
        decoder: decoder for tokens and queries of `width` channels.
        num_classes: number of class logits T.
        width: channels C of tokens and queries.
        num_levels: feature levels L, at least 3.
        num_norm_groups: groups of the norm after each input projection.
        num_queries: queries Q per image. Two-stage models have at most S.
        selector: selects the tokens that the encoder updates. None: all tokens.
        select_by_proposals: score the embedded proposals (Sparse DETR) instead of the raw features (ATS-DETR).
        two_stage: initialise queries from the best proposals instead of learned embeddings.
        queries_from_memory: the content of a two-stage query is its memory row (Efficient DETR).
        class_specific_proposals: rank tokens by their best class instead of by class 0 (Efficient DETR).
        encoder_auxiliary: separate prediction heads after every encoder layer except the last.
        adaption: a linear layer on the memory, used by distillation only.
    """

    def __init__(
        self,
        backbone: Backbone,
        encoder: Encoder,
        decoder: Decoder,
        *,
        num_classes: int,
        width: int = 256,
        num_levels: int = 4,
        num_norm_groups: int = 32,
        num_queries: int = 300,
        selector: TokenSelector | None = None,
        select_by_proposals: bool = False,
        two_stage: bool = False,
        queries_from_memory: bool = False,
        class_specific_proposals: bool = False,
        encoder_auxiliary: bool = False,
        adaption: bool = False,
    ) -> None:
        super().__init__()
        self.one_to_many = 0
        """If > 0: supervision adds a second group of `one_to_many` * `num_queries` queries (at most S - Q) from the
        next best proposals, as in H-DETR (Jia et al., CVPR 2023). The groups have the same weights and do not attend to
        each other. Set by the training; needs `two_stage`."""
        self.num_classes, self.num_queries = num_classes, num_queries
        self.select_by_proposals = select_by_proposals
        self.queries_from_memory = queries_from_memory
        self.class_specific_proposals = class_specific_proposals
        self.backbone = backbone
        self.input_proj = _input_projections(backbone.num_channels, width, num_levels, num_norm_groups)
        self.level_embed = nn.Parameter(torch.empty(num_levels, width))
        self.selector = selector
        self.encoder = encoder
        self.decoder = decoder
        self.proposal_proj: nn.Linear | None = None
        if two_stage:
            self.proposal_proj = nn.Linear(width, width)
            self.proposal_norm = nn.LayerNorm(width)
            self.query_proj = nn.Linear(2 * width, width if queries_from_memory else 2 * width)
            self.query_norm = nn.LayerNorm(self.query_proj.out_features)
        else:
            self.query_embed = nn.Embedding(num_queries, 2 * width)
            self.reference_points = nn.Linear(width, 2)
        self._reset_parameters()

        # One head per prediction layer if layers predict from different references; otherwise one shared head.
        separate = decoder.box_refine or encoder_auxiliary
        num_decoder_heads = len(decoder.layers) if separate else 1
        self.decoder_heads = nn.ModuleList(
            PredictionHead(width, num_classes) for _ in range(num_decoder_heads)
        )
        self.proposal_head = PredictionHead(width, num_classes) if two_stage else None
        num_encoder_heads = len(encoder.layers) - 1 if encoder_auxiliary else 0
        self.encoder_heads = nn.ModuleList(
            PredictionHead(width, num_classes) for _ in range(num_encoder_heads)
        )
        if not two_stage:
            first: Any = self.decoder_heads[0]
            nn.init.constant_(first.box[-1].bias[2:], -2.0)  # small initial boxes
        self.adaption = nn.Linear(width, width) if adaption else None
        if self.adaption is not None:
            nn.init.xavier_uniform_(self.adaption.weight)
            nn.init.zeros_(self.adaption.bias)

    def _reset_parameters(self) -> None:
        projections = (self.proposal_proj, getattr(self, "query_proj", None))
        for module in (self.selector, self.encoder, self.decoder, *projections):
            for parameter in module.parameters() if module is not None else ():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)
        if self.proposal_proj is None:
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)

    def forward(
        self,
        batch: ImageBatch,
        *,
        supervision: bool | None = None,
        keep_ratio: Tensor | float | None = None,
        cost: Tensor | float | None = None,
    ) -> DetectorOutput:
        """Predictions for a batch of normalised images; see `detect`.

        In training under autocast, weights are cast once for the whole pass instead of at each use.
        """
        if self.training and torch.is_grad_enabled() and supervision is not False:
            dtype = autocast(self.level_embed).dtype
            weights: dict[str, Tensor] = {}
            for name, child in self.named_children():
                if child is not self.backbone:  # casts its own weights
                    weights |= cast_weights(child, f"{name}.", dtype)
            if weights:
                options = {"supervision": supervision, "keep_ratio": keep_ratio, "cost": cost}
                return functional_call(self, weights, (batch,), options)
        return self.detect(
            batch.images_B3HW, batch.sizes_B2, supervision=supervision, keep_ratio=keep_ratio, cost=cost
        )

    def detect(
        self,
        images_B3HW: Tensor,
        sizes_B2: Tensor,
        *,
        supervision: bool | None = None,
        keep_ratio: Tensor | float | None = None,
        cost: Tensor | float | None = None,
    ) -> DetectorOutput:
        """Predictions for normalised, padded images.

        Args:
            images_B3HW: float images, normalised by the ImageNet mean and standard deviation.
            sizes_B2: integers, (height, width) of each image without padding, on the device.
            supervision: also compute the outputs that only losses use: predictions at all tokens and at all decoder
                layers, auxiliary predictions of the encoder, the adapted memory, and (with a selector) the attention
                map. None: in training mode only.
            keep_ratio: replaces the budgets of the selector, see `TokenSelector.forward`.
            cost: of tokens in the choice of budgets, see `TokenSelector.choose_budgets`.
        """
        supervision = self.training if supervision is None else supervision
        tokens = self.tokenize(images_B3HW, sizes_B2)
        return self.detect_from_tokens(tokens, supervision=supervision, keep_ratio=keep_ratio, cost=cost)

    def detect_from_tokens(
        self,
        tokens: Tokens,
        *,
        supervision: bool,
        keep_ratio: Tensor | float | None = None,
        cost: Tensor | float | None = None,
    ) -> DetectorOutput:
        """Predictions from the tokens of a batch, which several budgets may share; see `detect`."""
        selection = self.select(tokens, keep_ratio, cost)
        memory_BSC, layer_rows = self.encoder(tokens, selection.plan if selection else None)
        output = self.decode(tokens, selection, memory_BSC, supervision=supervision)
        if supervision:
            output.encoder_auxiliary = self._predict_from_rows(layer_rows, tokens, selection)
        return output

    def encode(self, images_B3HW: Tensor, sizes_B2: Tensor) -> Tensor:
        """The encoder memory [B, S, C], without the decoder."""
        tokens = self.tokenize(images_B3HW, sizes_B2)
        selection = self.select(tokens)
        return self.encoder(tokens, selection.plan if selection else None)[0]

    def tokenize(self, images_B3HW: Tensor, sizes_B2: Tensor) -> Tokens:
        """The tokens of a batch: backbone maps projected to `width` channels, plus the further coarser levels."""
        maps = self.backbone(images_B3HW)
        maps = [to_channels_first(m, c) for m, c in zip(maps, self.backbone.num_channels, strict=True)]
        is_recorded = torch.is_grad_enabled() or runs_inside_graph()
        project = (
            self._project if is_recorded or choose_backend(maps) == "reference" else self._project_to_rows
        )
        features_BSC, shapes = project(maps)
        padded_size = (images_B3HW.shape[2], images_B3HW.shape[3])
        return Tokens(features_BSC, token_geometry(sizes_B2, padded_size, shapes), self.level_embed)

    def _project(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Features [B, S, C] and shapes of all levels."""
        pyramid = [project(level_map) for project, level_map in zip(self.input_proj, maps, strict=False)]
        coarse = maps[-1]
        for project in self.input_proj[len(maps) :]:
            coarse = project(coarse)
            pyramid.append(coarse)
        features_BSC = torch.cat([level_map.flatten(2).transpose(1, 2) for level_map in pyramid], 1)
        return features_BSC, [(level_map.shape[2], level_map.shape[3]) for level_map in pyramid]

    def _project_to_rows(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """`_project` by kernels that write each level to its tokens."""
        shapes = [(level_map.shape[2], level_map.shape[3]) for level_map in maps]
        for _ in self.input_proj[len(maps) :]:  # of stride 2
            shapes.append(((shapes[-1][0] + 1) // 2, (shapes[-1][1] + 1) // 2))
        lengths = [height * width for height, width in shapes]
        is_autocast = torch.is_autocast_enabled(maps[0].device.type)  # under which norms are float32
        features_BSC = maps[0].new_empty(
            len(maps[0]),
            sum(lengths),
            self.level_embed.shape[1],
            dtype=torch.float32 if is_autocast else maps[0].dtype,
        )
        levels = features_BSC.split(lengths, dim=1)
        sources = [*maps, maps[-1]]
        sources += [
            level_BNC.mT.unflatten(2, shape)
            for level_BNC, shape in zip(levels[len(maps) :], shapes[len(maps) :], strict=True)
        ]
        for source_BCHW, level_BNC, projection in zip(sources, levels, self.input_proj, strict=False):
            layers: Any = projection
            convolution, norm = layers
            level_map = fused_convolution(
                source_BCHW,
                convolution.weight,
                convolution.bias,
                stride=convolution.stride,
                padding=convolution.padding,
            )
            group_norm_(level_BNC, level_map, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return features_BSC, shapes

    def select(
        self,
        tokens: Tokens,
        keep_ratio: Tensor | float | None = None,
        cost: Tensor | float | None = None,
    ) -> TokenScores | None:
        """Scores and selection of the tokens that the encoder updates. None: all tokens."""
        if self.selector is None:
            return None
        scored = tokens.features_BSC
        if self.select_by_proposals:
            positions_BSC = tokens.rows(None)[0].view_as(scored)
            scored = self._embed_proposals(scored + positions_BSC, tokens.geometry.allowed_BS)
        return self.selector(scored, tokens.geometry, keep_ratio, cost)

    def decode(
        self, tokens: Tokens, selection: TokenScores | None, memory_BSC: Tensor, *, supervision: bool
    ) -> DetectorOutput:
        """Predictions from the memory [B, S, C], the output of the encoder."""
        proposals, query_index_BQ = None, None
        if self.proposal_proj is None:
            learned_BQF = self.query_embed.weight.expand(memory_BSC.shape[0], -1, -1)
            query_pos_BQC, content_BQC = learned_BQF.chunk(2, dim=-1)
            # Its strides would fix the batch size of an exported graph.
            content_BQC = content_BQC.contiguous()
            references = self.reference_points(query_pos_BQC).float().sigmoid()
            reference_logits = references.logit(REFERENCE_EPS)
        else:
            proposals, query_index_BQ, references, reference_logits = self._propose(
                memory_BSC, tokens, everywhere=supervision
            )
            query_pos_BQC, content_BQC = self._queries(memory_BSC, query_index_BQ, references)
        num_further = content_BQC.shape[1] - self.num_queries if self.one_to_many else 0
        group_sizes = (self.num_queries, num_further) if num_further > 0 else None
        predictions, attention_map_BS = self.decoder(
            content_BQC,
            query_pos_BQC,
            references,
            reference_logits,
            memory_BSC,
            tokens.geometry,
            self.decoder_heads,
            group_sizes=group_sizes,
            every_layer=supervision,
            with_attention_map=supervision and selection is not None,
        )
        one_to_many: list[Prediction] = []
        if group_sizes is not None:
            groups = [prediction.split(group_sizes) for prediction in predictions]
            predictions, one_to_many = [own for own, _ in groups], [further for _, further in groups]
            assert query_index_BQ is not None  # learned queries have no second group
            query_index_BQ = query_index_BQ[:, : self.num_queries]
        adaption = self.adaption if supervision else None
        return DetectorOutput(
            last=predictions[-1],
            level_shapes=tokens.geometry.level_shapes,
            padding_mask_BS=tokens.geometry.padding_mask_BS,
            memory_BSC=memory_BSC,
            decoder_auxiliary=predictions[:-1],
            one_to_many=one_to_many,
            encoder=proposals,
            selection=selection,
            attention_map_BS=attention_map_BS,
            adapted_memory_BSC=None if adaption is None else adaption(memory_BSC),
            query_index_BQ=query_index_BQ,
        )

    def _embed_proposals(self, memory_BSC: Tensor, allowed_BS: Tensor) -> Tensor:
        """Input [B, S, C] of the proposal head: memory with padded and invalid rows zeroed, projected, normalised."""
        assert self.proposal_proj is not None
        return self.proposal_norm(self.proposal_proj(memory_BSC.masked_fill(~allowed_BS[..., None], 0.0)))

    def _propose(
        self, memory_BSC: Tensor, tokens: Tokens, *, everywhere: bool
    ) -> tuple[Prediction | None, Tensor, Tensor, Tensor]:
        """Predictions at all tokens; indices [B, Q], boxes and their logits [B, Q, 4] (detached) of the best Q tokens.

        Only losses need predictions at all tokens, and the second group of queries (see `one_to_many`), which follows
        the first one. Without `everywhere`, ranking scores of all tokens and boxes of the best tokens are computed, and
        the first result is None.
        """
        head = self.proposal_head
        assert head is not None
        proposals_BS4 = tokens.geometry.proposals_BS4
        embedded_BSC = self._embed_proposals(memory_BSC, tokens.geometry.allowed_BS)
        ranking = slice(None) if self.class_specific_proposals else slice(1)
        if everywhere:
            prediction = head(embedded_BSC, proposals_BS4)
            score_BS = prediction.logits[..., ranking].amax(-1)
            num_queries = min(self.num_queries * (1 + self.one_to_many), score_BS.shape[1])
            index_BQ = score_BS.topk(num_queries, dim=1).indices
            boxes_BQ4 = _take(prediction.boxes, index_BQ).detach()
            return prediction, index_BQ, boxes_BQ4, boxes_BQ4.logit(REFERENCE_EPS)
        logits = ranking_logits(embedded_BSC, head.classify.weight[ranking], head.classify.bias[ranking])
        # Invalid tokens share one score, and small images need some of them as queries. Ties select the lower index, so
        # the choice does not depend on batch, device or runtime, as it does with top-k.
        index_BQ = logits.amax(-1).sort(dim=1, descending=True, stable=True).indices[:, : self.num_queries]
        offsets_BQ4 = head.offsets(_take(embedded_BSC, index_BQ)).detach()
        reference_BQ4 = _take(proposals_BS4, index_BQ)
        boxes_BQ4, logits_BQ4, _ = refine_boxes(offsets_BQ4, reference_BQ4, tokens.geometry.valid_ratios_BL2)
        return None, index_BQ, boxes_BQ4, logits_BQ4

    def _queries(self, memory_BSC: Tensor, index_BQ: Tensor, boxes_BQ4: Tensor) -> tuple[Tensor, Tensor]:
        """Positional part and content, both [B, Q, C], of two-stage queries with these tokens and boxes."""
        encoding = encode_boxes(boxes_BQ4, memory_BSC.shape[-1]).to(memory_BSC.dtype)
        query = self.query_norm(self.query_proj(encoding))
        if self.queries_from_memory:
            return query, _take(memory_BSC, index_BQ)
        position, content = query.chunk(2, dim=-1)
        return position, content

    def _predict_from_rows(
        self, layer_rows: list[Tensor], tokens: Tokens, selection: TokenScores | None
    ) -> list[Prediction]:
        """Auxiliary predictions of all encoder layers except the last, at the kept tokens (packed)."""
        if not self.encoder_heads:
            return []
        proposals_K4 = tokens.geometry.proposals_BS4.flatten(0, 1)
        if selection is not None:
            proposals_K4 = proposals_K4.index_select(0, selection.plan.flat_index_K)
        return [head(rows, proposals_K4) for head, rows in zip(self.encoder_heads, layer_rows, strict=False)]


def _take(tensor_BSF: Tensor, index_BQ: Tensor) -> Tensor:
    """The rows [B, Q, F] at `index_BQ` of each image."""
    return tensor_BSF.gather(1, index_BQ[..., None].expand(-1, -1, tensor_BSF.shape[-1]))


def _input_projections(
    num_channels: list[int], width: int, num_levels: int, num_groups: int
) -> nn.ModuleList:
    """Projections to `width` channels, one per level: convolution and GroupNorm.

    The backbone maps have 1x1 convolutions. Further levels have 3x3 convolutions with stride 2; the first of these
    reads the last backbone map, not its projection.
    """
    if num_levels < len(num_channels):
        raise ValueError(
            f"num_levels is {num_levels}, must be >= {len(num_channels)}, the number of backbone maps"
        )
    convolutions = [nn.Conv2d(channels, width, 1) for channels in num_channels]
    for level in range(len(num_channels), num_levels):
        channels = num_channels[-1] if level == len(num_channels) else width
        convolutions.append(nn.Conv2d(channels, width, 3, stride=2, padding=1))
    for convolution in convolutions:
        nn.init.xavier_uniform_(convolution.weight)
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)
    return nn.ModuleList(
        nn.Sequential(convolution, nn.GroupNorm(num_groups, width)) for convolution in convolutions
    )


def build_model(config: ModelConfig, num_classes: int) -> Detr:
    """The model described by a configuration, with `num_classes` class logits."""
    settings = ("width", "num_heads", "num_levels", "num_points", "feedforward_width", "dropout")
    layer = {key: getattr(config, key) for key in settings}
    selector, token_selector = config.selector, None
    if selector is not None:
        budgets: dict[str, Any] = {"min_ratio": selector.keep_ratio, "max_ratio": selector.keep_ratio}
        if selector.adaptive:
            keys = ("min_ratio", "max_ratio", "num_budgets", "min_tokens")
            budgets = {key: getattr(selector, key) for key in keys}
        token_selector = TokenSelector(config.width, masked_mean=selector.masked_mean, **budgets)
    return Detr(
        Backbone(
            config.backbone.name,
            pretrained=config.backbone.pretrained and config.backbone.weights is None,
            frozen_stages=config.backbone.frozen_stages,
            frozen_norm=config.backbone.frozen_norm,
            options=config.backbone.options,
        ),
        Encoder(config.num_encoder_layers, **layer),
        Decoder(
            config.num_decoder_layers,
            config.box_refine,
            **layer | {"num_points": config.num_decoder_points or config.num_points},
        ),
        num_classes=num_classes,
        width=config.width,
        num_levels=config.num_levels,
        num_norm_groups=config.norm_groups,
        num_queries=config.num_queries,
        selector=token_selector,
        select_by_proposals=selector is not None and selector.scores == "proposals",
        two_stage=config.two_stage,
        queries_from_memory=config.queries_from_memory,
        class_specific_proposals=config.class_specific_proposals,
        encoder_auxiliary=config.encoder_auxiliary,
        adaption=config.adaption,
    )


def build_without_fetching(config: Config, num_classes: int) -> Detr:
    """The model with random weights, also in the backbone, for weights that are loaded afterwards."""
    backbone = dataclasses.replace(config.model.backbone, pretrained=False)
    return build_model(dataclasses.replace(config.model, backbone=backbone), num_classes)
