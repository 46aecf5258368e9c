"""`ats-detr predict` and `info` on unusual input: odd images are handled, unreadable ones reported and skipped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ats_detr.cli import main
from ats_detr.data.images import decode_image
from ats_detr.detector import Detector, Result
from ats_detr.errors import UserError
from tests.small_detector import save_small_detector


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_detector(tmp_path_factory.mktemp("checkpoint") / "model")


def noise(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width * height)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder with unusual images and one plain photograph."""
    folder = tmp_path / "odd"
    folder.mkdir()
    image = noise(90, 60)
    image.save(folder / "plain.jpg")
    image.convert("L").save(folder / "grey.jpg")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("RGBA").save(folder / "alpha.png")
    image.convert("P").save(folder / "palette.png")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) << 8).save(folder / "sixteen.png")
    image.save(folder / "animated.gif", save_all=True, append_images=[noise(90, 60)], loop=0)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif)
    noise(1, 1).save(folder / "one.png")
    noise(10000, 50).save(folder / "wide.png")
    (folder / "broken.jpg").write_bytes((folder / "plain.jpg").read_bytes()[:700])
    (folder / "lying.png").write_text("this is no image")
    (folder / "notes.txt").write_text("nor is this")
    (folder / "._plain.jpg").write_text("what a Mac leaves beside plain.jpg")
    return folder


GOOD = {
    "plain.jpg": (90, 60), "grey.jpg": (90, 60), "cmyk.jpg": (90, 60), "alpha.png": (90, 60), "palette.png": (90, 60),
    "sixteen.png": (90, 60), "animated.gif": (90, 60), "turned.jpg": (60, 90), "one.png": (1, 1),
    "wide.png": (10000, 50),
}  # fmt: skip


def test_unusual_images_are_processed_or_reported(
    model: Path, odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        main(["predict", str(odd), "--checkpoint", str(model), "--out", str(out), "--threshold", "0"])
    assert end.value.code == 1, "something was named"
    said = capsys.readouterr()
    assert [line.split(" cannot")[0] for line in said.err.splitlines()] == [
        f"error: image {odd / 'broken.jpg'}",
        f"error: image {odd / 'lying.png'}",
    ]
    assert "ignored 1 files that are neither images nor videos: notes.txt" in said.out
    assert "10 images, 2 failed" in said.out
    written = json.loads((out / "predictions.json").read_text())
    sizes = {Path(image["image"]).name: (image["width"], image["height"]) for image in written["images"]}
    assert sizes == GOOD
    assert len(written["failed"]) == 2
    for image in written["images"]:
        assert image["objects"]
        for picture in image["pictures"]:
            assert max(Image.open(out / picture).size) <= 10000
    assert (out / "gallery.html").stat().st_size > 20_000


def test_sixteen_bit_pixels_are_scaled_not_clipped(model: Path, odd: Path) -> None:
    """Grey values times 256 give the 8-bit image again."""
    detector = Detector.from_checkpoint(model, device="cpu")
    (sixteen,) = detector.predict(odd / "sixteen.png", threshold=0)
    grey = np.asarray(Image.open(odd / "plain.jpg").convert("L")).astype(int)
    assert abs(np.asarray(sixteen.image())[..., 0].astype(int) - grey).mean() < 40


def test_success_has_exit_code_0_and_show_selects_the_pictures(
    model: Path, odd: Path, tmp_path: Path
) -> None:
    for show, kinds in (("boxes", ["plain.jpg"]), ("tokens", ["plain_tokens.jpg"])):
        out = tmp_path / show
        main(
            ["predict", str(odd / "plain.jpg"), "--checkpoint", str(model), "--out", str(out), "--show", show]
        )
        assert [path.name for path in (out / "pictures").iterdir()] == kinds


def test_files_of_one_name_do_not_overwrite_each_other(model: Path, odd: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    noise(50, 40).save(tmp_path / "other" / "plain.jpg")
    paths = [str(odd / "plain.jpg"), str(tmp_path / "other")]
    main(["predict", *paths, "--checkpoint", str(model), "--out", str(tmp_path / "out"), "--show", "boxes"])
    assert {path.name for path in (tmp_path / "out/pictures").iterdir()} == {"plain.jpg", "plain_2.jpg"}


def test_a_name_with_the_suffix_of_token_pictures_overwrites_nothing(model: Path, tmp_path: Path) -> None:
    for name in ("a.png", "a_tokens.png"):
        noise(50, 40).save(tmp_path / name)
    out = tmp_path / "out"
    main(["predict", str(tmp_path), "--checkpoint", str(model), "--out", str(out)])
    written = json.loads((out / "predictions.json").read_text())["images"]
    pictures = [picture for image in written for picture in image["pictures"]]
    assert len({*pictures}) == 4
    assert {str(path.relative_to(out)) for path in (out / "pictures").iterdir()} == {*pictures}


def test_a_format_is_known_to_every_thread_from_the_start() -> None:
    """Pillow's lazy loading of formats is not thread-safe: a thread may miss formats that another is loading."""
    code = "import ats_detr.data.images\nfrom PIL import Image\nassert {'WEBP', 'TIFF'} <= {*Image.OPEN}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.jpg"], "gone.jpg: no such file or folder"),
        (["."], "contains no images or videos"),
        (["http://localhost:1/a.jpg"], "allow_urls=True"),
        (["plain.png", "--threshold", "40"], r"threshold = 40\.0: must be in"),
        (["plain.png", "--threshold", "nan"], "threshold = nan"),
        (["plain.png", "--batch-size", "0"], "batch_size = 0: must be in 1..1000000"),
        (["plain.png", "--max-detections", "0"], "max_detections = 0: must be in 1..1000000"),
    ],
)
def test_errors_are_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if "plain.png" in arguments:
        noise(20, 20).save("plain.png")
    with pytest.raises(UserError, match=message):
        main(["predict", *arguments, "--checkpoint", str(model)])
    with pytest.raises(SystemExit):
        main(["predict", *arguments, "--checkpoint", str(model), "--show", "everything"])


