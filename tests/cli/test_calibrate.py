"""`ats-detr calibrate` adds the calibration to a checkpoint of any format, and a failure leaves the checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ats_detr import Detector, MeanBudget, UserError
from ats_detr.budgets import Calibration
from ats_detr.checkpoint import SHIPPED, add_to_checkpoint, load_checkpoint
from ats_detr.cli import main
from ats_detr.data.images import images_in
from tests.small_detector import SMALL, save_small_detector, small_detector
from tests.test_budgets import pictures
from tests.test_convert import ADAPTIVE, official_state, small_config


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number, pixels in enumerate(pictures(12)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "folder"])
def test_every_format_keeps_its_content_and_gets_the_calibration(
    name: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_small_detector(tmp_path / name)
    before = load_checkpoint(path)
    weights = (path / "model.safetensors").stat().st_mtime_ns if path.is_dir() else None
    main(["calibrate", str(path), str(images), "--batch-size", "4"])
    assert "calibrated on 12 images; mean budgets of" in capsys.readouterr().out
    after = load_checkpoint(path)
    calibration = after.pop("budget_calibration")
    state, old_state = after.pop("model"), before.pop("model")
    assert after == before
    assert all(torch.equal(tensor, state[key]) for key, tensor in old_state.items())
    assert path.is_file() or (path / "model.safetensors").stat().st_mtime_ns == weights

    detector = Detector.from_checkpoint(path, budget=MeanBudget(0.45))
    expected = small_detector().calibrate(images_in(images), batch_size=4)
    assert detector.calibration == expected and expected.to_dict() == calibration
    kept = [result.budget.keep_ratio for result in detector.predict(images)]
    assert np.mean(kept) == pytest.approx(0.45, rel=0.05)
    main(
        [
            "predict",
            str(images),
            "--checkpoint",
            str(path),
            "--budget",
            "mean:0.45",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert f"on average {np.mean(kept):.1%} of the tokens kept" in capsys.readouterr().out
    detector.save(tmp_path / "copy.pt")
    assert Detector.from_checkpoint(tmp_path / "copy.pt").calibration == expected


def test_the_weights_of_a_folder_stand_for_the_folder(images: Path, tmp_path: Path) -> None:
    folder = save_small_detector(tmp_path / "folder")
    main(["calibrate", str(folder / "model.safetensors"), str(images)])
    assert Detector.from_checkpoint(folder).calibration is not None


def test_conversion_to_a_folder_keeps_the_calibration(images: Path, tmp_path: Path) -> None:
    path = save_small_detector(tmp_path / "model.pt")
    main(["calibrate", str(path), str(images)])
    main(["convert", str(path), str(tmp_path / "folder")])
    assert Detector.from_checkpoint(tmp_path / "folder").calibration is not None


@pytest.mark.parametrize("name", ["model.pt", "folder"])
def test_a_failed_write_leaves_the_checkpoint(
    name: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_small_detector(tmp_path / name)
    files = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    before = [file.read_bytes() for file in files]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ats_detr.files.os.fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        main(["calibrate", str(path), str(images)])
    assert sorted(file for file in tmp_path.rglob("*") if file.is_file()) == files
    assert [file.read_bytes() for file in files] == before


def test_published_and_fetched_checkpoints_are_not_changed(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "official.pth"
    torch.save({"model": official_state(small_config(selector=ADAPTIVE))}, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"convert it first: ats-detr convert {path}"):
        main(["calibrate", str(path), str(images)])
    assert path.read_bytes() == before
    shipped = [
        name for folder in SHIPPED.iterdir() for name in (folder.name, str(folder / "model.safetensors"))
    ]
    for name in ("hf://owner/repo", *shipped):
        with pytest.raises(UserError, match=f"is not changed; make a copy first: ats-detr convert {name}"):
            main(["calibrate", name, str(images)])


def test_unreadable_images_are_skipped_with_exit_code_1(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_small_detector(tmp_path / "model.pt")
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(SystemExit) as end:
        main(["calibrate", str(path), str(images), str(tmp_path / "broken.png")])
    printed = capsys.readouterr()
    assert end.value.code == 1
    assert "broken.png" in printed.err and "calibrated on 12 images" in printed.out


@pytest.mark.parametrize(
    "content",
    [
        {"costs": [0.0]},
        {"ratios": [0.1, 0.2], "costs": [0.0, "1"], "mean_keep_ratios": [0.2, 0.1], "num_images": 3},
        {"ratios": [0.1, 0.2], "costs": [0.0], "mean_keep_ratios": [0.2, 0.1], "num_images": 3},
        {"ratios": [0.1, 0.2], "costs": [float("nan")], "mean_keep_ratios": [0.2], "num_images": 3},
        [1.0],
    ],
)
def test_a_malformed_calibration_is_a_user_error(content: object, tmp_path: Path) -> None:
    path = save_small_detector(tmp_path / "model.pt")
    add_to_checkpoint({"budget_calibration": content}, path)
    with pytest.raises(UserError, match=r"model\.pt: .*invalid content under 'budget_calibration'"):
        load_checkpoint(path)


@pytest.mark.slow
def test_a_model_that_is_trained_from_a_calibrated_one_is_not_calibrated(tmp_path: Path) -> None:
    path = save_small_detector(tmp_path / "model.pt")
    add_to_checkpoint({"budget_calibration": Calibration((0.3, 0.6), (0.0,), (0.4,), 1).to_dict()}, path)
    settings = [setting for setting in SMALL if "min_tokens" not in setting]
    places = [f"output_dir={tmp_path / 'run'}", f"data.root={tmp_path / 'data'}"]
    main(["train", "--config", "quickstart_weak", *settings, *places, f"train.init_from={path}"])
    (trained,) = (tmp_path / "run").rglob("final.pt")
    assert "budget_calibration" in load_checkpoint(path)
    assert "budget_calibration" not in load_checkpoint(trained)


def test_what_cannot_be_calibrated_with_is_named(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_small_detector(tmp_path / "model.pt")
    (tmp_path / "film.mp4").touch()
    for other in (str(tmp_path / "film.mp4"), "https://example.org/photo.jpg"):
        with pytest.raises(UserError, match=f"{Path(other).name}: calibration needs image files"):
            main(["calibrate", str(path), str(images), other])
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="no images to calibrate with"):
        main(["calibrate", str(path), str(tmp_path / "broken.png")])
    assert "broken.png" in "".join(capsys.readouterr())
    assert Detector.from_checkpoint(path).calibration is None
