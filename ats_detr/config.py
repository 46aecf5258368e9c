"""The settings of a run: a tree of frozen dataclasses, read from YAML files and `key.sub=value` overrides.

A YAML file holds differences only: from the defaults below, or from the file named by its `base:` key. `base` and
`teachers.*.config` are paths relative to the file that contains them, or names of shipped configurations; all other
paths are relative to the working directory.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from ats_detr.errors import UserError
from ats_detr.text import shortened

ConfigT = TypeVar("ConfigT")


class ConfigError(UserError):
    """A setting with an invalid value; the message names key, value and fix."""

    def __init__(self, key: str, value: object, fix: str):
        super().__init__(f"{key} = {shortened(value, _SHOWN)}: {fix}")
        self.key, self.value, self.fix = key, value, fix


_MAX_INTEGER = 2**31 - 1
"""Largest integer that is read from a file, unless its field has another maximum. A checkpoint of unknown origin must
not exhaust memory."""
_MAX_SIDE = 16_384
"""Of images, in pixels."""
_MAX_LENGTH, _MAX_DEPTH = 1000, 8
"""Of lists and nested values."""
_SHOWN = 200
"""Characters of a value in an error message."""
PUBLISHED_NORM_GROUPS = 32
"""Groups of the norms after the input projections in the published code and in transformers, at every width."""


def _check(holds: bool, key: str, value: object, fix: str) -> None:
    if not holds:
        raise ConfigError(key, value, fix)


def _bounded(default: Any, must_be: str = "", *, most: int = _MAX_INTEGER) -> Any:
    """A field with bounds.

    Args:
        must_be: such as "> 0", ">= 1" or "in (0, 1]"; None is always allowed.
        most: largest integer that is read from a file, also in lists.
    """
    return field(default=default, metadata={"must_be": must_be, "most": most})


class _Bounded:
    """A dataclass that checks the bounds of its fields."""

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):  # type: ignore[arg-type]
            must_be, value = entry.metadata.get("must_be"), getattr(self, entry.name)
            if must_be and value is not None:
                _check(_holds(value, must_be), entry.name, value, f"must be {must_be}")


def _holds(value: float, must_be: str) -> bool:
    relation, numbers = must_be.split(maxsplit=1)
    if relation != "in":
        return value > float(numbers) or (relation == ">=" and value == float(numbers))
    low, high = map(float, numbers[1:-1].split(","))
    is_above = value > low or (numbers[0] == "[" and value == low)
    return is_above and (value < high or (numbers[-1] == "]" and value == high))


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The backbone: a network with feature maps at strides 8, 16 and 32."""

    name: str = "resnet50.tv_in1k"
    """Any timm model that supports `features_only` and has strides 8, 16 and 32."""
    pretrained: bool = True
    """Start from ImageNet weights, downloaded by timm. If the download fails: an error, or random weights with a
    warning where `frozen_stages` is 0."""
    weights: str | None = None
    """A local file of backbone weights (for example self-supervised ones); used instead of the ImageNet weights."""
    frozen_stages: int = 1
    """0 trains all stages; 1 freezes the stem and the stage at stride 4 (published); 2, 3, 4 also those at stride 8, 16
    and 32."""
    frozen_norm: bool = True
    """Batch norm with fixed statistics and affine parameters (as published)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the timm model, such as `channels` of a narrow ResNet;
    `ats_detr.model.backbone.OPTIONS` lists those that are allowed."""

    def __post_init__(self) -> None:
        _check(bool(self.name), "name", self.name, "must be the name of a timm model, such as resnet50")
        _check(0 <= self.frozen_stages <= 4, "frozen_stages", self.frozen_stages, "must be in 0..4")


