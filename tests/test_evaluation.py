"""Evaluation: the referee's numbers, every image once, and what was spent on it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from ats_detr.batch import ImageBatch
from ats_detr.boxes import xyxy_to_cxcywh
from ats_detr.config import BackboneConfig, ModelConfig, SelectorConfig
from ats_detr.data.coco import ClassMap, CocoAnnotations, CocoDetection, ImageFileError
from ats_detr.data.loader import EvaluationLoader
from ats_detr.data.synthetic import synthetic_dataset
from ats_detr.errors import UserError
from ats_detr.evaluation import DetectionTable, Metrics, average_precision, evaluate, warn_of_limits
from ats_detr.kernels import TokenPlan
from ats_detr.model import CompiledDetr, build_model
from ats_detr.model.output import Detections, DetectorOutput, Prediction, TokenScores

NUM_IMAGES = 21
SIZES = {"short_side": 64, "long_side": 128, "size_multiple": 32}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDetection:
    """21 images of several sizes with 0..8 objects."""
    root = synthetic_dataset(
        tmp_path_factory.mktemp("synthetic"),
        num_train=1,
        num_val=NUM_IMAGES,
        image_size=80,
        max_aspect_ratio=2.0,
        min_objects=0,
        max_objects=8,
    )
    return CocoDetection(root / "val2017", root / "annotations/instances_val2017.json")


class Oracle(nn.Module):
    """A detector that recognises each image by its pixels and answers with its objects, or with nothing.

    Its budget is 1 from four objects on; of ten tokens it keeps 2 or 5. The last two are padding.
    """

    def __init__(self, dataset: CocoDetection, *, blind: bool = False) -> None:
        super().__init__()
        self.num_classes = dataset.class_map.num_rows
        self.answers = {}
        for batch, targets in EvaluationLoader(dataset, **SIZES):
            self.answers[self.key(batch.images_B3HW[0])] = targets[0]
        self.blind = blind

    @staticmethod
    def key(image: torch.Tensor) -> bytes:
        return image.numpy().tobytes()

    def forward(self, batch: ImageBatch, *, supervision: bool) -> DetectorOutput:
        assert not supervision
        assert not self.training
        size = len(batch)
        logits = torch.full((size, 30, self.num_classes), -9.0)
        boxes = torch.full((size, 30, 4), 0.5)
        budget_logits = torch.zeros(size, 2)
        keep = torch.zeros(size, 10, dtype=torch.bool)
        for i in range(size):
            target = self.answers[self.key(batch.images_B3HW[i])]
            count = len(target.labels_N)
            boxes[i, :count] = target.boxes_N4
            if not self.blind:
                logits[i, torch.arange(count), target.labels_N] = 3.0
            budget_logits[i, int(count >= 4)] = 1.0
            keep[i, : 5 if count >= 4 else 2] = True
        if self.blind:
            logits, boxes = logits[:, :0], boxes[:, :0]
        padding = torch.zeros(size, 10, dtype=torch.bool)
        padding[:, 8:] = True
        selection = TokenScores(
            scores_BS=torch.zeros(size, 10),
            num_valid_B=(~padding).sum(1),
            num_kept_B=keep.sum(1),
            budget_logits=budget_logits,
            plan=TokenPlan.from_mask(keep),
            budget_B=budget_logits.argmax(1),
        )
        return DetectorOutput(
            last=Prediction(logits, boxes),
            level_shapes=((2, 5),),
            padding_mask_BS=padding,
            memory_BSC=torch.zeros(size, 10, 4),
            selection=selection,
        )


def test_perfect_detections_have_ap_one_and_records_tell_what_was_spent(dataset):
    metrics = evaluate(Oracle(dataset), EvaluationLoader(dataset, batch_size=4, **SIZES), "cpu")
    assert metrics.precision.ap == pytest.approx(1)
    assert metrics.precision.ap75 == pytest.approx(1)
    assert [r.image_id for r in metrics.images] == list(range(1, NUM_IMAGES + 1))
    for record in metrics.images:
        many = record.num_objects >= 4
        assert record.num_objects == len(dataset.objects(record.image_id - 1)[1])
        assert (record.num_kept_tokens, record.num_valid_tokens) == (5 if many else 2, 8)
        assert record.budget_class == int(many)
    num_many = sum(r.num_objects >= 4 for r in metrics.images)
    assert 0 < num_many < NUM_IMAGES
    assert metrics.budget_histogram == [NUM_IMAGES - num_many, num_many]
    assert metrics.mean_keep_ratio == pytest.approx(
        (num_many * 5 + (NUM_IMAGES - num_many) * 2) / 8 / NUM_IMAGES
    )
    assert metrics.keep_ratio_histogram[5] == NUM_IMAGES - num_many  # 0.25
    assert metrics.keep_ratio_histogram[12] == num_many  # 0.625
    assert metrics.budget_object_spearman > 0.7


def test_metrics_survive_json_with_none_for_what_cannot_be_measured(dataset):
    metrics = evaluate(Oracle(dataset), EvaluationLoader(dataset, **SIZES), "cpu")
    restored = json.loads(json.dumps(metrics.to_dict()))
    assert restored["AP"] == pytest.approx(1)
    assert restored["APl"] is None  # no object of more than 96 x 96 pixels
    assert restored["num_images"] == NUM_IMAGES
    classes = restored["per_class"]
    assert [entry["name"] for entry in classes] == list(dataset.class_map.names)
    assert all(entry["AP"] == entry["AR"] == pytest.approx(1) for entry in classes if entry["num_objects"])
    assert sum(entry["num_objects"] for entry in classes) == sum(r.num_objects for r in metrics.images)


@pytest.mark.parametrize("evaluator", ["pycocotools", "hotcoco"])
def test_a_detector_that_finds_nothing_has_ap_zero(dataset, evaluator):
    if evaluator == "hotcoco":
        pytest.importorskip("hotcoco")
    loader = EvaluationLoader(dataset, batch_size=4, **SIZES)
    metrics = evaluate(Oracle(dataset, blind=True), loader, "cpu", evaluator=evaluator)
    assert metrics.precision.ap == 0
    assert metrics.precision.ap50 == 0
    assert math.isnan(metrics.precision.ap_large)


def test_detections_are_written_as_coco_results(dataset, tmp_path):
    file = tmp_path / "new" / "detections.json"
    loader = EvaluationLoader(dataset, batch_size=4, **SIZES)
    metrics = evaluate(Oracle(dataset), loader, "cpu", detections_file=file)
    truth = COCO(dataset.annotations.file)
    reference = COCOeval(truth, truth.loadRes(str(file)), "bbox")
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    assert reference.stats[0] == metrics.precision.ap
    with pytest.raises(UserError, match="cannot write the detections"):
        evaluate(Oracle(dataset), loader, "cpu", detections_file=tmp_path)


@pytest.mark.parametrize("evaluator", ["pycocotools", "hotcoco"])
def test_images_without_annotations_are_detected_and_have_no_ap(dataset, tmp_path, evaluator):
    """Like COCO's test-dev: the file lists no annotations at all, and a server computes the AP."""
    if evaluator == "hotcoco":
        pytest.importorskip("hotcoco")
    content = json.loads(dataset.annotations.file.read_text())
    del content["annotations"]
    (tmp_path / "image_info_test.json").write_text(json.dumps(content))
    test_set = CocoDetection(dataset.image_folder, tmp_path / "image_info_test.json")
    file = tmp_path / "detections.json"
    loader = EvaluationLoader(test_set, batch_size=4, **SIZES)
    metrics = evaluate(Oracle(dataset), loader, "cpu", evaluator=evaluator, detections_file=file)
    assert metrics.to_dict()["AP"] is None
    assert all(entry["AP"] is None for entry in metrics.per_class())
    truth = COCO(dataset.annotations.file)
    found = truth.loadRes(str(file))
    assert set(truth.getImgIds()) >= {entry["image_id"] for entry in json.loads(file.read_text())}
    assert len(found.getAnnIds()) > len(truth.getAnnIds())


