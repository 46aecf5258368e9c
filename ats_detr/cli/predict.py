"""Detect objects in images, folders and videos. Of the folder of a dataset, the test or validation images are used.

With --sample, the images are drawn first: `ats-detr predict --checkpoint shapes --sample` needs no data.

Writes predictions.json, pictures/, videos/ and gallery.html. A file that cannot be read is reported and skipped; the
exit code is then 1.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from PIL import Image

from ats_detr.budgets import parse_budget
from ats_detr.checkpoint import write_json
from ats_detr.cli.gallery import Gallery
from ats_detr.cli.options import CHECKPOINT, FAILURES, add_budget, add_max_detections
from ats_detr.console import complain, say, track
from ats_detr.data.coco import CocoDetection
from ats_detr.data.images import ImageFileError, images_in, is_url, visible_files
from ats_detr.data.layout import choose_split
from ats_detr.data.sources import find_layout
from ats_detr.data.synthetic import synthetic_dataset
from ats_detr.data.video import VIDEO_SUFFIXES, VideoWriter, read_video
from ats_detr.detector import THRESHOLD, Detector, Result
from ats_detr.errors import UserError
from ats_detr.files import make_folder
from ats_detr.visualize import add_caption, draw_kept_tokens

Shown = Literal["boxes", "tokens", "budget"]
SHOWN: tuple[Shown, ...] = ("boxes", "tokens", "budget")
NUM_SAMPLES = 12


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("paths", nargs="*", metavar="PATH", help="an image, a video, or a folder of them")
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT)
    parser.add_argument(
        "--sample",
        action="store_true",
        help=f"draw {NUM_SAMPLES} images of shapes into OUT/sample, for a detector that was trained on such images",
    )
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="default: %(default)s")
    parser.add_argument(
        "--show",
        type=_shown,
        default=SHOWN,
        metavar="boxes,tokens,budget",
        help="what is drawn into pictures/ and videos/; default: all",
    )
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help="minimum score; default: %(default)s"
    )
    add_max_detections(parser)
    parser.add_argument(
        "--batch-size", type=int, default=1, help="affects only the speed; default: %(default)s"
    )
    add_budget(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; default: %(default)s")
    parser.add_argument("--allow-urls", action="store_true", help="fetch images from http(s) URLs")
    parser.add_argument(
        "--stored-pixels", action="store_true", help="ignore the orientation in the EXIF data of photographs"
    )


def _shown(text: str) -> tuple[Shown, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    unknown = [part for part in parts if part not in SHOWN]
    if unknown:
        raise ArgumentTypeError(f"{unknown[0]!r}: must be one or more of {','.join(SHOWN)}")
    return tuple(part for part in SHOWN if part in parts)


def run(arguments: Namespace) -> None:
    """Predict, and report what was written and what failed."""
    paths = arguments.paths
    if arguments.sample == bool(paths):
        raise UserError("predict needs either paths or --sample")
    budget = parse_budget(arguments.budget)
    detector = Detector.from_checkpoint(arguments.checkpoint, device=arguments.device, budget=budget)
    if arguments.sample:
        paths = [str(draw_samples(detector, arguments.out / "sample"))]
    inputs = find_inputs(paths)
    if inputs.ignored:
        listed = ", ".join(path.name for path in inputs.ignored[:5])
        more = ", ..." if len(inputs.ignored) > 5 else ""
        say(f"ignored {len(inputs.ignored)} files that are neither images nor videos: {listed}{more}")
    done = predict_files(
        detector,
        inputs,
        arguments.out,
        show=arguments.show,
        title=f"{detector.config.name}: {', '.join(paths)}",
        threshold=arguments.threshold,
        max_detections=arguments.max_detections,
        batch_size=arguments.batch_size,
        upright=False if arguments.stored_pixels else None,
        allow_urls=arguments.allow_urls,
    )
    for failure in done.failures:
        complain(failure)
    kept = f"; on average {fmean(done.keep_ratios):.1%} of the tokens kept" if done.keep_ratios else ""
    videos = f" and {done.num_videos} videos" if inputs.videos else ""
    say(f"{done.num_images} images{videos}, {len(done.failures)} failed{kept}")
    gallery = ", gallery.html" if done.gallery else ""
    say(f"written to {arguments.out}: predictions.json, pictures{gallery}")
    if done.failures:
        sys.exit(FAILURES)


def draw_samples(detector: Detector, folder: Path) -> Path:
    """The folder of NUM_SAMPLES images like those that the detector was trained on, drawn with another seed.

    Raises UserError where it was not trained on drawn images, or where the folder cannot be written.
    """
    data = detector.config.data
    if data.kind != "synthetic":
        raise UserError(
            f"--sample: {detector.config.name} was not trained on drawn images; give the paths of images instead"
        )
    settings = {"num_train": 1, "num_val": NUM_SAMPLES, "seed": data.synthetic.seed + 1}
    return synthetic_dataset(folder, **asdict(data.synthetic) | settings) / "val2017"


@dataclass(kw_only=True)
class Inputs:
    """The files behind the paths of a command line."""

    images: list[str] = field(default_factory=list)
    videos: list[Path] = field(default_factory=list)
    ignored: list[Path] = field(default_factory=list)
    """Files of folders with another suffix than that of an image or a video."""


@dataclass(kw_only=True)
class Done:
    """Counts of the images and videos that were written, and the files that failed."""

    num_images: int = 0
    num_videos: int = 0
    failures: list[str] = field(default_factory=list)
    """One line for each file that could not be read."""
    keep_ratios: list[float] = field(default_factory=list)
    """Share of the tokens kept in each image; the mean is the mean keep ratio of an evaluation."""
    gallery: Path | None = None


def find_inputs(paths: Sequence[str]) -> Inputs:
    """The images and videos among `paths`. A folder stands for its files, without subfolders; a file that is given
    itself is used regardless of its suffix.

    Raises UserError if a path does not exist, or if there are no images and videos.
    """
    inputs = Inputs()
    for text in paths:
        path = Path(text)
        if is_url(text):
            inputs.images.append(text)
        elif path.is_dir():
            images = images_in(path)
            files = visible_files(path)
            if not any(file.suffix.lower() in VIDEO_SUFFIXES for file in files):
                images = images or dataset_images(path)
            videos = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
            inputs.images += map(str, images)
            inputs.videos += videos
            inputs.ignored += sorted({*files} - {*images, *videos})
        elif path.suffix.lower() in VIDEO_SUFFIXES and path.exists():
            inputs.videos.append(path)
        elif path.exists():
            inputs.images.append(text)
        else:
            raise UserError(f"{text}: no such file or folder")
    if not inputs.images and not inputs.videos:
        raise UserError(f"{', '.join(paths)}: contains no images or videos")
    return inputs


def dataset_images(folder: Path) -> list[Path]:
    """The images of the test split of a dataset, or of its validation or only split; none of another folder."""
    try:
        layout = find_layout(folder)
    except UserError:  # not a dataset
        return []
    has_test = any(split.role == "test" for split in layout.splits)
    split = choose_split(layout.splits, "test" if has_test else "val")
    dataset = CocoDetection(split.images, split.annotations, on_bad_image="skip", on_bad_annotation="skip")
    say(f"{folder}: {layout.title}; using the {len(dataset)} images of {split.name}")
    return [dataset.path(index) for index in range(len(dataset))]


def predict_files(
    detector: Detector,
    inputs: Inputs,
    out: Path,
    *,
    show: Sequence[Shown] = SHOWN,
    title: str = "",
    threshold: float,
    max_detections: int,
    batch_size: int,
    upright: bool | None = None,
    allow_urls: bool = False,
) -> Done:
    """Detect objects in all inputs and write the results into the folder `out`.

    The results are predictions.json (every image, every video frame, every failure), gallery.html, pictures/ (one
    picture with boxes and budget, one with kept tokens) and videos/. A file that cannot be read is listed in the
    returned `failures` and skipped.

    Raises UserError if the folder cannot be written.
    """
    done = Done()
    pictures = out / "pictures"
    make_folder(pictures)
    options: dict[str, Any] = dict(
        threshold=threshold, max_detections=max_detections, batch_size=batch_size, upright=upright
    )
    gallery = Gallery(title or out.name, detector.classes)
    images: list[dict[str, Any]] = []
    stems: set[str] = set()
    results = detector.stream(
        inputs.images,
        keep_tokens=True,
        allow_urls=allow_urls,
        on_bad_image=lambda error: done.failures.append(str(error)),
        **options,
    )
    for result in track(results, "images", len(inputs.images)):
        stem = _unused(Path(result.name).stem, stems)
        try:
            decoded = replace(result, source=result.image())  # decode once for all drawings
        except ImageFileError as error:  # the file may have been deleted since
            done.failures.append(str(error))
            continue
        written = _write_pictures(decoded, pictures / stem, show)
        gallery.add(decoded)
        images.append({**result.to_dict(), "pictures": [str(path.relative_to(out)) for path in written]})
        done.keep_ratios.append(result.budget.keep_ratio)
    done.num_images = len(images)
    videos: list[dict[str, Any]] = []
    for video in inputs.videos:
        try:
            frames = _predict_video(detector, video, out / "videos", stems, show, options)
        except ImageFileError as error:
            done.failures.append(str(error))
        else:
            videos.append(frames)
    done.num_videos = len(videos)
    if images:
        done.gallery = gallery.save(out / "gallery.html")
    write_json(
        {
            "model": detector.config.name,
            "threshold": threshold,
            "images": images,
            "videos": videos,
            "failed": done.failures,
        },
        out / "predictions.json",
    )
    return done


def _unused(stem: str, used: set[str]) -> str:
    """`stem`, or `stem_2`, ... if another input has it: `a.png` in two folders, or `a.png` beside `a_tokens.png`.

    File systems limit names to 255 bytes.
    """
    stem = os.fsencode(stem)[:200].decode(errors="ignore")
    name, number = stem, 1
    while not used.isdisjoint((name, f"{name}_tokens")):
        number += 1
        name = f"{stem}_{number}"
    used |= {name, f"{name}_tokens"}
    return name


def _write_pictures(result: Result, stem: Path, show: Sequence[Shown]) -> list[Path]:
    written = []
    if "boxes" in show or "budget" in show:
        picture = _picture(result, show)
        written.append(stem.with_name(f"{stem.name}.jpg"))
        picture.save(written[-1], quality=90)
    if "tokens" in show and result.kept_tokens is not None:
        figure = draw_kept_tokens(result.image(), result.kept_tokens, title=_describe(result))
        written.append(stem.with_name(f"{stem.name}_tokens.jpg"))
        figure.save(written[-1], quality=90)
    return written


def _picture(result: Result, show: Sequence[Shown]) -> Image.Image:
    picture = result.draw(min_score=0.0 if "boxes" in show else 2.0)
    return add_caption(picture, _describe(result)) if "budget" in show else picture


def _describe(result: Result) -> str:
    return f"{len(result)} object{'s' * (len(result) != 1)}; {result.budget.text}"


def _predict_video(
    detector: Detector,
    path: Path,
    folder: Path,
    stems: set[str],
    show: Sequence[Shown],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Write the video with boxes and return its frames for JSON. Raises ImageFileError if it cannot be read."""
    frames: list[dict[str, Any]] = []
    with read_video(path) as video:
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{_unused(path.stem, stems)}.mp4"
        with VideoWriter(target, video.frames_per_second) as writer:
            results = detector.stream(iter(video), **options)
            for result in track(results, path.name, video.num_frames):
                writer.add(_picture(result, show))
                time = len(frames) / video.frames_per_second
                frames.append({"time_s": round(time, 3), **result.to_dict(), "image": f"frame {len(frames)}"})
    return {"video": str(path), "written": str(target.relative_to(folder.parent)), "frames": frames}