@dataclass(frozen=True, kw_only=True)
class SelectorConfig(_Bounded):
    """Which tokens the encoder updates. Fixed budget: `keep_ratio`. Adaptive: `min_ratio` and `max_ratio`."""

    scores: Literal["features", "proposals"] = "features"
    """Input of the scoring network: the backbone's features (ATS-DETR) or the embedded proposals (Sparse DETR)."""
    keep_ratio: float | None = _bounded(None, "in (0, 1]")
    """Fraction of the valid tokens of each image that is kept, in (0, 1]. None: adaptive budget per image."""
    min_ratio: float | None = _bounded(None, "in (0, 1]")
    """Fraction kept on the easiest images (adaptive only)."""
    max_ratio: float | None = _bounded(None, "in (0, 1]")
    """Fraction kept on the hardest images (adaptive only)."""
    num_budgets: int = _bounded(2, most=1000)
    """Number of budgets, evenly spaced from `min_ratio` to `max_ratio` inclusive (adaptive only; 2 as published)."""
    min_tokens: int = 300
    """Minimum number of kept tokens per image (adaptive only)."""
    train_ratios: tuple[float, float] | None = None
    """Smallest and largest keep ratio in training, where each image then gets a random one between them instead of its
    budget: the trained model serves every ratio between them. None: budgets in training as in evaluation."""
    mean_ratio: float | None = _bounded(None, "in (0, 1]")
    """Mean keep ratio over the training images, to which the budgets are calibrated (with `teachers: self` only)."""
    masked_mean: bool = True
    """Average the scorer's global feature over valid tokens only. False: padding, too, as in published checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_ratios is not None:
            low, high = self.train_ratios
            fix = "must be [smallest, largest] with 0 < smallest < largest <= 1"
            _check(0 < low < high <= 1, "train_ratios", self.train_ratios, fix)
        if self.keep_ratio is not None:
            for key in ("min_ratio", "max_ratio"):
                fix = "must be null where keep_ratio is set; an adaptive budget needs keep_ratio = null"
                _check(getattr(self, key) is None, key, getattr(self, key), fix)
            return
        for key in ("min_ratio", "max_ratio"):
            fix = "set keep_ratio, or both min_ratio and max_ratio"
            _check(getattr(self, key) is not None, key, None, fix)
        assert self.min_ratio is not None and self.max_ratio is not None
        fix = f"must be > min_ratio = {self.min_ratio}"
        _check(self.min_ratio < self.max_ratio, "max_ratio", self.max_ratio, fix)
        _check(self.num_budgets >= 2, "num_budgets", self.num_budgets, "must be >= 2")
        _check(self.min_tokens >= 1, "min_tokens", self.min_tokens, "must be >= 1")

    @property
    def adaptive(self) -> bool:
        """Whether the budget is chosen per image."""
        return self.keep_ratio is None


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Bounded):
    """The detector. The defaults are one-stage Deformable DETR; the options give the other models of the family."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    selector: SelectorConfig | None = None
    """None: dense encoder, all tokens are updated."""
    num_classes: int | None = _bounded(None, most=100_000)
    """Number of classes of the heads. None: from the annotation file (COCO: 91, as published)."""
    width: int = _bounded(256, "> 0", most=8192)
    """Channels of every token and query."""
    num_heads: int = _bounded(8, "> 0", most=256)
    num_levels: int = _bounded(4, ">= 3", most=8)
    """Feature levels, at least 3: strides 8, 16, 32, then each further level halves the resolution."""
    num_points: int = _bounded(4, "> 0", most=64)
    """Sampling points per head and level, in the encoder."""
    num_decoder_points: int | None = _bounded(None, "> 0", most=64)
    """Sampling points per head and level, in the decoder. None: `num_points`."""
    num_encoder_layers: int = _bounded(6, "> 0", most=100)
    num_decoder_layers: int = _bounded(6, "> 0", most=100)
    num_norm_groups: int | None = None
    """Groups of the norm after each input projection. None: width / 8, which is 32 at 256 channels. The published code
    and transformers have 32 at every width; converted checkpoints keep that."""
    feedforward_width: int = _bounded(1024, "> 0", most=65_536)
    dropout: float = _bounded(0.1, "in [0, 1)")
    num_queries: int = _bounded(300, "> 0", most=100_000)
    two_stage: bool = False
    """Initialise queries from the encoder's best proposals instead of learned embeddings."""
    box_refine: bool = False
    """Each decoder layer refines the boxes of the previous layer."""
    queries_from_memory: bool = False
    """Use the encoder's memory at a proposal as the content of its query (Efficient DETR). Needs `two_stage`."""
    class_specific_proposals: bool = False
    """Rank proposals by their best class instead of by class 0 (Efficient DETR). Needs `two_stage`."""
    encoder_auxiliary: bool = False
    """Class and box heads, with losses, on every encoder layer but the last. Used in training only."""
    adaption: bool = False
    """Linear layer on the memory for distillation from the strong teacher. Used in training only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        classes = self.num_classes
        _check(classes is None or classes > 0, "num_classes", classes, "must be > 0, or null to count them")
        fix = f"must be a multiple of num_heads = {self.num_heads} and of 4"
        groups = self.num_norm_groups
        is_divisor = groups is None or (groups > 0 and self.width % groups == 0)
        _check(is_divisor, "num_norm_groups", groups, f"must be a divisor of width = {self.width}")
        _check(self.width % self.num_heads == 0 and self.width % 4 == 0, "width", self.width, fix)
        for key in ("queries_from_memory", "class_specific_proposals"):
            _check(self.two_stage or not getattr(self, key), key, True, "needs model.two_stage = true")
        if self.selector is not None:
            _check(self.two_stage, "selector", "set", "token selection needs model.two_stage = true")
        for key in ("encoder_auxiliary", "adaption"):
            _check(self.selector is not None or not getattr(self, key), key, True, "needs model.selector")

    @property
    def adaptive(self) -> bool:
        """Whether the budget is chosen per image, which needs two teachers in training."""
        return self.selector is not None and self.selector.adaptive

    @property
    def norm_groups(self) -> int:
        """`num_norm_groups`, or its default at this width."""
        return self.num_norm_groups or (self.width // 8 if self.width % 8 == 0 else math.gcd(32, self.width))


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig(_Bounded):
    """Generated images of textured shapes, from one large object to many small overlapping ones."""

    num_train: int = _bounded(2000, "> 0", most=10_000_000)
    num_val: int = _bounded(250, "> 0", most=10_000_000)
    image_size: int = _bounded(128, ">= 32", most=16_384)
    """Square root of the approximate number of pixels per image."""
    max_aspect_ratio: float = _bounded(1.0, "in [1, 4]")
    """Aspect ratios range from 1 / this to this; 1: square images."""
    num_classes: int = _bounded(4, "> 0")
    min_objects: int = 1
    max_objects: int = _bounded(25, "> 0")
    """Images have `min_objects` to this many objects; large numbers are rare."""
    seed: int = _bounded(0, ">= 0", most=2**32 - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        fix = f"must be in 0..{self.max_objects}, max_objects"
        _check(0 <= self.min_objects <= self.max_objects, "min_objects", self.min_objects, fix)


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Bounded):
    """Images, annotations, augmentation and batches."""

    kind: Literal["coco", "synthetic"] = "coco"
    """A dataset in COCO, YOLO or Pascal VOC format, or images generated once into `root`."""
    root: str = "data/coco"
    """Folder of the dataset, whose layout is detected; the paths below are relative to it. Or one annotation file."""
    train_annotations: str | None = None
    """Annotation file to train on. None: the one under `root` whose name or folder says `train`, otherwise the only one
    that is not for validation or test."""
    train_images: str | None = None
    """Folder of its images. None: the folders that exporters use are tried until the files exist."""
    val_annotations: str | None = None
    """Annotation file to evaluate on. None: the one under `root` whose name or folder says `val`, otherwise `test`;
    without any, the training images, with a warning."""
    val_images: str | None = None
    """Folder of its images, found like `train_images`."""
    val_share: float | None = _bounded(None, "in (0, 1)")
    """Share of the training images that are not trained on but evaluated, in (0, 1), for a dataset without a validation
    split. The division is stratified by class and depends on `split_seed`."""
    split_seed: int = _bounded(0, ">= 0", most=2**32 - 1)
    """Seed of that division."""
    test_annotations: str | None = None
    """Annotation file of `eval --split test`. None: the one under `root` whose name or folder says `test`."""
    test_images: str | None = None
    """Folder of its images, found like `train_images`."""
    exif: Literal["auto", "stored", "upright"] = "auto"
    """Which pixels the boxes refer to. `stored`: as stored; `upright`: turned as the EXIF orientation says, as viewers
    show them; `auto`: as the listed sizes prove or the file states (those converted from YOLO are upright), otherwise
    stored. Training and evaluation follow it; prediction, where no sizes are listed, turns images upright unless this
    is `stored`."""
    short_side: int = _bounded(800, "> 0", most=_MAX_SIDE)
    """Shorter side of each image in evaluation, in pixels ..."""
    long_side: int = _bounded(1333, "> 0", most=_MAX_SIDE)
    """... unless the longer side would exceed this; also the maximum in training."""
    train_short_sides: tuple[int, ...] = _bounded(tuple(range(480, 801, 32)), most=_MAX_SIDE)
    """Shorter sides in training, in pixels; one is drawn per image."""
    crop_short_sides: tuple[int, ...] = _bounded((400, 500, 600), most=_MAX_SIDE)
    """Shorter sides before a random crop, applied to half of the training images. Empty: no crops."""
    crop_size: tuple[int, int] = _bounded((384, 600), most=_MAX_SIDE)
    """Minimum and maximum side of that crop in pixels."""
    overfit_images: int = _bounded(0, ">= 0")
    """If > 0: train on this many training images only, repeated to 50 batches per epoch, and evaluate on them. A test
    that dataset and settings can be learned."""
    rotate_90: bool = False
    """Rotate training images by a random multiple of 90 degrees: for images without an up direction, such as aerial
    photographs."""
    color_jitter: float = _bounded(0.0, "in [0, 1)")
    """Scale brightness, contrast and saturation of training images by independent random factors in 1 - color_jitter..
    1 + color_jitter; in [0, 1). 0: off (published)."""
    size_multiple: int = _bounded(64, "> 0", most=4096)
    """Evaluation pads each image to a multiple of this, and batches images of equal padded size only."""
    batch_size: int = _bounded(2, "> 0", most=65_536)
    """Training images per process and batch."""
    eval_batch_size: int = _bounded(4, "> 0", most=65_536)
    num_workers: int = _bounded(4, ">= 0", most=1024)
    """Loader processes per training process. 0: load in the training process."""
    cache_images: bool = False
    """Keep the encoded image files in memory."""
    on_bad_image: Literal["error", "skip"] = "error"
    """At an image that is missing or cannot be read: stop with its name, or omit it with a warning."""
    on_bad_annotation: Literal["error", "skip"] = "error"
    """At a record of an annotation file that cannot be used: stop with its place, or omit it with a warning."""
    max_image_pixels: int | None = _bounded(None, "> 0")
    """Larger images than PIL.Image.MAX_IMAGE_PIXELS = 89,478,485 raise a warning, twice as large ones an error; this
    raises that limit."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_share is not None:
            for key in ("val_annotations", "val_images"):
                given = getattr(self, key)
                fix = f"has no effect with data.{key} = {given!r}"
                _check(given is None, "val_share", self.val_share, fix)
        _check(len(self.train_short_sides) > 0, "train_short_sides", (), "must have at least one length")
        for key in ("train_short_sides", "crop_short_sides"):
            sides = getattr(self, key)
            _check(min(sides, default=1) > 0, key, sides, "all lengths must be > 0")
        low, high = self.crop_size
        fix = "must be [minimum, maximum] with 0 < minimum <= maximum"
        _check(0 < low <= high, "crop_size", self.crop_size, fix)
        if self.crop_short_sides:
            fix = f"the minimum must be <= {min(self.crop_short_sides)}, the smallest of crop_short_sides"
            _check(low <= min(self.crop_short_sides), "crop_size", self.crop_size, fix)