def test_results_have_the_image_ids_of_the_file(dataset, tmp_path):
    """Ids that are no integers are numbered inside, and exact in the results."""
    content = json.loads(dataset.annotations.file.read_text())
    for record in content["images"]:
        record["id"] = f"image {record['id']}"
    for record in content["annotations"]:
        record["image_id"] = f"image {record['image_id']}"
    (tmp_path / "text_ids.json").write_text(json.dumps(content))
    named = CocoDetection(dataset.image_folder, tmp_path / "text_ids.json")
    loader = EvaluationLoader(named, **SIZES)
    metrics = evaluate(Oracle(dataset), loader, "cpu", detections_file=tmp_path / "results.json")
    assert metrics.precision.ap == pytest.approx(1)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {entry["image_id"] for entry in results} == {record["id"] for record in content["images"]}


def test_images_with_more_objects_than_a_limit_are_counted_in_a_warning(dataset, caplog):
    counts = dataset.num_objects
    assert counts.tolist() == [len(dataset.objects(i)[1]) for i in range(NUM_IMAGES)]
    warn_of_limits(dataset, num_queries=8, max_detections=8)
    assert not caplog.text
    warn_of_limits(dataset, num_queries=6, max_detections=7)
    for setting, limit in (("model.num_queries", 6), ("evaluation.max_detections", 7)):
        num_crowded = int((counts > limit).sum())
        assert (
            f"{num_crowded} of {NUM_IMAGES} images hold more than {setting} = {limit} objects" in caplog.text
        )