def test_an_unreachable_url_is_reported(model: Path, tmp_path: Path, capsys) -> None:
    url = "http://localhost:1/a.jpg"
    with pytest.raises(SystemExit) as end:
        main(["predict", url, "--checkpoint", str(model), "--out", str(tmp_path), "--allow-urls"])
    assert end.value.code == 1
    assert f"image {url} cannot be fetched" in capsys.readouterr().err


def test_a_file_is_decoded_once_to_detect_and_once_to_draw(
    model: Path, odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []

    def decode(encoded: bytes, name: str, **options: bool) -> Image.Image:
        decoded.append(Path(name).name)
        return decode_image(encoded, name, **options)

    monkeypatch.setattr("ats_detr.data.images.decode_image", decode)
    paths = [str(odd / name) for name in ("turned.jpg", "grey.jpg")]
    main(["predict", *paths, "--checkpoint", str(model), "--out", str(tmp_path / "out")])
    assert sorted(decoded) == ["grey.jpg", "grey.jpg", "turned.jpg", "turned.jpg"]
    tall = Image.open(tmp_path / "out" / "pictures" / "turned.jpg")
    assert tall.height > tall.width, "turned upright, and not twice"


def test_files_that_become_unreadable_do_not_end_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is deleted before its picture is drawn, and a video without PyAV."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (96, 64), "red").save(folder / name)
    (folder / "clip.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    read = Result.image

    def read_unless_gone(result: Result) -> Image.Image:
        if result.name.endswith("a.png"):
            Path(result.name).unlink(missing_ok=True)
        return read(result)

    monkeypatch.setattr(Result, "image", read_unless_gone)
    arguments = ["predict", str(folder), "--checkpoint", str(model), "--out", str(out)]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1
    written = json.loads((out / "predictions.json").read_text())
    assert [Path(image["image"]).name for image in written["images"]] == ["b.png"]
    assert "a.png" in written["failed"][0] and "needs PyAV" in written["failed"][1]
    assert (out / "gallery.html").is_file()


def test_a_video_has_boxes_and_a_list_of_frames(model: Path, tmp_path: Path, capsys) -> None:
    av = pytest.importorskip("av")
    from ats_detr.data.video import VideoWriter

    source = tmp_path / "clip.mp4"
    with VideoWriter(source, 12.5) as writer:
        for _ in range(5):
            writer.add(noise(97, 65))
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        main(["predict", str(tmp_path), "--checkpoint", str(model), "--out", str(out), "--threshold", "0"])
    said = capsys.readouterr()
    assert "broken.mp4 cannot be read" in said.err
    assert "0 images and 1 videos, 1 failed" in said.out
    (video,) = json.loads((out / "predictions.json").read_text())["videos"]
    assert [frame["time_s"] for frame in video["frames"]] == [0.0, 0.08, 0.16, 0.24, 0.32]
    assert (video["frames"][0]["width"], video["frames"][0]["height"]) == (96, 64)
    with av.open(str(out / video["written"])) as container:
        assert container.streams.video[0].average_rate == 12.5
        assert len(list(container.decode(video=0))) == 5
    assert [path.name for path in (out / "videos").iterdir()] == ["clip.mp4"]


def test_info_describes_checkpoints_and_configurations(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["info", str(model)])
    text = capsys.readouterr().out
    assert "ATS-DETR, 30% to 60% of the tokens, resnet10t" in text
    assert "keeping 30%" in text
    assert "keeping 60%" in text
    assert "3: cup, cat, kite" in text
    main(["info", "configs/quickstart.yaml", "data.short_side=16000", "data.long_side=16000"])
    assert "multiply-adds  not counted: an image of 16000 x 12000, padded to" in capsys.readouterr().out
    main(["info", "configs/quickstart.yaml"])
    text = capsys.readouterr().out
    assert "ATS-DETR, 3% to 20% of the tokens in 18 budgets, resnet10t" in text
    assert "synthetic, data/quickstart" in text
    with pytest.raises(UserError, match="no checkpoint"):
        main(["info", "gone"])