@dataclass(frozen=True, kw_only=True)
class LossConfig(_Bounded):
    """Matching costs, loss weights and focal loss. The defaults are those of the published runs."""

    class_cost: float = _bounded(2.0, ">= 0")
    """Weight of the focal class cost in the matching."""
    bbox_cost: float = _bounded(5.0, ">= 0")
    """Weight of the L1 box cost in the matching."""
    giou_cost: float = _bounded(2.0, ">= 0")
    """Weight of the GIoU cost in the matching."""
    class_weight: float = _bounded(2.0, ">= 0")
    """Weight of `loss_ce`, the focal loss of the classes."""
    bbox_weight: float = _bounded(5.0, ">= 0")
    """Weight of `loss_bbox`, the L1 distance of the boxes."""
    giou_weight: float = _bounded(2.0, ">= 0")
    """Weight of `loss_giou`."""
    selector_weight: float = _bounded(1.0, ">= 0")
    """Weight of `loss_mask_prediction`, the loss of the token scores."""
    budget_weight: float = _bounded(1.0, ">= 0")
    """Weight of `loss_budget`, the cross entropy of the budget logits; with `teachers: self`, half their squared error
    (adaptive only)."""
    memory_weight: float = _bounded(1.0, ">= 0")
    """Weight of `loss_memory`, the distillation from the strong teacher (adaptive only)."""
    focal_alpha: float = _bounded(0.25, "in (0, 1)")
    """Weight of objects in the focal loss and cost, in (0, 1); background has 1 - alpha."""
    focal_gamma: float = _bounded(2.0, ">= 0")
    """Focusing exponent of the focal loss and cost."""
    difficulty_iou: float = _bounded(0.5, "in (0, 1]")
    """IoU from which a detection of the weak teacher matches an object (adaptive only)."""
    class_loss: Literal["focal", "matchability_aware"] = "focal"
    """`focal` (published), or the matchability-aware loss of DEIM (Huang et al., CVPR 2025): the score of a detection
    predicts the IoU of its box."""
    one_to_many: int = _bounded(0, ">= 0", most=100)
    """If > 0: train a second group of `one_to_many` * `num_queries` queries with the same weights, in which each object
    is matched to `one_to_many` queries: hybrid matching (H-DETR, Jia et al., CVPR 2023). Needs `model.two_stage`. The
    second group is not used in inference."""
    decoder_auxiliary: bool = True
    """Losses on every decoder layer. False: on the last only. Encoder layers: see `model.encoder_auxiliary`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fix = "must be > 0 where bbox_cost and giou_cost are 0"
        _check(any((self.class_cost, self.bbox_cost, self.giou_cost)), "class_cost", self.class_cost, fix)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Bounded):
    """Optimiser, schedule, precision and checkpoints."""

    epochs: int = _bounded(50, "> 0")
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW (published), or SGD with momentum 0.9."""
    learning_rate: float = _bounded(2e-4, "> 0")
    """Learning rate of all parameters but the two groups below, before scaling."""
    backbone_learning_rate: float = _bounded(2e-5, ">= 0")
    offset_learning_rate_factor: float = _bounded(0.1, ">= 0")
    """Factor on `learning_rate` for sampling offsets and reference points."""
    scale_learning_rate: bool = True
    """Multiply the learning rates by sqrt(global batch size / 16), as the published runs do."""
    weight_decay: float = _bounded(1e-4, ">= 0")
    clip_norm: float = _bounded(0.1, "> 0")
    """Maximum norm of the gradient."""
    accumulate: int = _bounded(1, "> 0")
    """Batches per process and step; their gradients are accumulated. Equal to larger batches, except for trained batch
    norms, whose statistics are those of each batch."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of forward and backward passes, also of the teachers. bfloat16: autocast, and teachers with bfloat16
    weights; the student's weights, matching and losses stay float32."""
    recompute: bool = False
    """Activation checkpointing of the encoder and decoder layers: slower, less memory."""
    compile: bool = False
    """Compile the encoder and decoder layers; where that fails they run uncompiled, with a warning."""
    ema_decay: float = _bounded(0.0, "in [0, 1)")
    """Decay of an exponential moving average of the weights, which is then evaluated and saved. 0: no average."""
    schedule: Literal["step", "one_cycle"] = "step"
    drop_epochs: tuple[int, ...] = (40,)
    """Epochs after which the schedule `step` multiplies the learning rates by `drop_factor`."""
    drop_factor: float = _bounded(0.1, "in (0, 1]")
    warmup_share: float = _bounded(0.1, "in (0, 1)")
    """Fraction of all steps in which `one_cycle` rises to the full learning rates; then it falls to 0."""
    init_from: str | None = None
    """Initial weights, as far as they fit: anything that `--checkpoint` takes, or a file of backbone weights; `weak` or
    `strong`: the teacher of the same run."""
    resume: Literal["auto", "never"] = "auto"
    """`auto`: resume from the checkpoint in the run's folder, if any; `never`: train from step 0."""
    checkpoint_every: int = _bounded(1, "> 0")
    """Epochs between checkpoints. Another one is written before each evaluation."""
    checkpoint_every_steps: int = _bounded(0, ">= 0")
    """Steps between checkpoints within an epoch; 0: none."""
    evaluate_every: int = _bounded(1, ">= 0")
    """Epochs between evaluations; 0: at the end only."""
    log_every: int = _bounded(10, "> 0")
    """Steps between lines of the log, each with a device-to-host synchronisation."""
    timeout_minutes: float = _bounded(30.0, "in (0, 100000]")
    """Longest wait for a batch of images or for another process, after which the run ends with an error."""
    max_skipped_steps: int = _bounded(10, "> 0")
    """Steps without a finite gradient are skipped; the run stops after this many in a row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(min(self.drop_epochs, default=1) > 0, "drop_epochs", self.drop_epochs, "must be > 0")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """One frozen teacher."""

    config: str
    """YAML file of the teacher's training."""
    checkpoint: str | None = None
    """A finished teacher: anything that `--checkpoint` takes. None: the teacher is trained first, in the same run."""