def test_the_model_returns_to_the_mode_it_was_in(dataset):
    model = Oracle(dataset)
    for training in (True, False):
        model.train(training)
        evaluate(model, EvaluationLoader(dataset, indices=[0], **SIZES), "cpu")
        assert model.training == training


def noisy_detections(annotations: CocoAnnotations, rng: np.random.Generator) -> DetectionTable:
    """The objects moved, resized, some lost, some doubled, some of another class, among false ones."""
    rows = []
    for i in range(len(annotations)):
        objects = slice(annotations.starts[i], annotations.starts[i + 1])
        for box, category in zip(
            annotations.boxes_xywh[objects], annotations.category_ids[objects], strict=True
        ):
            for _ in range(rng.integers(0, 3)):
                moved = box + rng.normal(0, 0.08, 4) * box[[2, 3, 2, 3]]
                wrong = rng.choice(list(annotations.categories)) if rng.random() < 0.1 else category
                rows.append([i, *moved, rng.random(), wrong])
        for _ in range(rng.integers(0, 8)):
            box = rng.uniform(1, 50, 4)
            rows.append([i, *box, rng.random(), rng.choice(list(annotations.categories))])
    return as_table(np.array(rows))


def as_table(rows: np.ndarray) -> DetectionTable:
    """From [n, 7] image index, x, y, width, height, score, category id."""
    return DetectionTable(rows[:, 0].astype(np.int64), rows[:, 6].astype(np.int64), rows[:, 1:5], rows[:, 5])


@pytest.fixture
def annotation_files(dataset: CocoDetection, tmp_path: Path) -> list[Path]:
    """The synthetic file with a crowd added, and COCO's own where it is present."""
    content = json.loads(dataset.annotations.file.read_text())
    for annotation in content["annotations"][::5]:
        annotation["iscrowd"] = 1
    file = tmp_path / "crowds.json"
    file.write_text(json.dumps(content))
    coco = Path(__file__).parents[2] / "shared/data/coco_tiny/annotations/instances_train2017.json"
    return [file, coco] if coco.exists() else [file]


