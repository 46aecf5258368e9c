"""Exported graphs give the detections of the detector for any batch size and every budget."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.export import ExportedProgram

from ats_detr.budgets import Budget, MeanBudget
from ats_detr.cli import main
from ats_detr.data.transforms import resized_size
from ats_detr.detector import Detector
from ats_detr.errors import UserError
from ats_detr.export import export_file, export_program
from tests.small_detector import save_small_detector, small_detector

SIZE = (64, 96)
TOLERANCE = 1e-3
"""Absolute, of boxes in pixels and of scores. The difference is float32 rounding: 3e-7 for values in 0..1."""


@pytest.fixture(scope="module")
def detector() -> Detector:
    return small_detector()


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Coarse patterns of different sizes that evaluation pads to 64 x 96."""
    random = np.random.default_rng(4)
    sizes = [(96, 64), (80, 60), (90, 70), (640, 480), (66, 64)]
    patterns = [random.integers(0, 256, (2, 2, 3), dtype=np.uint8) for _ in sizes]
    return [Image.fromarray(pattern).resize(size) for pattern, size in zip(patterns, sizes, strict=True)]


def prepared(images: list[Image.Image], detector: Detector) -> dict[str, np.ndarray]:
    """Preprocessing by a user of the graph, with Pillow and numpy only."""
    batch = np.full((len(images), 3, *SIZE), 77, np.uint8)  # the content of padding is arbitrary
    sizes = np.zeros((len(images), 2), np.int64)
    for i, image in enumerate(images):
        height, width = resized_size(
            (image.height, image.width), detector.config.data.short_side, detector.config.data.long_side
        )
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        batch[i, :, :height, :width] = pixels.transpose(2, 0, 1)
        sizes[i] = height, width
    return {"images": batch, "sizes": sizes}


def run(program: ExportedProgram, images: list[Image.Image], detector: Detector) -> list[np.ndarray]:
    inputs = prepared(images, detector)
    outputs = program.module()(torch.from_numpy(inputs["images"]), torch.from_numpy(inputs["sizes"]))
    return [output.numpy() for output in outputs]


def assert_as_predicted(
    outputs: list[np.ndarray], images: list[Image.Image], detector: Detector, budget: Budget = "auto"
) -> None:
    boxes, scores, labels, kept = outputs
    results = detector.predict(images, threshold=0, budget=budget)
    for i, (image, result) in enumerate(zip(images, results, strict=True)):
        scale = np.array([image.width, image.height] * 2)
        np.testing.assert_allclose(boxes[i] * scale, result.boxes_xyxy, atol=TOLERANCE)
        np.testing.assert_allclose(scores[i], result.scores, atol=TOLERANCE)
        assert labels[i].tolist() == result.labels.tolist()
        assert kept[i] == result.budget.num_kept_tokens


@pytest.fixture(scope="module")
def onnx_file(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("export")
    detector.save(folder / "model")
    main(["export", str(folder / "model"), str(folder / "model.onnx"), "--size", "64x96"])
    return folder / "model.onnx"


def test_onnxruntime_gives_equal_detections_for_single_images_and_batches(
    onnx_file: Path, detector: Detector, images: list[Image.Image]
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    assert len({result.budget.budget_class for result in detector.predict(images)}) == 2, (
        "both budgets are tested"
    )
    for chosen in (images, images[:1], images[3:], images[::-1]):
        assert_as_predicted(session.run(None, prepared(chosen, detector)), chosen, detector)


def test_the_onnx_file_contains_classes_and_sizes(onnx_file: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    facts = json.loads(session.get_modelmeta().custom_metadata_map["ats_detr"])
    assert facts == {
        "classes": {"0": "cup", "1": "cat", "2": "kite"},
        "short_side": 64,
        "long_side": 128,
        "padded_size": list(SIZE),
    }
    assert [value.name for value in session.get_inputs()] == ["images", "sizes"]
    assert [value.name for value in session.get_outputs()] == ["boxes", "scores", "labels", "kept"]


def test_a_saved_program_contains_no_custom_operator_and_gives_equal_detections(
    detector: Detector, images: list[Image.Image], tmp_path: Path
) -> None:
    export_file(detector, tmp_path / "model.pt2", SIZE)
    facts = {"ats_detr.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=facts)
    assert json.loads(facts["ats_detr.json"])["padded_size"] == list(SIZE)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets
    assert not any("ats_detr" in target or "triton" in target for target in targets)
    for chosen in (images, images[:1]):
        assert_as_predicted(run(program, chosen, detector), chosen, detector)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one budget", "proposals", "dense", "one stage"])
def test_every_family_exports(kind: str, images: list[Image.Image]) -> None:
    fixed = {"keep_ratio": 0.3, "min_ratio": None, "max_ratio": None, "min_tokens": 0}
    one_stage = {
        "selector": None,
        "encoder_auxiliary": False,
        "two_stage": False,
        "queries_from_memory": False,
    }
    changes = {
        "one budget": {"selector": fixed},
        "proposals": {"selector": {**fixed, "scores": "proposals"}},
        "dense": {"selector": None, "encoder_auxiliary": False},
        "one stage": {**one_stage, "class_specific_proposals": False, "box_refine": False},
    }[kind]
    detector = small_detector(**changes)
    program = export_program(detector, SIZE)
    assert_as_predicted(run(program, images, detector), images, detector)


@pytest.mark.slow
def test_a_fixed_ratio_applies_to_all_images(detector: Detector, images: list[Image.Image]) -> None:
    """A graph with a capacity of this ratio gives the detections of `predict` at it."""
    program = export_program(detector, SIZE, budget=0.2)
    outputs = run(program, images, detector)
    assert_as_predicted(outputs, images, detector, budget=0.2)
    valid = [result.budget.num_valid_tokens for result in detector.predict(images)]
    assert outputs[3].tolist() == [int(number * 0.2) + 1 for number in valid]


@pytest.mark.slow
def test_the_cost_of_a_mean_is_part_of_the_graph(images: list[Image.Image]) -> None:
    """The images have another mix of budgets than as trained."""
    detector = small_detector()
    means = detector.calibrate(images).mean_keep_ratios
    as_trained = detector.calibration.mean_of(0.0)
    budget = MeanBudget(next(mean for mean in means[1:-1] if abs(mean - as_trained) > 0.01))
    outputs = run(export_program(detector, SIZE, budget=budget), images, detector)
    assert_as_predicted(outputs, images, detector, budget=budget)
    assert len(set(outputs[3].tolist())) > 1


def test_invalid_arguments_raise_user_errors(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.onnx or \.pt2"):
        export_file(detector, tmp_path / "model.engine")
    with pytest.raises(UserError, match="export size = 60x96: must be multiples of 32"):
        export_program(detector, (60, 96))
    with pytest.raises(UserError, match="max_detections = 0: must be >= 1"):
        export_file(detector, tmp_path / "model.onnx", SIZE, max_detections=0)
    with pytest.raises(UserError, match=r"budget = 1\.5"):
        export_program(detector, SIZE, budget=1.5)
    path = save_small_detector(tmp_path / "model")
    with pytest.raises(SystemExit):
        main(["export", str(path), str(tmp_path / "a.onnx"), "--size", "large"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write it"):
        export_file(detector, tmp_path / "file" / "model.pt2", SIZE)