@dataclass(frozen=True, kw_only=True)
class TeachersConfig(_Bounded):
    """The teachers of an adaptive model (dual teacher supervision)."""

    weak: TeacherConfig
    """Keeps the student's min_ratio of the tokens; images that it does not detect well need a larger budget."""
    strong: TeacherConfig
    """Keeps the student's max_ratio of the tokens; its memory is the target of the distillation."""
    difficulty_bias: float = _bounded(1.0, "in (0, 1]")
    """AP of the weak teacher on an image, in (0, 1], from which the image counts as easy."""
    level_weights: tuple[float, ...] = (0.25, 0.25, 0.25, 0.25)
    """Weight of each feature level in `loss_memory`."""
    cache_difficulty: bool = False
    """Measure the difficulty of each image once, on its first augmentation, instead of in every epoch (as published).
    The weak teacher then runs on batches with a new image only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fix = "all weights must be >= 0, one of them > 0"
        weights = self.level_weights
        _check(min(weights, default=0) >= 0 and any(weights), "level_weights", weights, fix)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(_Bounded):
    """What average precision counts."""

    max_detections: int = _bounded(100, "> 0")
    """Detections of an image that count, the best over all classes. Raise it where images hold more objects."""


@dataclass(frozen=True, kw_only=True)
class Config(_Bounded):
    """All settings of a run."""

    name: str = "run"
    """Name of the run and its folder."""
    output_dir: str | None = None
    """Folder of everything the run writes. None: runs/<name>."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    teachers: TeachersConfig | Literal["self"] | None = None
    """Of an adaptive model, which needs them. `self`: no teachers; the budget head learns the number of annotated
    objects."""
    summary: bool = False
    """Compare the stages, or with `teachers: self` the budgets, after training: a table, pictures, and a plot of
    budgets and numbers of objects."""
    num_pictures: int = _bounded(8, ">= 0", most=100_000)
    """Images drawn with detections and kept tokens after an evaluation."""
    seed: int = _bounded(42, ">= 0", most=2**32 - 1)
    """Seed of weights, sampling and augmentation; each process adds its rank."""
    deterministic: bool = False
    """Use deterministic algorithms only, which are slower; PyTorch raises where it has none. Without effect on the CPU,
    which is deterministic."""
    device: str = "auto"
    """`auto`: CUDA if available, otherwise the CPU; or the name of a torch device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fix = "must be the name of a folder: printable characters without slashes, not only dots, at most 200 bytes"
        is_short = len(self.name.encode("utf-8", "replace")) <= 200
        is_plain = self.name.isprintable() and not set(self.name) & set("/\\")
        _check(bool(self.name.strip(". ")) and is_short and is_plain, "name", self.name, fix)
        if not self.model.adaptive:
            _check(self.teachers is None, "teachers", "set", "only an adaptive model has teachers")
            _check(not self.summary, "summary", True, "only a run with teachers has stages to compare")
        if isinstance(self.teachers, TeachersConfig):
            weights, levels = self.teachers.level_weights, self.model.num_levels
            fix = f"must have model.num_levels = {levels} weights"
            _check(len(weights) == levels, "teachers.level_weights", weights, fix)

    @property
    def run_dir(self) -> Path:
        """Folder of everything the run writes."""
        return Path(self.output_dir) if self.output_dir else Path("runs") / self.name


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with `key.sub=value` overrides.

    Args:
        path: a YAML file, or the name of a shipped configuration such as `quickstart`.
        overrides: settings that take precedence over the file, such as `train.epochs=12`.

    Raises UserError with the file, the key and the fix.
    """
    path = find_config(path)
    tree = _read_tree(path, ())
    for override in overrides:
        apply_override(tree, override)
    try:
        config = config_from_dict(tree)
        _check_trainable(config)
    except ConfigError as error:
        raise UserError(f"{path}: {error}") from error
    return config