@pytest.mark.parametrize("evaluator", ["pycocotools", "hotcoco"])
def test_average_precision_equals_pycocotools_on_the_file(annotation_files, evaluator):
    if evaluator == "hotcoco":
        pytest.importorskip("hotcoco")
    for file in annotation_files:
        annotations = CocoAnnotations.read(file)
        detections = noisy_detections(annotations, np.random.default_rng(0))
        truth = COCO(file)
        reference = COCOeval(truth, truth.loadRes(detections.to_coco(annotations)), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
        expected = [math.nan if value < 0 else value for value in reference.stats[[0, 1, 2, 3, 4, 5, 8]]]
        found = average_precision(annotations, detections, evaluator=evaluator)
        assert 0.1 < found.ap < 0.9
        *summary, classes = vars(found).values()
        np.testing.assert_array_equal(summary, expected)
        for place, entry in enumerate(classes):
            precision = reference.eval["precision"][:, :, place, 0, -1]
            recall = reference.eval["recall"][:, place, 0, -1]
            assert entry.category_id == reference.params.catIds[place]
            assert entry.num_objects == len(truth.getAnnIds(catIds=[entry.category_id], iscrowd=False))
            if entry.num_objects == 0:
                assert math.isnan(entry.ap)
                assert math.isnan(entry.ar)
            else:
                assert (entry.ap, entry.ar) == (precision.mean(), recall.mean())


def test_evaluators_are_quiet(annotation_files, capfd):
    annotations = CocoAnnotations.read(annotation_files[0])
    average_precision(annotations, noisy_detections(annotations, np.random.default_rng(0)))
    assert capfd.readouterr().out == ""


def test_images_left_out_do_not_count_as_missed(annotation_files):
    annotations = CocoAnnotations.read(annotation_files[0])
    perfect = perfect_detections(annotations)
    some = perfect.image_indices >= 5
    detections = DetectionTable(*(column[some] for column in vars(perfect).values()))
    assert average_precision(annotations, detections).ap < 0.95
    assert average_precision(annotations, detections, indices=range(5, NUM_IMAGES)).ap == pytest.approx(1)


def perfect_detections(annotations: CocoAnnotations) -> DetectionTable:
    return DetectionTable(
        np.repeat(np.arange(len(annotations)), np.diff(annotations.starts)),
        annotations.category_ids,
        annotations.boxes_xywh,
        np.ones(len(annotations.boxes_xywh)),
    )


def with_ids(file: Path, image_ids: list[int], folder: Path) -> CocoAnnotations:
    """The same annotations under other image ids."""
    content = json.loads(file.read_text())
    new = dict(zip((image["id"] for image in content["images"]), image_ids, strict=True))
    for image in content["images"]:
        image["id"] = new[image["id"]]
    for annotation in content["annotations"]:
        annotation["image_id"] = new[annotation["image_id"]]
    path = folder / "renumbered.json"
    path.write_text(json.dumps(content))
    return CocoAnnotations.read(path)


@pytest.mark.parametrize("evaluator", ["pycocotools", "hotcoco"])
@pytest.mark.parametrize("first", [2**53, 2**63 - NUM_IMAGES, -5, -(2**63)])
def test_image_ids_of_any_size_and_sign_are_exact(annotation_files, tmp_path, evaluator, first):
    """Beyond 2^53 neighbouring ids are one number in float64."""
    if evaluator == "hotcoco":
        pytest.importorskip("hotcoco")
    ids = [first + i for i in range(NUM_IMAGES)]
    annotations = with_ids(annotation_files[0], ids, tmp_path)
    perfect = perfect_detections(annotations)
    assert average_precision(annotations, perfect, evaluator=evaluator).ap == pytest.approx(1)
    assert {entry["image_id"] for entry in perfect.to_coco(annotations)} <= set(ids)
    assert annotations.indices_of(ids) == list(range(NUM_IMAGES))


@pytest.mark.parametrize("evaluator", ["pycocotools", "hotcoco"])
def test_objects_beyond_the_cap_count_where_it_is_raised(tmp_path, evaluator):
    if evaluator == "hotcoco":
        pytest.importorskip("hotcoco")
    boxes = [[8 * (i % 20), 8 * (i // 20), 6, 6] for i in range(400)]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 160, "width": 160}],
        "annotations": [
            {"id": i + 1, "image_id": 1, "category_id": 1 + i % 2, "bbox": box} for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
    }
    (tmp_path / "many.json").write_text(json.dumps(content))
    annotations = CocoAnnotations.read(tmp_path / "many.json")
    perfect = perfect_detections(annotations)
    assert average_precision(annotations, perfect, evaluator=evaluator).ap == pytest.approx(0.5, abs=0.01)
    raised = average_precision(annotations, perfect, evaluator=evaluator, max_detections=400)
    assert raised.ap == raised.ar == pytest.approx(1)


def test_rows_without_a_category_are_not_reported():
    class_map = ClassMap(num_rows=5, rows=(1, 3), category_ids=(10, 30), names=("a", "b"))
    first = Detections(
        torch.tensor([0.75, 0.5]), torch.tensor([3, 2]), torch.tensor([[0.0, 0, 4, 5], [0, 0, 1, 1]])
    )
    second = Detections(torch.tensor([0.25]), torch.tensor([1]), torch.tensor([[2.0, 3, 10, 20]]))
    table = DetectionTable.from_batch([8, 3], [first, second], class_map)
    assert table.image_indices.tolist() == [8, 3]
    assert table.category_ids.tolist() == [30, 10]
    assert table.boxes_xywh.tolist() == [[0, 0, 4, 5], [2, 3, 8, 17]]
    assert table.scores.tolist() == [0.75, 0.25]


def tiny_model(num_classes: int) -> nn.Module:
    torch.manual_seed(0)
    config = ModelConfig(
        backbone=BackboneConfig(name="resnet10t", pretrained=False),
        selector=SelectorConfig(keep_ratio=None, min_ratio=0.2, max_ratio=0.5, min_tokens=10),
        width=32,
        num_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        feedforward_width=32,
        num_queries=20,
        two_stage=True,
        box_refine=True,
        queries_from_memory=True,
        class_specific_proposals=True,
    )
    return build_model(config, num_classes)


def assert_same(a: Metrics, b: Metrics) -> None:
    assert a.images == b.images
    # Sums run in another order in another batch: scores move by 1e-6, near-ties in the ranking may swap.
    ours, theirs = (list(vars(metrics.precision).values())[:-1] for metrics in (a, b))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_no_image_depends_on_batch_size_or_order(dataset):
    model = tiny_model(dataset.class_map.num_rows)
    order = np.random.default_rng(0).permutation(NUM_IMAGES).tolist()
    alone = evaluate(model, EvaluationLoader(dataset, batch_size=1, **SIZES), "cpu")
    batched = evaluate(model, EvaluationLoader(dataset, batch_size=8, indices=order, **SIZES), "cpu")
    compiled = evaluate(CompiledDetr(model), EvaluationLoader(dataset, batch_size=8, **SIZES), "cpu")
    assert_same(alone, batched)
    assert_same(alone, compiled)
    assert len({record.num_valid_tokens for record in alone.images}) > 2


@pytest.fixture(scope="module")
def damaged(dataset: CocoDetection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images of `dataset`, the first one cut short."""
    folder = tmp_path_factory.mktemp("damaged")
    for i in range(len(dataset)):
        content = dataset.path(i).read_bytes()
        (folder / dataset.path(i).name).write_bytes(content[: len(content) // 2] if i == 0 else content)
    return folder


def test_skipped_images_are_counted_and_left_out(dataset, damaged):
    skipping = CocoDetection(damaged, dataset.annotations.file, on_bad_image="skip")
    metrics = evaluate(Oracle(dataset), EvaluationLoader(skipping, batch_size=3, **SIZES), "cpu")
    assert metrics.num_skipped == 1
    assert len(metrics.images) == NUM_IMAGES - 1
    assert metrics.precision.ap == pytest.approx(1)


def test_images_of_which_none_can_be_read_are_an_error(dataset, tmp_path):
    for i in range(len(dataset)):
        content = dataset.path(i).read_bytes()
        (tmp_path / dataset.path(i).name).write_bytes(content[: len(content) // 2])
    skipping = CocoDetection(tmp_path, dataset.annotations.file, on_bad_image="skip")
    with pytest.raises(UserError, match="none of its images can be read"):
        evaluate(Oracle(dataset), EvaluationLoader(skipping, **SIZES), "cpu")


def test_a_fixed_budget_has_no_correlation_with_the_number_of_objects(dataset):
    metrics = evaluate(Oracle(dataset), EvaluationLoader(dataset, **SIZES), "cpu")
    fixed = tuple(dataclasses.replace(record, budget_class=None) for record in metrics.images)
    assert dataclasses.replace(metrics, images=fixed).to_dict()["budget_object_spearman"] is None


def test_a_bad_image_stops_the_evaluation(dataset, damaged):
    strict = CocoDetection(damaged, dataset.annotations.file)
    with pytest.raises(ImageFileError, match=r"000001\.jpg cannot be read"):
        evaluate(Oracle(dataset), EvaluationLoader(strict, **SIZES), "cpu")


@pytest.fixture(scope="module")
def two_processes(dataset, damaged, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Metrics, str]]:
    """For each of two processes, its metrics of `dataset` and its error on the damaged images."""
    folder = tmp_path_factory.mktemp("processes")
    strict = CocoDetection(damaged, dataset.annotations.file)
    torch.multiprocessing.spawn(
        _evaluate_share, (dataset, strict, tiny_model(dataset.class_map.num_rows), folder), nprocs=2
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _evaluate_share(
    rank: int, dataset: CocoDetection, damaged: CocoDetection, model: nn.Module, folder: Path
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    share = {"batch_size": 4, "rank": rank, "world_size": 2, **SIZES}
    metrics = evaluate(model, EvaluationLoader(dataset, **share), "cpu")
    with pytest.raises(ImageFileError) as raised:
        evaluate(model, EvaluationLoader(damaged, **share), "cpu")
    torch.save((metrics, str(raised.value)), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_find_what_one_finds_on_an_odd_number_of_images(dataset, two_processes):
    model = tiny_model(dataset.class_map.num_rows)
    single = evaluate(model, EvaluationLoader(dataset, batch_size=4, **SIZES), "cpu")
    for metrics, _ in two_processes:
        assert_same(metrics, single)


def test_a_bad_image_of_one_process_stops_both_with_the_same_message(two_processes):
    (_, first), (_, second) = two_processes
    assert first == second
    assert "000001.jpg cannot be read" in first


def test_detections_are_reported_in_pixels_of_the_original(dataset):
    """The oracle's boxes are 0..1 of images resized from other sizes: AP 1 needs the way back to be exact."""
    boxes = torch.cat([dataset.objects(i)[0] for i in range(NUM_IMAGES)])
    assert (xyxy_to_cxcywh(boxes)[:, 2:] < 96).all()  # why APl cannot be measured above
