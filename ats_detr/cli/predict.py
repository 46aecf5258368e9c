"""Files in, a folder of results out: what `python -m ats_detr predict` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from rich.progress import track

from ats_detr.checkpoint import write_json
from ats_detr.data.images import ImageFileError, images_in, is_url, visible_files
from ats_detr.data.video import VIDEO_SUFFIXES, VideoWriter, read_video
from ats_detr.detector import Detector, Result
from ats_detr.errors import UserError
from ats_detr.gallery import Gallery
from ats_detr.visualize import add_caption, draw_kept_tokens

Shown = Literal["boxes", "tokens", "budget"]
SHOWN: tuple[Shown, ...] = ("boxes", "tokens", "budget")


@dataclass(kw_only=True)
class Inputs:
    """The files behind the paths of a command line."""

    images: list[str] = field(default_factory=list)
    videos: list[Path] = field(default_factory=list)
    ignored: list[Path] = field(default_factory=list)
    """Files of folders that are neither by their suffix."""


@dataclass(kw_only=True)
class Done:
    """What was written, and what could not be read."""

    num_images: int = 0
    num_videos: int = 0
    failures: list[str] = field(default_factory=list)
    """One line for each file that could not be read."""
    keep_ratios: list[float] = field(default_factory=list)
    """Share of the tokens kept of each image; their mean is the evaluation's mean keep ratio."""
    gallery: Path | None = None


def find_inputs(paths: Sequence[str]) -> Inputs:
    """Folders become the files in them, not those of their subfolders. A file that is named is tried whatever its
    suffix. Raises UserError for a path that does not exist, and where nothing is found at all.
    """
    inputs = Inputs()
    for text in paths:
        path = Path(text)
        if is_url(text):
            inputs.images.append(text)
        elif path.is_dir():
            images = images_in(path)
            files = visible_files(path)
            videos = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
            inputs.images += map(str, images)
            inputs.videos += videos
            inputs.ignored += sorted({*files} - {*images, *videos})
        elif path.suffix.lower() in VIDEO_SUFFIXES and path.exists():
            inputs.videos.append(path)
        elif path.exists():
            inputs.images.append(text)
        else:
            raise UserError(f"{text}: there is no such file or folder")
    if not inputs.images and not inputs.videos:
        raise UserError(f"{', '.join(paths)}: there are no images or videos in it")
    return inputs


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
    upright: bool = True,
    allow_urls: bool = False,
    show_progress: bool = False,
) -> Done:
    """Detect objects in all inputs and write `out`.

    It gets predictions.json (every image and every frame of a video, and what failed), gallery.html, pictures/ (boxes
    and budget in one picture, kept tokens in another) and videos/. Files that cannot be read are told in the result;
    the others are done.

    Raises UserError where the folder cannot be written.
    """
    done = Done()
    pictures = out / "pictures"
    try:
        pictures.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot make this folder ({error.strerror})") from None
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
    for result in _track(results, "images", len(inputs.images), show_progress):
        stem = _unused(Path(result.name).stem, stems)
        try:
            decoded = replace(result, source=result.image())  # read once for all that is drawn
        except ImageFileError as error:  # the file may be gone by now
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
            frames = _predict_video(detector, video, out / "videos", stems, show, options, show_progress)
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


def _track(results: Iterator[Result], what: str, total: int | None, show_progress: bool) -> Iterator[Result]:
    yield from track(results, what, total=total, transient=True, disable=not show_progress)


def _unused(stem: str, used: set[str]) -> str:
    """`stem`, or `stem_2`, ...: files of two folders may have one name, and `a_tokens.png` is one beside `a.png`."""
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
    budget, number = result.budget, len(result)
    objects = f"{number} object{'' if number == 1 else 's'}"
    return f"{objects}; keeps {budget.num_kept_tokens} of {budget.num_valid_tokens} tokens ({budget.keep_ratio:.0%})"


def _predict_video(
    detector: Detector,
    path: Path,
    folder: Path,
    stems: set[str],
    show: Sequence[Shown],
    options: dict[str, Any],
    show_progress: bool,
) -> dict[str, Any]:
    """Write the video with boxes; returns its frames for JSON. Raises ImageFileError where it cannot be read."""
    frames: list[dict[str, Any]] = []
    with read_video(path) as video:
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{_unused(path.stem, stems)}.mp4"
        with VideoWriter(target, video.frames_per_second) as writer:
            results = detector.stream(iter(video), **options)
            for result in _track(results, path.name, video.num_frames, show_progress):
                writer.add(_picture(result, show))
                time = len(frames) / video.frames_per_second
                frames.append({"time_s": round(time, 3), **result.to_dict(), "image": f"frame {len(frames)}"})
    return {"video": str(path), "written": str(target.relative_to(folder.parent)), "frames": frames}