def shipped_configs() -> dict[str, Path]:
    """The configuration files of this package, by name."""
    folder = Path(__file__).with_name("configs")  # of an installed package
    if not folder.is_dir():
        folder = Path(__file__).parents[1] / "configs"  # of a checkout
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_config(source: str | Path, folder: Path = Path()) -> Path:
    """The file `source`, relative to `folder` or to the working directory; otherwise the shipped configuration of this
    name: `quickstart`, `quickstart.yaml` and `configs/quickstart.yaml` are the same one.

    Raises UserError with the nearest names if there is neither.
    """
    for path in (folder / source, Path(source)):
        # The functions of pathlib raise where a folder is not readable.
        if os.path.exists(path) and not os.path.isdir(path):
            return path
    path, shipped = Path(source), shipped_configs()
    name = path.name.removesuffix(".yaml")
    if name in shipped and path.parent in (Path(), Path("configs")):
        return shipped[name]
    near = ", ".join(difflib.get_close_matches(name, shipped, n=3, cutoff=0))
    raise UserError(f"{source}: no such file or shipped configuration; the nearest names are {near}")


def _teacher_config(source: str, folder: Path) -> str:
    """`source` independent of `folder`: the name of a shipped configuration, or an absolute path."""
    try:
        path = find_config(source, folder)
    except UserError:  # raised again where the teacher is needed
        return str(folder / source)
    shipped = shipped_configs().get(path.stem)
    return path.stem if shipped is not None and shipped.samefile(path) else str(path)


