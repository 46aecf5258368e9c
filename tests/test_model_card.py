"""The model card of a saved folder: its content, and whose file it is."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import yaml

from ats_detr.detector import Detector
from tests.small_detector import small_detector


def test_the_card_describes_the_detector_and_its_python_runs(tmp_path: Path) -> None:
    detector = small_detector()
    detector.facts |= {
        "metrics": {"AP": 0.4321, "AP50": 0.6, "APs": float("nan"), "mean_keep_ratio": 0.15},
        "epoch": 12,
        "train_seconds": 600.0,
        "training_images": {"number": 340, "digest": "0"},
    }
    detector.save(tmp_path / "m")
    text = (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "object-detection"
    for name, category_id in zip(detector.classes.names, detector.classes.category_ids, strict=True):
        assert re.search(rf"\| {category_id} \| .*{name[:1]}", body)
    for part in ("0.432", "15.0%", "12 epochs on 340 images, in 10 minutes", "of the tokens"):
        assert part in body
    assert "nan" not in body
    code = re.search(r"```python\n(.*?)```", body, re.DOTALL)
    assert code is not None
    source = (
        code[1].replace('"FOLDER"', repr(str(tmp_path / "m"))).replace('detector.predict("images/")', "[]")
    )
    exec(compile(source, "card", "exec"), {})
    assert Detector.from_checkpoint(tmp_path / "m", device="cpu").classes == detector.classes


def test_names_of_classes_have_no_effect_and_changed_cards_are_kept(tmp_path: Path) -> None:
    detector = small_detector()
    detector.classes = replace(detector.classes, names=("a|b", "<script>", *detector.classes.names[2:]))
    detector.save(tmp_path)
    card = tmp_path / "README.md"
    assert r"a\|b" in card.read_text() and r"\<script\>" in card.read_text()
    written = card.read_text()
    detector.save(tmp_path)
    assert card.read_text() == written
    card.write_text("mine")
    detector.save(tmp_path)
    assert card.read_text() == "mine"
