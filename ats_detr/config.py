"""Every setting of a run: a tree of frozen dataclasses, read from YAML files and `a.b=c` overrides.

A YAML file states differences only: from the defaults below, or from the file named by its `base:` key. `base` and
`teachers.*.config` are paths relative to the file that states them, or names of shipped configurations; all other paths
are relative to the working directory.
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

ConfigT = TypeVar("ConfigT")


class ConfigError(UserError):
    """A setting that cannot be: says which key, its value, and the mend."""

    def __init__(self, key: str, value: object, mend: str):
        super().__init__(f"{key} = {value!r}: {mend}")
        self.key, self.value, self.mend = key, value, mend


def _check(holds: bool, key: str, value: object, mend: str) -> None:
    if not holds:
        raise ConfigError(key, value, mend)


def _check_positive(config: object, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        _check(value > 0, key, value, "give a number above 0")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The image network under the pyramid: its stride 8, 16 and 32 outputs are read."""

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
        _check(bool(self.name), "name", self.name, "give the name of a timm model, such as resnet50")
        _check(0 <= self.frozen_stages <= 4, "frozen_stages", self.frozen_stages, "give 0 to 4")


@dataclass(frozen=True, kw_only=True)
class SelectorConfig:
    """Which tokens the encoder updates. Fixed budget: `keep_ratio`. Adaptive: `min_ratio` and `max_ratio`."""

    scores: Literal["features", "proposals"] = "features"
    """What the scoring network reads: the backbone's features (ATS-DETR) or the proposals' embedding (Sparse DETR)."""
    keep_ratio: float | None = None
    """Share of each image's valid tokens that is kept. None: the budget is chosen per image."""
    min_ratio: float | None = None
    """Share kept on the easiest images (adaptive only)."""
    max_ratio: float | None = None
    """Share kept on the hardest images (adaptive only)."""
    num_budgets: int = 2
    """Budget classes, evenly spaced from `min_ratio` to `max_ratio` inclusive (adaptive only; 2 as published)."""
    min_tokens: int = 300
    """No image keeps fewer tokens than this (adaptive only; at least as many as the decoder has queries)."""
    masked_mean: bool = True
    """The scorer's global feature averages valid tokens only. False: padding too, as the published checkpoints need."""

    def __post_init__(self) -> None:
        if self.keep_ratio is not None:
            _check(
                0 < self.keep_ratio <= 1, "keep_ratio", self.keep_ratio, "give a share above 0 and up to 1"
            )
            for key in ("min_ratio", "max_ratio"):
                mend = "set it to null, or set keep_ratio to null for a budget per image"
                _check(getattr(self, key) is None, key, getattr(self, key), mend)
            return
        for key in ("min_ratio", "max_ratio"):
            value = getattr(self, key)
            _check(value is not None, key, value, "set keep_ratio, or both min_ratio and max_ratio")
            _check(0 < value <= 1, key, value, "give a share above 0 and up to 1")
        assert self.min_ratio is not None and self.max_ratio is not None
        _check(
            self.min_ratio < self.max_ratio,
            "max_ratio",
            self.max_ratio,
            f"must exceed min_ratio {self.min_ratio}",
        )
        _check(self.num_budgets >= 2, "num_budgets", self.num_budgets, "give at least 2")
        _check(self.min_tokens >= 1, "min_tokens", self.min_tokens, "give at least 1")

    @property
    def adaptive(self) -> bool:
        """Whether the budget is chosen per image."""
        return self.keep_ratio is None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The detector. The defaults are plain one-stage Deformable DETR; the switches below make the whole family."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    selector: SelectorConfig | None = None
    """None: a dense encoder, every token is updated."""
    num_classes: int | None = None
    """Class rows of the heads. None: counted from the annotation file (COCO: the published 91)."""
    width: int = 256
    """Channels of every token and query."""
    num_heads: int = 8
    num_levels: int = 4
    """Feature levels: strides 8, 16, 32, and then halved again for each further one."""
    num_points: int = 4
    """Sampled locations per head and level."""
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    feedforward_width: int = 1024
    dropout: float = 0.1
    num_queries: int = 300
    two_stage: bool = False
    """Queries start from the best proposals of the encoder instead of learned embeddings."""
    box_refine: bool = False
    """Each decoder layer refines the boxes of the one before."""
    queries_from_memory: bool = False
    """The content of a two-stage query is the encoder's memory at its proposal (Efficient DETR)."""
    class_specific_proposals: bool = False
    """Proposals are ranked by their best class instead of class 0 (Efficient DETR)."""
    encoder_auxiliary: bool = False
    """Class and box heads on every encoder layer but the last, for training."""
    adaption: bool = False
    """A linear layer on the memory through which the strong teacher is imitated; unused in inference."""

    def __post_init__(self) -> None:
        _check_positive(
            self, "width", "num_heads", "num_levels", "num_points", "num_encoder_layers", "num_decoder_layers"
        )
        _check_positive(self, "feedforward_width", "num_queries")
        _check(
            0 <= self.dropout < 1,
            "dropout",
            self.dropout,
            "give a probability from 0 up to, not including, 1",
        )
        _check(
            self.num_levels >= 3,
            "num_levels",
            self.num_levels,
            "give at least 3, one for each backbone output",
        )
        classes = self.num_classes
        _check(
            classes is None or classes > 0,
            "num_classes",
            classes,
            "give a count above 0, or null to count them",
        )
        mend = f"give a multiple of num_heads ({self.num_heads}) that is divisible by 4"
        _check(self.width % self.num_heads == 0 and self.width % 4 == 0, "width", self.width, mend)
        for key in ("queries_from_memory", "class_specific_proposals"):
            _check(self.two_stage or not getattr(self, key), key, True, "needs model.two_stage = true")
        if self.selector is not None:
            _check(self.two_stage, "selector", "set", "token selection needs model.two_stage = true")
        _check(
            self.selector is not None or not self.encoder_auxiliary,
            "encoder_auxiliary",
            True,
            "needs a selector",
        )
        _check(self.selector is not None or not self.adaption, "adaption", True, "needs a selector")

    @property
    def adaptive(self) -> bool:
        """Whether the number of kept tokens is chosen per image, which two teachers have to teach."""
        return self.selector is not None and self.selector.adaptive


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Generated images with textured shapes, from one large object to many small overlapping ones."""

    num_train: int = 2000
    num_val: int = 250
    image_size: int = 128
    """Images have about the square of this many pixels."""
    max_aspect_ratio: float = 1.0
    """Aspect ratios are spread from its inverse to this; 1: all images are square."""
    num_classes: int = 4
    min_objects: int = 1
    max_objects: int = 25
    """Images hold `min_objects` to this many objects; few are common, many are rare."""
    seed: int = 0

    def __post_init__(self) -> None:
        _check_positive(self, "num_train", "num_val", "num_classes", "max_objects")
        _check(self.image_size >= 32, "image_size", self.image_size, "give at least 32 pixels")
        _check(1 <= self.max_aspect_ratio <= 4, "max_aspect_ratio", self.max_aspect_ratio, "give 1 to 4")
        mend = f"give 0 to max_objects ({self.max_objects})"
        _check(0 <= self.min_objects <= self.max_objects, "min_objects", self.min_objects, mend)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images, annotations, augmentation and batches."""

    kind: Literal["coco", "synthetic"] = "coco"
    """COCO-format folders, or images generated once into `root`."""
    root: str = "data/coco"
    """Folder that the four paths below are relative to."""
    train_images: str = "train2017"
    train_annotations: str = "annotations/instances_train2017.json"
    val_images: str = "val2017"
    val_annotations: str = "annotations/instances_val2017.json"
    short_side: int = 800
    """Evaluation resizes the shorter side of each image to this many pixels ..."""
    long_side: int = 1333
    """... unless the longer side would exceed this."""
    train_short_sides: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Training draws the shorter side from these."""
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    """Half of the training images are resized to one of these, cropped, and resized again. Empty: never."""
    crop_size: tuple[int, int] = (384, 600)
    """Smallest and largest side of that crop in pixels."""
    size_multiple: int = 64
    """Evaluation pads each image to a multiple of this, and batches only images of one padded size."""
    batch_size: int = 2
    """Training images per process and step."""
    eval_batch_size: int = 4
    num_workers: int = 4
    """Loader processes of each training process. 0: load in the training process."""
    cache_images: bool = False
    """Keep the encoded image files in memory."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What an unreadable image file does: stops the run and is named, or is named and left out."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    def __post_init__(self) -> None:
        _check_positive(self, "short_side", "long_side", "size_multiple", "batch_size", "eval_batch_size")
        _check(self.num_workers >= 0, "num_workers", self.num_workers, "give 0 or more")
        _check(len(self.train_short_sides) > 0, "train_short_sides", (), "give at least one length in pixels")
        for key in ("train_short_sides", "crop_short_sides"):
            sides = getattr(self, key)
            _check(min(sides, default=1) > 0, key, sides, "give lengths above 0")
        _check(
            0 < self.crop_size[0] <= self.crop_size[1],
            "crop_size",
            self.crop_size,
            "give [smallest, largest] pixels",
        )
        if self.crop_short_sides:
            mend = (
                f"the smallest crop must fit the smallest of crop_short_sides ({min(self.crop_short_sides)})"
            )
            _check(self.crop_size[0] <= min(self.crop_short_sides), "crop_size", self.crop_size, mend)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimiser, schedule, and what a training run keeps."""

    epochs: int = 50
    learning_rate: float = 2e-4
    """Of everything but the two groups below, before scaling."""
    backbone_learning_rate: float = 2e-5
    offset_learning_rate_factor: float = 0.1
    """Times `learning_rate` for sampling offsets and reference points."""
    scale_learning_rate: bool = True
    """Multiply the learning rates by sqrt(global batch size / 16), as the published runs do."""
    weight_decay: float = 1e-4
    clip_norm: float = 0.1
    """Gradients are scaled down to this norm."""
    accumulate: int = 1
    """Batches of each process that make one step: their gradients are added, as if they were one batch."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the networks' passes, teachers included. bfloat16: by autocast; weights, matching and losses stay float32."""
    recompute: bool = False
    """Encoder and decoder layers keep only their inputs and run again in the backward pass: slower, less memory."""
    compile: bool = False
    """Compile the layers of encoder and decoder; where that fails, a warning says so and they run as they are."""
    ema_decay: float = 0.0
    """Above 0: evaluate and finally keep an exponential moving average of the weights, updated in every step."""
    schedule: Literal["step", "one_cycle"] = "step"
    drop_epochs: tuple[int, ...] = (40,)
    """Epochs after which the step schedule multiplies the learning rates by `drop_factor`."""
    drop_factor: float = 0.1
    warmup_share: float = 0.1
    """Share of all steps in which one-cycle rises to the full learning rates; it falls to 0 in the rest."""
    init_from: str | None = None
    """Checkpoint whose fitting weights the model starts from; `weak` or `strong`: the teacher of the same run."""
    resume: Literal["auto", "never"] = "auto"
    """`auto`: go on from the checkpoint in the run's folder if there is one; `never`: start afresh."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""
    checkpoint_every_steps: int = 0
    """Steps between further checkpoints within an epoch; 0: none."""
    evaluate_every: int = 1
    """Epochs between evaluations; 0: only at the end."""
    log_every: int = 10
    """Steps between lines of the log; reading the losses waits for the device. Several processes that were told to stop
    do so at such a step."""
    max_skipped_steps: int = 10
    """A step without a finite gradient is skipped; after this many in a row the run stops."""

    def __post_init__(self) -> None:
        _check_positive(self, "epochs", "learning_rate", "clip_norm", "accumulate", "checkpoint_every")
        _check_positive(self, "log_every", "max_skipped_steps")
        _check(
            0 <= self.ema_decay < 1,
            "ema_decay",
            self.ema_decay,
            "give a share from 0 up to, not including, 1",
        )
        for key in (
            "backbone_learning_rate",
            "offset_learning_rate_factor",
            "weight_decay",
            "evaluate_every",
            "checkpoint_every_steps",
        ):
            _check(getattr(self, key) >= 0, key, getattr(self, key), "give a number from 0 up")
        _check(
            0 < self.drop_factor <= 1, "drop_factor", self.drop_factor, "give a factor above 0 and up to 1"
        )
        _check(0 < self.warmup_share < 1, "warmup_share", self.warmup_share, "give a share between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """One frozen teacher."""

    config: str
    """YAML file that the teacher is trained from."""
    checkpoint: str | None = None
    """A finished teacher. None: trained first, in the same run."""


@dataclass(frozen=True, kw_only=True)
class TeachersConfig:
    """What an adaptive model learns from (dual teacher supervision)."""

    weak: TeacherConfig
    """Its keep ratio is the student's min_ratio: images on which it fails are hard and need more tokens."""
    strong: TeacherConfig
    """Its keep ratio is the student's max_ratio: its memory is imitated."""
    difficulty_bias: float = 1.0
    """Average precision (0..1) of the weak teacher on an image from which the image counts as easy."""
    level_weights: tuple[float, ...] = (0.25, 0.25, 0.25, 0.25)
    """Weight of each feature level in the imitation of the memory."""
    cache_difficulty: bool = False
    """Judge each image once, as its first augmentation shows it, instead of in every epoch (as published): the weak
    teacher then runs in the first epoch only, but for batches with an image that was not seen in it."""

    def __post_init__(self) -> None:
        _check(
            0 < self.difficulty_bias <= 1,
            "difficulty_bias",
            self.difficulty_bias,
            "give an AP above 0 and up to 1",
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What average precision counts."""

    max_detections: int = 100
    """Detections of an image that count, the best over all classes. Raise it where images hold more objects."""

    def __post_init__(self) -> None:
        _check_positive(self, "max_detections")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    name: str = "run"
    """Names the run's folder."""
    output_dir: str | None = None
    """Folder of everything the run writes. None: runs/<name>."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    teachers: TeachersConfig | None = None
    """Needed by, and only by, a model with a budget per image."""
    summary: bool = False
    """After training, compare the three stages: a table, pictures, and the budget against the number of objects."""
    num_pictures: int = 8
    """Images drawn with their detections and kept tokens after an evaluation."""
    seed: int = 42
    """Each process adds its rank."""
    deterministic: bool = False
    """Only algorithms that give the same bits in every run, slower on a GPU, where PyTorch raises if it has none. On
    the CPU they do in any case."""
    device: str = "auto"
    """`auto`: CUDA if there is any, else the CPU; or a torch device."""

    def __post_init__(self) -> None:
        _check(bool(self.name) and "/" not in self.name, "name", self.name, "give a name without slashes")
        if not self.model.adaptive:
            _check(
                self.teachers is None, "teachers", "set", "only a model with a budget per image has teachers"
            )
            _check(not self.summary, "summary", True, "only a run with teachers has stages to compare")
        levels = self.model.num_levels
        if self.teachers is not None:
            weights = self.teachers.level_weights
            _check(
                len(weights) == levels,
                "teachers.level_weights",
                weights,
                f"give model.num_levels = {levels} weights",
            )

    @property
    def run_dir(self) -> Path:
        """Folder of everything the run writes."""
        return Path(self.output_dir) if self.output_dir else Path("runs") / self.name


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, after `a.b=c` overrides.

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
        if os.path.exists(path) and not os.path.isdir(
            path
        ):  # those of pathlib raise where a folder is not readable
            return path
    path, shipped = Path(source), shipped_configs()
    name = path.name.removesuffix(".yaml")
    if name in shipped and path.parent in (Path(), Path("configs")):
        return shipped[name]
    near = ", ".join(difflib.get_close_matches(name, shipped, n=3, cutoff=0))
    raise UserError(
        f"{source}: no such file, and no shipped configuration of this name; the nearest are {near}"
    )


def _teacher_config(source: str, folder: Path) -> str:
    """`source` so that it can be found without `folder`: the name of a shipped configuration, or a path."""
    try:
        path = find_config(source, folder)
    except UserError:  # raised again where the teacher is needed
        return str(folder / source)
    shipped = shipped_configs().get(path.stem)
    return path.stem if shipped is not None and shipped.samefile(path) else str(path)


def _check_trainable(config: Config) -> None:
    """What a run needs beyond what its model needs in inference."""
    if config.model.adaptive:
        mend = "a model with a budget per image needs teachers.weak and teachers.strong"
        _check(config.teachers is not None, "teachers", None, mend)
        mend = "the strong teacher is imitated through it: set it to true"
        _check(config.model.adaption, "model.adaption", config.model.adaption, mend)


def config_from_dict(tree: Mapping[str, Any]) -> Config:
    """The inverse of `config_to_dict`; missing keys take their defaults, unknown ones are refused."""
    return _build(Config, tree, "")


def config_to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionaries and lists of plain values: what YAML, JSON and a weights-only checkpoint can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(entry) for entry in value]
        return value

    return plain(dataclasses.asdict(config))


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration; `load_config` reads it back equal."""
    path.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False))


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The settings of a file merged into those of its base; `teachers.*.config` as `_teacher_config` returns it."""
    if path.resolve() in seen:
        raise UserError(f"{path}: its base files go round in a circle")
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot read this configuration file ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
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
        raise UserError(f"{path}: base = {base!r}: give the name of one YAML file")
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
    """Set one `a.b=c` in nested dictionaries; the value is read as YAML. Raises UserError for another form."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: write it as key.sub=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not YAML") from error
    *parents, leaf = key.split(".")
    for parent in parents:
        child = tree.get(parent)
        if not isinstance(child, dict):
            child = tree[parent] = {}
        tree = child
    tree[leaf] = value