def _check_trainable(config: Config) -> None:
    """Requirements of training beyond those of inference."""
    if config.model.adaptive:
        fix = "an adaptive model needs teachers.weak and teachers.strong, or teachers: self"
        _check(config.teachers is not None, "teachers", None, fix)
        assert config.model.selector is not None
        if config.teachers == "self":
            _check_self_taught(config)
            return
        mean = config.model.selector.mean_ratio
        _check(mean is None, "model.selector.mean_ratio", mean, "needs teachers: self")
        fix = "distillation from the strong teacher needs this layer: set it to true"
        _check(config.model.adaption, "model.adaption", config.model.adaption, fix)
        return
    needs = dict.fromkeys(("budget_weight", "memory_weight", "difficulty_iou"), "an adaptive model")
    if not config.model.two_stage:
        needs["one_to_many"] = "model.two_stage"
    if config.model.selector is None:
        needs["selector_weight"] = "model.selector"
    for key, need in needs.items():
        value = getattr(config.loss, key)
        _check(value == getattr(LossConfig, key), f"loss.{key}", value, f"has no effect without {need}")


def _check_self_taught(config: Config) -> None:
    """Requirements of `teachers: self`."""
    selector = config.model.selector
    assert selector is not None and selector.min_ratio is not None and selector.max_ratio is not None
    low, high = selector.train_ratios or (1.0, 0.0)
    fix = f"with teachers: self, must include min_ratio = {selector.min_ratio} and max_ratio = {selector.max_ratio}"
    covers = low <= selector.min_ratio and selector.max_ratio <= high
    _check(covers, "model.selector.train_ratios", selector.train_ratios, fix)
    mean = selector.mean_ratio
    fix = f"with teachers: self, must be between min_ratio = {selector.min_ratio} and max_ratio = {selector.max_ratio}"
    is_between = mean is not None and selector.min_ratio < mean < selector.max_ratio
    _check(is_between, "model.selector.mean_ratio", mean, fix)
    fix = "has no effect with teachers: self"
    _check(not config.model.adaption, "model.adaption", config.model.adaption, fix)
    for key in ("memory_weight", "difficulty_iou"):
        value = getattr(config.loss, key)
        _check(value == getattr(LossConfig, key), f"loss.{key}", value, fix)


