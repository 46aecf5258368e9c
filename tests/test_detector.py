"""`Detector` gives the detections of the evaluation, for all image types."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import resource
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ats_detr import Detector
from ats_detr.checkpoint import resolve_checkpoint
from ats_detr.data.coco import CocoDetection
from ats_detr.data.images import ImageFileError
from ats_detr.data.loader import EvaluationLoader
from ats_detr.data.synthetic import synthetic_dataset
from ats_detr.detector import Result
from ats_detr.errors import UserError
from ats_detr.evaluation import MAX_DETECTIONS, DetectionTable, evaluate
from ats_detr.model.output import top_detections
from tests.small_detector import CLASSES, save_small_detector, small_detector


@pytest.fixture(scope="module")
def detector() -> Detector:
    return small_detector()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDetection:
    """31 images of many aspect ratios."""
    root = synthetic_dataset(
        tmp_path_factory.mktemp("synthetic"),
        num_train=31,
        num_val=1,
        image_size=64,
        max_aspect_ratio=2.5,
        max_objects=5,
        num_classes=3,
    )
    return CocoDetection(root / "train2017", root / "annotations/instances_train2017.json")


@pytest.fixture(scope="module")
def paths(dataset: CocoDetection) -> list[Path]:
    return [dataset.path(index) for index in range(len(dataset))]


@pytest.fixture(scope="module")
def results(detector: Detector, paths: list[Path]) -> list[Result]:
    return detector.predict(paths, threshold=0)


def assert_same(one: Result, other: Result, tolerance: float = 0.0) -> None:
    assert one.size == other.size
    assert one.budget == other.budget
    np.testing.assert_allclose(one.scores, other.scores, atol=tolerance)
    if tolerance == 0:
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.boxes_xyxy, other.boxes_xyxy)


# ------------------------------------------------------------------------------------------- parity with evaluation
def test_detections_and_budgets_are_those_of_the_evaluation(
    detector: Detector, dataset: CocoDetection, results: list[Result]
) -> None:
    """Bit-equal, image by image: the loader decodes, resizes, pads and batches; `top_detections` postprocesses."""
    data = detector.config.data
    loader = EvaluationLoader(
        dataset, short_side=data.short_side, long_side=data.long_side, size_multiple=data.size_multiple
    )
    seen = 0
    with torch.no_grad():
        for batch, targets in loader:
            output = detector.model(batch, supervision=False)
            found = top_detections(output.last, [t.original_size for t in targets], MAX_DETECTIONS)
            (index,) = dataset.annotations.indices_of([t.image_id for t in targets])
            evaluated = DetectionTable.from_batch([index], found, CLASSES).to_coco(dataset.annotations)
            assert results[index].to_coco(targets[0].image_id) == evaluated
            seen += 1
    assert seen == len(dataset)
    metrics = evaluate(detector.model, _relabelled(loader), "cpu")
    assert [r.keep_ratio for r in metrics.images] == [r.budget.keep_ratio for r in results]


def _relabelled(loader: EvaluationLoader) -> EvaluationLoader:
    # The synthetic classes have different ids; budgets do not depend on them.
    loader.dataset.class_map = CLASSES
    return loader


def test_the_budgets_of_the_test_images_differ(results: list[Result]) -> None:
    assert len({result.budget.budget_class for result in results}) == 2
    assert all(len(result) for result in results)


@pytest.mark.parametrize("batch_size", [2, 7])
def test_detections_do_not_depend_on_batches_and_order(
    detector: Detector, paths: list[Path], results: list[Result], batch_size: int
) -> None:
    order = np.random.default_rng(batch_size).permutation(len(paths))
    shuffled = detector.predict([paths[i] for i in order], threshold=0, batch_size=batch_size)
    for place, result in zip(order, shuffled, strict=True):
        assert result.name == str(paths[place])
        assert_same(result, results[place], tolerance=2e-5)  # products of different shapes round differently


def test_a_compiled_detector_detects_the_same(paths: list[Path], results: list[Result]) -> None:
    compiled = small_detector().compile()
    for one, other in zip(compiled.predict(paths, threshold=0.0), results, strict=True):
        assert_same(one, other, tolerance=1e-3)
    assert compiled.compiled is not None and len(compiled.compiled.warm_up_seconds) >= 1


def test_a_compiled_detector_can_be_copied_and_pickled(paths: list[Path]) -> None:
    """Also after use. Its lock and its CUDA graphs are not copied; a copy creates its own."""
    compiled = small_detector().compile(dtype=torch.bfloat16, max_graphs=3)
    (expected,) = compiled.predict(paths[0], threshold=0)
    for other in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert other.compiled is not None and other.compiled is not compiled.compiled
        assert (other.compiled.dtype, other.compiled.max_graphs) == (torch.bfloat16, 3)
        (result,) = other.predict(paths[0], threshold=0)
        assert_same(result, expected)
        assert other.compiled.warm_up_seconds


def test_threads_give_equal_results_and_leak_no_memory(detector: Detector) -> None:
    """200 random images of random sizes, distributed over four threads."""
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (*random.integers(20, 90, 2), 3), dtype=np.uint8) for _ in range(200)]
    serial = detector.predict(images, threshold=0)

    def work(number: int, found: dict[int, Result]) -> None:
        own = range(number, len(images), 4)
        found.update(zip(own, detector.predict([images[i] for i in own], threshold=0), strict=True))

    def once() -> dict[int, Result]:
        found: dict[int, Result] = {}
        threads = [threading.Thread(target=work, args=(number, found)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    found = once()
    for place, expected in enumerate(serial):
        assert_same(found[place], expected)
    del found
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_objects, num_threads = len(gc.get_objects()), threading.active_count()
    once()
    gc.collect()
    assert threading.active_count() == num_threads
    assert len(gc.get_objects()) < num_objects + 100, "no objects are kept per image"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 50_000, "kilobytes"


def test_prediction_does_not_change_the_random_state(detector: Detector, paths: list[Path]) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    detector.predict(paths[0])
    assert torch.equal(torch.rand(3), expected)


# ------------------------------------------------------------------------------------------------------- image types
def test_paths_folders_pil_images_arrays_and_tensors_give_equal_results(
    detector: Detector, paths: list[Path], results: list[Result], tmp_path: Path
) -> None:
    (tmp_path / "a.jpg").write_bytes(paths[0].read_bytes())
    (tmp_path / "notes.txt").write_text("no image")
    image = Image.open(paths[0]).convert("RGB")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    sources = (
        paths[0], str(paths[0]), tmp_path, image, array, array[None], array.astype(np.float32) / 255,
        tensor, tensor.float() / 255, tensor[None],
    )  # fmt: skip
    for source in sources:
        (result,) = detector.predict(source, threshold=0)
        assert_same(result, results[0])


def test_a_mixed_list_keeps_its_order_and_names(detector: Detector, paths: list[Path]) -> None:
    image = Image.open(paths[1])
    mixed = detector.predict([paths[0], image, np.zeros((30, 40), np.uint8)], threshold=0)
    assert [result.name for result in mixed] == [str(paths[0]), "image 1", "image 2"]
    assert mixed[2].size == (30, 40)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((3, 20, 30), np.uint8), r"image 0: an array of shape \(3, 20, 30\)"),
        (np.full((20, 30, 3), 300.0), r"must be in \[0, 1\]"),
        (np.full((20, 30, 3), np.nan), r"must be in \[0, 1\]"),
        (np.zeros((20, 30, 3), np.int64), "pixels of type int64"),
        (torch.zeros(20, 30, 3), r"shape \(20, 30, 3\); must be \[3, height, width\]"),
        ("https://example.com/a.jpg", "allow_urls=True"),
        ([3], "image 0: a int|int"),
    ],
)
def test_unsupported_images_raise_errors_with_the_fix(detector: Detector, source, message: str) -> None:
    with pytest.raises(UserError, match=message):
        detector.predict(source)


def test_unreadable_files_raise_or_are_reported(
    detector: Detector, paths: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(paths[0].read_bytes()[:300])
    with pytest.raises(ImageFileError, match="broken.jpg"):
        detector.predict([paths[0], broken])
    bad: list[ImageFileError] = []
    found = detector.predict([broken, paths[0], tmp_path / "gone.png"], on_bad_image=bad.append)
    assert [result.name for result in found] == [str(paths[0])]
    assert [str(error).split(": ")[0] for error in bad] == [
        f"image {broken} cannot be read",
        f"image {tmp_path}/gone.png does not exist",
    ]


def test_an_empty_folder_is_reported(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there are no images in it \(.*\.jpg"):
        detector.predict(tmp_path)
    assert detector.predict([]) == []


def test_images_are_rotated_by_their_exif_orientation_unless_upright_is_false(
    detector: Detector, paths: list[Path], results: list[Result], tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed after a clockwise rotation by 90 degrees
    image = Image.open(paths[0]).convert("RGB")
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    (upright,) = detector.predict(tmp_path / "turned.png", threshold=0)
    assert_same(upright, results[0])
    assert upright.image().size == image.size
    (stored,) = detector.predict(tmp_path / "turned.png", threshold=0, upright=False)
    assert stored.size == upright.size[::-1]
    data = dataclasses.replace(detector.config.data, exif="stored")
    trained_on_stored = Detector(
        detector.model, dataclasses.replace(detector.config, data=data), detector.classes
    )
    (default,) = trained_on_stored.predict(tmp_path / "turned.png", threshold=0)
    assert_same(default, stored)
    assert stored.image().size == image.size[::-1]


# ------------------------------------------------------------------------------------------------------- the results
def test_threshold_and_max_detections_truncate_the_same_list(
    detector: Detector, paths: list[Path], results
) -> None:
    everything = results[0]
    middle = float(np.median(everything.scores))
    (cut,) = detector.predict(paths[0], threshold=middle)
    assert 0 < len(cut) < len(everything)
    np.testing.assert_array_equal(cut.scores, everything.scores[everything.scores >= middle])
    (five,) = detector.predict(paths[0], threshold=0, max_detections=5)
    np.testing.assert_array_equal(five.boxes_xyxy, everything.boxes_xyxy[:5])


def test_the_fields_of_a_result_are_consistent(results: list[Result]) -> None:
    result = results[3]
    number = len(result)
    assert result.boxes_xyxy.shape == (number, 4)
    assert (np.diff(result.scores) <= 0).all()
    assert [CLASSES.name_of_row(row) for row in result.labels] == list(result.names)
    assert set(result.category_ids.tolist()) <= {3, 5, 9}
    content = result.to_dict()
    assert (content["height"], content["width"]) == result.size
    assert content["objects"][0]["name"] == result.names[0]
    assert content["kept_tokens"] == result.budget.num_kept_tokens


def test_supervision_gets_the_same_boxes(results: list[Result]) -> None:
    pytest.importorskip("supervision")
    found = results[0].to_supervision()
    np.testing.assert_array_equal(found.xyxy, results[0].boxes_xyxy)
    assert found.data["class_name"].tolist() == list(results[0].names)
    assert len(found[found.confidence > 2]) == 0


def test_the_number_of_kept_tokens_equals_the_budget_and_none_is_padding(
    detector: Detector, paths: list[Path]
) -> None:
    for result in detector.predict(paths[:6], keep_tokens=True, batch_size=3):
        kept = result.kept_tokens
        assert kept is not None
        assert sum(level.sum() for level in kept.levels) == result.budget.num_kept_tokens
        inside = [kept.in_image(level) for level in range(len(kept.levels))]
        assert sum(level.sum() for level in inside) == result.budget.num_kept_tokens
        assert sum(level.size for level in inside) == result.budget.num_valid_tokens


def test_dense_models_have_no_mask_of_kept_tokens(paths: list[Path]) -> None:
    (result,) = small_detector(selector=None, encoder_auxiliary=False).predict(paths[0], keep_tokens=True)
    assert result.kept_tokens is None
    assert result.budget.keep_ratio == 1


def test_draw_reads_the_image_again(detector: Detector, paths: list[Path]) -> None:
    (result,) = detector.predict(paths[0], threshold=0, max_detections=2)
    picture = result.draw()
    factor = picture.width // result.size[1]
    assert picture.size == (result.size[1] * factor, result.size[0] * factor)
    assert result.draw(min_score=1.1).tobytes() != picture.tobytes()


# ------------------------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("name", ["model", "model.safetensors", "model.pt"])
def test_a_saved_detector_detects_the_same(
    detector: Detector, paths: list[Path], results: list[Result], tmp_path: Path, name: str
) -> None:
    detector.save(tmp_path / name)
    loaded = Detector.from_checkpoint(tmp_path / name, device="cpu")
    assert loaded.config == detector.config
    assert loaded.classes == detector.classes
    (result,) = loaded.predict(paths[0], threshold=0)
    assert_same(result, results[0])


def test_a_run_is_found_by_folder_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "mine"
    save_small_detector(run / "weak" / "final.pt")
    with pytest.raises(UserError, match=r"mine: no checkpoint; must be a file"):
        resolve_checkpoint(run)
    student = save_small_detector(run / "student" / "final.pt")
    assert resolve_checkpoint(run) == student
    single = save_small_detector(run / "final.pt")
    with pytest.raises(UserError, match=f"two finished runs; choose {student} or {single}, or delete one"):
        resolve_checkpoint(run)
    single.unlink()
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("mine") == Path("runs/mine/student/final.pt")
    assert resolve_checkpoint("mine/weak") == Path("runs/mine/weak/final.pt")
    assert isinstance(Detector.from_checkpoint("mine/weak", device="cpu"), Detector)


def test_an_incomplete_model_folder_is_reported(tmp_path: Path) -> None:
    folder = save_small_detector(tmp_path / "model")
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"model\.safetensors: not a checkpoint \("):
        Detector.from_checkpoint(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="model"):
        Detector.from_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="no checkpoint"):
        Detector.from_checkpoint(folder)


@pytest.mark.parametrize("name", ["input_proj.0.0.weight", "decoder_heads.1.box.0.weight"])
def test_outputs_that_are_not_finite_are_an_error(name: str) -> None:
    """Weights may be finite and overflow: NaN scores are below every threshold, so nothing would be found."""
    detector = small_detector()
    weight = detector.model.get_parameter(name)
    with torch.no_grad():
        weight.copy_(weight.sign() * 3e38)
    with pytest.raises(UserError, match=r"image 0: the scores or boxes of the model are not finite"):
        detector.predict([Image.new("RGB", (64, 64), "green")])