def _build(kind: type[ConfigT], tree: Any, prefix: str) -> ConfigT:
    """An instance of the dataclass `kind` from nested dictionaries; errors name the key from the root."""
    if not isinstance(tree, Mapping):
        raise ConfigError(prefix.rstrip("."), tree, "expected settings of the form key: value")
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0)
            hint = f"did you mean {prefix}{near[0]}?" if near else "it has no settings"
            raise ConfigError(f"{prefix}{key}", value, f"there is no such setting; {hint}")
        values[key] = _convert(value, hints[key], f"{prefix}{key}")
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    for entry in fields:
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and entry.name not in values:
            raise ConfigError(f"{prefix}{entry.name}", None, "this setting has no default and must be given")
    try:
        return kind(**values)
    except ConfigError as error:
        if not prefix:
            raise
        raise ConfigError(f"{prefix}{error.key}", error.value, error.mend) from None


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value`, as YAML gives it, in the type a field is annotated with."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        (hint,) = (argument for argument in arguments if argument is not types.NoneType)
        return _convert(value, hint, key)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, f"{key}.")
    if origin is Literal:
        if value in arguments:
            return value
        raise ConfigError(key, value, f"give one of {', '.join(map(str, arguments))}")
    if origin is tuple:
        return _convert_tuple(value, arguments, key)
    if origin is dict:
        if isinstance(value, dict):
            return value
        raise ConfigError(key, value, "expected settings of the form key: value")
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and not isinstance(value, bool):
        number = _as_float(value)
        if number is not None:
            return number
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}
    raise ConfigError(key, value, f"give {words[hint]}")


def _convert_tuple(value: Any, arguments: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    repeated = len(arguments) == 2 and arguments[1] is Ellipsis
    if not isinstance(value, (list, tuple)) or not (repeated or len(value) == len(arguments)):
        raise ConfigError(
            key, value, f"give a list of {'values' if repeated else len(arguments)}, such as [1, 2]"
        )
    kinds = [arguments[0]] * len(value) if repeated else arguments
    return tuple(
        _convert(entry, kind, f"{key}[{i}]") for i, (entry, kind) in enumerate(zip(value, kinds, strict=True))
    )


def _as_float(value: Any) -> float | None:
    """YAML reads `1e-4` as a text: numbers are taken in either form."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