def config_from_dict(tree: Mapping[str, Any]) -> Config:
    """Inverse of `config_to_dict`. Missing keys get their defaults; unknown ones raise ConfigError."""
    return _build(Config, tree, "")


def config_to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionaries and lists of plain values, as stored in YAML, JSON and checkpoints."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(entry) for entry in value]
        return value

    return plain(dataclasses.asdict(config))


_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""ValueError: not UTF-8, or an integer of thousands of digits. RecursionError: deep nesting."""


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The settings of a file merged into those of its base; `teachers.*.config` as `_teacher_config` returns it."""
    if path.resolve() in seen:
        raise UserError(f"{path}: its base files form a cycle")
    if os.path.exists(path) and not os.path.isfile(path):  # a FIFO could block forever
        raise UserError(f"{path}: cannot read this configuration file (not a regular file)")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read this configuration file ({error.strerror})") from error
    except _NOT_YAML as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected `key: value` settings, found a {type(tree).__name__}")
    teachers = tree.get("teachers")
    for teacher in teachers.values() if isinstance(teachers, dict) else ():
        if isinstance(teacher, dict) and isinstance(teacher.get("config"), str):
            teacher["config"] = _teacher_config(teacher["config"], path.parent)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{path}: base = {base!r}: must be the name of one YAML file")
    try:
        base = find_config(base, path.parent)
    except UserError as error:
        raise UserError(f"{path}: base: {error}") from None
    return _merge(_read_tree(base, (*seen, path.resolve())), tree)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Apply one `key.sub=value` to nested dictionaries; the value is parsed as YAML. Raises UserError if malformed."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: must have the form key.sub=value")
    try:
        value = yaml.safe_load(text)
    except _NOT_YAML as error:
        raise UserError(f"override {shortened(override, _SHOWN)}: the value is not YAML") from error
    *parents, leaf = key.split(".")
    for parent in parents:
        child = tree.get(parent)
        if not isinstance(child, dict):
            child = tree[parent] = {}
        tree = child
    tree[leaf] = value


def _build(kind: type[ConfigT], tree: Any, prefix: str) -> ConfigT:
    """An instance of the dataclass `kind` from nested dictionaries. ConfigError has the full key."""
    if not isinstance(tree, Mapping):
        raise ConfigError(prefix.rstrip("."), tree, "must be a mapping of settings, key: value")
    hints = typing.get_type_hints(kind)
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = {}
    for key, value in tree.items():
        if key not in hints:
            key = str(key)[:100]
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0)
            hint = f"did you mean {prefix}{near[0]}?" if near else "it has no settings"
            raise ConfigError(f"{prefix}{key}", value, f"there is no such setting; {hint}")
        most = fields[key].metadata.get("most", _MAX_INTEGER)
        values[key] = _convert(value, hints[key], f"{prefix}{key}", most)
    for entry in fields.values():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and entry.name not in values:
            raise ConfigError(f"{prefix}{entry.name}", None, "required, it has no default")
    try:
        return kind(**values)
    except ConfigError as error:
        if not prefix:
            raise
        raise ConfigError(f"{prefix}{error.key}", error.value, error.fix) from None


def _convert(value: Any, hint: Any, key: str, most: int) -> Any:
    """A value parsed by YAML, converted to the annotated type of a field. `most`: largest integer."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        named = [argument for argument in arguments if typing.get_origin(argument) is Literal]
        if any(isinstance(value, str) and value in typing.get_args(word) for word in named):
            return value
        (hint,) = (argument for argument in arguments if argument not in (types.NoneType, *named))
        return _convert(value, hint, key, most)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, f"{key}.")
    if origin is Literal:
        if value in arguments:
            return value
        raise ConfigError(key, value, f"must be one of {', '.join(map(str, arguments))}")
    if origin in (tuple, dict):
        fix = f"at most {_MAX_LENGTH} values, nested at most {_MAX_DEPTH} times"
        _check(_is_small(value), key, value, fix)
    if origin is tuple:
        return _convert_tuple(value, arguments, key, most)
    if origin is dict:
        _check(isinstance(value, dict), key, value, "must be a mapping of settings, key: value")
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        _check(abs(value) <= most, key, value, f"must be <= {most}")
        return value
    if hint is float and not isinstance(value, bool):
        number = _as_float(value)
        if number is not None:
            return number
    if hint is str and (isinstance(value, str) or (type(value) in (int, float) and abs(value) < 1e18)):
        _check("\0" not in str(value), key, value, "must not contain null characters")
        return str(value)
    words = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}
    raise ConfigError(key, value, f"must be {words[hint]}")


def _is_small(value: Any) -> bool:
    """Whether nested lists and dictionaries are within the bounds; not if they contain themselves."""
    pending, count = [(value, 0)], 0
    while pending and count <= _MAX_LENGTH:
        entry, depth = pending.pop()
        count += 1
        if depth > _MAX_DEPTH:
            return False
        entry = list(entry.values()) if isinstance(entry, dict) else entry
        if isinstance(entry, (list, tuple)):
            pending += [(child, depth + 1) for child in entry]
    return count <= _MAX_LENGTH


def _convert_tuple(value: Any, arguments: tuple[Any, ...], key: str, most: int) -> tuple[Any, ...]:
    repeated = len(arguments) == 2 and arguments[1] is Ellipsis
    is_list = isinstance(value, (list, tuple)) and (repeated or len(value) == len(arguments))
    fix = f"must be a list of {'values' if repeated else len(arguments)}, such as [1, 2]"
    _check(is_list, key, value, fix)
    kinds = [arguments[0]] * len(value) if repeated else arguments
    return tuple(
        _convert(entry, kind, f"{key}[{i}]", most)
        for i, (entry, kind) in enumerate(zip(value, kinds, strict=True))
    )


def _as_float(value: Any) -> float | None:
    """A finite number or None. YAML reads `1e-4` as a string."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
