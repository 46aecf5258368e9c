"""Which passes are captured as CUDA graphs, with a capture that replays in Python. Runs without a GPU."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from torch import Tensor

from ats_detr import MeanBudget
from ats_detr import detector as detector_module
from ats_detr.budgets import Calibration
from ats_detr.detector import Detector
from ats_detr.kernels import dispatch
from ats_detr.model import Detr
from ats_detr.model import compiled as compiled_module
from ats_detr.model.compiled import GraphCache, model_state
from tests.model.test_detr import small_model
from tests.small_detector import small_detector


class FakeGraphs:
    """Replays like a CUDA graph: the Python code of the function runs at the capture only."""

    def __init__(self) -> None:
        self.captured: list[tuple[torch.Size, ...]] = []
        self.num_replays = 0
        self.error: Exception | None = None

    def __call__(self, function: Callable[..., Any], *inputs: Tensor) -> Callable[..., Any]:
        if self.error is not None:
            raise self.error
        output = function(*inputs)
        self.captured.append(tuple(tensor.shape for tensor in inputs))

        def replay(*new: Tensor) -> Any:
            assert [tensor.shape for tensor in new] == [tensor.shape for tensor in inputs]
            self.num_replays += 1
            return output

        return replay


def double(x: Tensor) -> Tensor:
    return 2 * x


def called(cache: GraphCache, keys: str) -> str:
    """For each call, `c` if it was captured, `r` if it was replayed, and `e` if it ran eagerly."""
    graphs = cache._capture
    assert isinstance(graphs, FakeGraphs)
    result = ""
    for key in keys:
        before = (len(graphs.captured), graphs.num_replays)
        cache.run(key, double, torch.ones(3))
        after = (len(graphs.captured), graphs.num_replays)
        result += "c" if after[0] > before[0] else "r" if after[1] > before[1] else "e"
    return result


def test_a_key_is_captured_at_its_second_call_or_at_its_first() -> None:
    assert called(GraphCache(4, capture_at=2, capture=FakeGraphs()), "aababba") == "ecercrr"
    assert called(GraphCache(4, capture_at=1, capture=FakeGraphs()), "aab") == "crc"
    assert called(GraphCache(0, capture_at=1, capture=FakeGraphs()), "aaa") == "eee"
    with pytest.raises(ValueError, match=r"max_graphs = -1: must be >= 0"):
        GraphCache(-1, capture_at=1)


def test_the_least_recently_used_graph_is_dropped_and_captured_again_ever_later() -> None:
    cache = GraphCache(2, capture_at=2, capture=FakeGraphs())
    assert called(cache, "aabbacc") == "ececrec"  # drops b, which a's replay left behind
    assert called(cache, "abbbb") == "reeec"  # b needs twice as many calls
    rotation = called(GraphCache(2, capture_at=1, capture=FakeGraphs()), "abc" * 100)
    assert rotation.count("c") <= 3 * 7, "captures of keys that do not fit become rare"


def test_a_failed_capture_is_reported_once_and_stays_eager(caplog: pytest.LogCaptureFixture) -> None:
    graphs = FakeGraphs()
    cache = GraphCache(4, capture_at=2, capture=graphs)
    assert called(cache, "aa") == "ec"
    graphs.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")
    assert called(cache, "bbbb") == "eeee"
    assert torch.equal(cache.run("b", double, torch.ones(3)), torch.full((3,), 2.0))
    graphs.error = None
    assert called(cache, "bba") == "eer", "earlier graphs are still replayed"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.endswith("cannot be captured: CUDA out of memory. Tried to allocate 1 GiB")


def test_graphs_give_way_to_a_pass_that_lacks_memory(caplog: pytest.LogCaptureFixture) -> None:
    cache = GraphCache(4, capture_at=1, capture=FakeGraphs())
    assert called(cache, "ab") == "cc"
    failures = [torch.OutOfMemoryError("CUDA out of memory")]
    no_state = {"state": lambda: None}

    def large(x: Tensor) -> Tensor:
        if failures:
            raise failures.pop()
        return x

    assert torch.equal(cache.run("large", large, torch.ones(2), **no_state), torch.ones(2))
    assert called(cache, "aab") == "eee"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    failures.append(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        cache.run("large", large, torch.ones(2), **no_state)


def test_a_changed_state_drops_all_graphs_and_none_runs_in_python() -> None:
    cache = GraphCache(4, capture_at=1, capture=FakeGraphs())
    state: list[Any] = [["old"]]

    def run(key: str, value: float) -> float:
        return cache.run(key, lambda x: x * value, torch.ones(()), state=lambda: state[-1]).item()

    assert run("a", 1) == run("a", 2) == 1, "replayed"
    assert run("b", 1) == 1
    state.append(["new"])
    assert run("a", 3) == 3, "eager"
    assert run("b", 4) == 4, "the graphs of other keys are outdated, too"
    assert run("a", 5) == 5
    assert run("a", 6) == 6, "captured again"
    assert run("a", 7) == 6
    state.append(None)
    assert run("a", 8) == 8
    state.pop()
    assert run("a", 9) == 6, "the graph is still valid"


def test_shapes_are_counted_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_module, "_MAX_SHAPES", 10)
    cache = GraphCache(4, capture_at=2, capture=FakeGraphs())
    for number in range(100):
        cache.run(number, double, torch.ones(3))
    assert len(cache._shapes) == 10


def test_threads_share_a_cache() -> None:
    graphs = FakeGraphs()
    cache = GraphCache(4, capture_at=2, capture=graphs)

    def work() -> None:
        for number in range(200):
            assert cache.run(number % 3, double, torch.ones(3)).sum() == 6

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(graphs.captured) == 3 and graphs.num_replays >= 3 * 200


def test_copies_have_the_settings_and_no_graphs() -> None:
    cache = GraphCache(3, capture_at=2)
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert (other.max_graphs, other.capture_at) == (3, 2)
        assert other.drop() == 0 and other._lock is not cache._lock


class FakeCuda:
    """Streams and captures of two GPUs. As in PyTorch, 32 streams are returned in turns, and a capture that fails
    leaves its stream the current one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = torch.device("cuda", 0)
        self.streams = {0: self.Stream(0), 1: self.Stream(1)}
        pools = [itertools.cycle([self.Stream(index) for _ in range(32)]) for index in (0, 1)]
        self.captures: list[Any] = []
        self.fails = False
        fakes = {
            "device": self.on, "stream": self.using, "graph": self.capturing, "current_stream": lambda: self.current,
            "Stream": lambda device: next(pools[device.index]), "CUDAGraph": self.Graph,
            "graph_pool_handle": object,
        }  # fmt: skip
        for name, value in {
            "_warm_up_stream": functools.cache(compiled_module._warm_up_stream.__wrapped__),
            "_streams": WeakKeyDictionary(),
        }.items():
            monkeypatch.setattr(compiled_module, name, value)
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    class Graph:
        pass

    class Stream:
        def __init__(self, index: int) -> None:
            self.device, self.waits_for = torch.device("cuda", index), []

        def wait_stream(self, other: Any) -> None:
            self.waits_for.append(other)

    @property
    def current(self) -> Any:
        return self.streams[self.device.index]

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device
        try:
            yield
        finally:
            self.device = before

    @contextlib.contextmanager
    def using(self, stream: Any) -> Iterator[None]:
        before = self.streams[stream.device.index]
        self.streams[stream.device.index] = stream
        try:
            yield
        finally:
            self.streams[stream.device.index] = before

    @contextlib.contextmanager
    def capturing(self, _: Graph, pool: object, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.captures.append((pool, stream))
        before, self.streams[stream.device.index] = self.current, stream
        yield
        if self.fails:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.streams[stream.device.index] = before


class OnGpu:
    """An input of a pass."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)

    def clone(self) -> OnGpu:
        return self


def test_graphs_are_captured_on_the_gpu_of_their_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, graphs = FakeCuda(monkeypatch), compiled_module._CudaGraphs()
    streams: list[Any] = []
    alive = [graphs(lambda x: streams.append(cuda.current), OnGpu(index)) for index in (0, 0, 1)]  # type: ignore[arg-type]
    assert len(alive) == 3
    assert [stream.device.index for stream in streams] == [0] * 8 + [1] * 4
    assert [stream for _, stream in cuda.captures] == streams[3::4]
    assert cuda.captures[0] == cuda.captures[1], "one stream and pool"
    assert cuda.captures[2][0] is not cuda.captures[0][0]


@pytest.mark.parametrize("failing", ["warm-up", "capture"])
def test_a_failed_capture_restores_the_stream(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, graphs = FakeCuda(monkeypatch), compiled_module._CudaGraphs()
    before, cuda.fails = cuda.current, True

    def function(x: Any) -> None:
        if failing == "warm-up":
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="out of memory" if failing == "warm-up" else "during capture"):
        graphs(function, OnGpu(0))  # type: ignore[arg-type]
    assert cuda.current is before
    (warm_up,) = before.waits_for
    assert warm_up.waits_for == [before], "kernels of the warm-up may still read the inputs"


def test_nothing_of_a_failed_capture_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory may be in use."""
    cuda, graphs = FakeCuda(monkeypatch), compiled_module._CudaGraphs()
    alive = graphs(lambda x: None, OnGpu(0))  # type: ignore[arg-type]
    cuda.fails = True
    with pytest.raises(RuntimeError, match="during capture"):
        graphs(lambda x: None, OnGpu(0))  # type: ignore[arg-type]
    cuda.fails = False
    graphs(lambda x: None, OnGpu(0))  # type: ignore[arg-type]
    first, failed, last = cuda.captures
    assert alive and first == failed and not {*failed} & {*last}


def test_no_graph_uses_the_stream_of_a_warm_up_or_of_another_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch frees the cuBLAS workspace of a stream with any graph captured on it."""
    cuda, streams = FakeCuda(monkeypatch), []
    first = compiled_module._CudaGraphs()
    alive = [first(lambda x: streams.append(cuda.current), OnGpu(0)) for _ in range(100)]  # type: ignore[arg-type]
    assert len({*streams}) == 2 and {*streams[3::4]}.isdisjoint(streams[::4])
    others = [compiled_module._CudaGraphs() for _ in range(31)]
    for other in others[:30]:
        alive.append(other(lambda x: None, OnGpu(0)))  # type: ignore[arg-type]
    captured_on = [stream for _, stream in cuda.captures]
    assert len({*captured_on}) == 31 and streams[0] not in captured_on
    with pytest.raises(RuntimeError, match="all 32 streams of cuda:0 are in use"):
        others[-1](lambda x: None, OnGpu(0))  # type: ignore[arg-type]
    del alive[-1]
    others[-1](lambda x: None, OnGpu(0))  # type: ignore[arg-type]
    assert cuda.captures[-1][1] is cuda.captures[-2][1], "the stream of a deleted graph"


def test_a_pool_without_graphs_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, graphs = FakeCuda(monkeypatch), compiled_module._CudaGraphs()
    cache = GraphCache(4, capture_at=1, capture=graphs)
    monkeypatch.setattr(graphs, "_replay", lambda graph, *_: graph)
    for key in "ab":
        cache.run(key, lambda x: x, OnGpu(0))  # type: ignore[arg-type]
    assert cache.drop() == 2
    for key in "aab":
        cache.run(key, lambda x: x, OnGpu(0))  # type: ignore[arg-type]
    pools = [pool for pool, _ in cuda.captures]
    assert len(pools) == 3 and pools[0] is pools[1] is not pools[2]


def test_captures_and_the_timing_of_kernels_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, graphs, events = FakeCuda(monkeypatch), compiled_module._CudaGraphs(), []

    def time_kernels() -> None:
        with dispatch.capture_lock:
            events.append("timed")

    other = threading.Thread(target=time_kernels)

    def function(x: Any) -> None:
        if len(events) == 3:  # the capture, after three passes
            other.start()
            other.join(0.05)
        with dispatch.capture_lock:  # kernels that the pass times itself
            events.append("pass")

    graphs(function, OnGpu(0))  # type: ignore[arg-type]
    other.join()
    assert len(cuda.captures) == 1 and events == ["pass"] * 4 + ["timed"]


INVALID = "CUDA error: operation failed due to a previous error during capture"


def test_a_capture_that_another_thread_broke_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    graphs = FakeGraphs()
    cache = GraphCache(4, capture_at=1, capture=graphs)
    graphs.error = RuntimeError(INVALID)
    assert called(cache, "ab") == "ee"
    graphs.error = None
    assert called(cache, "aabbb") == "ececr", "after twice as many calls"
    graphs.error = RuntimeError(INVALID)
    assert called(cache, "cde") == "eee", "the third failure since the last capture"
    graphs.error = None
    assert called(cache, "ccccab") == "eeeerr"
    messages = [record.message for record in caplog.records]
    assert ["tried again later" in message for message in messages] == [True] * 4 + [False]


def test_a_pass_that_cannot_be_captured_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """The end of the capture fails in the same way."""
    graphs = FakeGraphs()
    cache = GraphCache(4, capture_at=1, capture=graphs)
    graphs.error = RuntimeError(INVALID)
    graphs.error.__context__ = RuntimeError("CUDA error: operation not permitted when stream is capturing")
    assert called(cache, "a") == "e"
    graphs.error = None
    assert called(cache, "aaa") == "eee" and len(caplog.records) == 1


def test_nothing_is_captured_where_definitions_replace_kernels(caplog: pytest.LogCaptureFixture) -> None:
    graphs = FakeGraphs()
    cache = GraphCache(4, capture_at=1, capture=graphs)
    for _ in range(2):
        assert cache.run("a", double, torch.ones(2), prepare=lambda: False).sum() == 4
    assert not graphs.captured and len(caplog.records) == 1


# ------------------------------------------------------------------------------------------------ state of a model
def test_weights_may_change_in_place() -> None:
    model = small_model()
    before = model_state(model)
    with torch.no_grad():
        model.level_embed.add_(1)
    model.load_state_dict(small_model().state_dict())
    assert before is not None and model_state(model) == before


CHANGES: dict[str, Callable[[Any], object]] = {
    "another tensor": lambda model: model.load_state_dict(small_model().state_dict(), assign=True),
    "another module": lambda model: setattr(model, "encoder", small_model().encoder.eval()),
    "a fixed ratio": lambda model: model.selector.fix_ratio(0.5),
    "another number of queries": lambda model: setattr(model, "num_queries", 7),
    "products in TF32": lambda model: torch.set_float32_matmul_precision("high"),
    "another backend": lambda model: pytest.MonkeyPatch().setenv("ATS_DETR_BACKEND", "reference"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_that_a_graph_does_not_see_change_the_state(
    change: Callable[[Any], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATS_DETR_BACKEND", "")
    precision, model = torch.get_float32_matmul_precision(), small_model().eval()
    before = model_state(model)
    try:
        change(model)
        assert model_state(model) not in (before, None)
    finally:
        torch.set_float32_matmul_precision(precision)


def test_hooks_training_autocast_and_other_passes_run_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model().eval()
    assert model_state(model) is not None
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    assert model_state(model) is None
    monkeypatch.undo()
    hook = model.encoder.layers[0].register_forward_hook(lambda *_: None)
    assert model_state(model) is None
    hook.remove()
    model.decoder.train()
    assert model_state(model) is None
    model.eval()
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert model_state(model) is None
    assert model_state(model) is not None
    model.__class__ = type("Wrapped", (Detr,), {"forward": lambda *_, **__: None})
    assert model_state(model) is None


# ------------------------------------------------------------------------------------------------------ the detector
@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> FakeGraphs:
    """Captures in place of CUDA graphs, of detectors made afterwards."""
    fake = FakeGraphs()
    monkeypatch.setattr(detector_module, "can_capture", lambda *_, **__: True)
    monkeypatch.setattr(compiled_module, "can_capture", lambda *_, **__: True)
    monkeypatch.setattr(compiled_module, "_CudaGraphs", lambda: fake)
    return fake


def with_capture(capture: Any) -> Detector:
    small = small_detector()
    return Detector(small.model, small.config, small.classes, capture=capture)


IMAGE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("capture", "calls_captured"), [("auto", [0, 1, 1]), (True, [1, 1, 1]), (False, [0] * 3)]
)
def test_a_detector_captures_the_size_of_its_images(
    graphs: FakeGraphs, capture: Any, calls_captured: list[int]
) -> None:
    detector = with_capture(capture)
    expected = small_detector().predict(IMAGE, threshold=0)[0]
    for number in calls_captured:
        (result,) = detector.predict(IMAGE, threshold=0)
        np.testing.assert_array_equal(result.boxes_xyxy, expected.boxes_xyxy)
        np.testing.assert_array_equal(result.labels, expected.labels)
        assert result.budget == expected.budget
        assert len(graphs.captured) == number
    if capture:
        detector.predict([IMAGE] * 4, batch_size=2)
        assert graphs.captured[-1][0][0] == 2, "another number of images"
        detector.predict([IMAGE[:, :40]] * 2)
        assert graphs.captured[-1][0] != graphs.captured[0][0], "another padded size"


def test_postprocessing_is_part_of_the_graph(graphs: FakeGraphs) -> None:
    """Original sizes are inputs of the graph; the number of detections is fixed by it."""
    detector = with_capture(True)
    detector.predict(IMAGE)
    assert graphs.captured == [((1, 3, 64, 96), (1, 2), (1, 4))]
    assert len(detector.predict(IMAGE, threshold=0, max_detections=5)[0]) == 5
    assert len(graphs.captured) == 2
    compiled = with_capture("auto").compile()
    compiled.predict(IMAGE)
    assert graphs.captured[2:] == graphs.captured[:1]
    with_capture(False).compile().predict(IMAGE)
    assert len(graphs.captured) == 3


@pytest.mark.parametrize("compiled", [False, True])
def test_a_graph_holds_one_ratio_and_any_cost(
    graphs: FakeGraphs, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With replays that compute the captured function of their own inputs."""

    def capture(function: Callable[..., Any], *inputs: Tensor) -> Callable[..., Any]:
        graphs(function, *inputs)
        return function

    monkeypatch.setattr(compiled_module, "_CudaGraphs", lambda: capture)
    detector, eager = with_capture(True), with_capture(False)
    if compiled:
        detector.compile()
    ratios = tuple(eager.model.selector.ratio_of_budget(torch.arange(2)).tolist())
    facts = Calibration(ratios, (-1e4, 0.0, 1e4), (0.6, 0.5, 0.3), 1).to_dict()
    for each in (detector, eager):
        each.facts["budget_calibration"] = facts
    budgets = ["auto", 0.2, 0.5, 0.2, MeanBudget(0.3), MeanBudget(0.6), MeanBudget(0.5), "auto"]
    numbers = [1, 2, 3, 3, 4, 4, 4, 4]
    for budget, number in zip(budgets, numbers, strict=True):
        (result,), (expected,) = (
            each.predict(IMAGE, threshold=0, budget=budget) for each in (detector, eager)
        )
        assert len(graphs.captured) == number
        assert result.budget == expected.budget
        np.testing.assert_allclose(result.scores, expected.scores, atol=1e-5)
    assert eager.predict(IMAGE, budget=MeanBudget(0.3))[0].budget.budget_class == 0
    assert eager.predict(IMAGE, budget=MeanBudget(0.6))[0].budget.budget_class == 1


def test_a_replayed_pass_of_a_changed_model_is_not_used(graphs: FakeGraphs) -> None:
    detector = with_capture(True)
    detector.predict(IMAGE)
    assert detector.model.selector is not None
    detector.model.selector.fix_ratio(1.0)
    (result,) = detector.predict(IMAGE)
    assert result.budget.keep_ratio == 1
    seen = []
    detector.model.register_forward_hook(lambda *_: seen.append(1))
    detector.predict(IMAGE)
    assert seen, "hooks are called"


def test_other_values_of_capture_are_errors() -> None:
    with pytest.raises(ValueError, match="capture = 'always': must be 'auto', True or False"):
        with_capture("always")


@pytest.mark.gpu
@pytest.mark.parametrize("capture", ["auto", True])
def test_captured_detections_equal_eager_ones_on_a_gpu(capture: Any) -> None:
    random = np.random.default_rng(1)
    images = [
        random.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in [(60, 90), (64, 64)]
    ]
    small = small_detector(width=64)
    eager = Detector(small.model.cuda(), small.config, small.classes, capture=False)
    detector = Detector(small.model, small.config, small.classes, capture=capture)
    with torch.backends.cudnn.flags(allow_tf32=False):
        for step in range(4):
            for one, other in zip(
                detector.predict(images, threshold=0), eager.predict(images, threshold=0), strict=True
            ):
                assert one.budget == other.budget
                np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)
            with torch.no_grad():  # graphs read the weights again
                detector.model.level_embed.add_(0.01 * step)
    assert detector._graphs.drop() == 2


@pytest.mark.gpu
def test_a_capture_that_fails_on_a_gpu_leaves_the_detector_usable(caplog: pytest.LogCaptureFixture) -> None:
    """A synchronisation inside the pass is not allowed in a capture."""
    small = small_detector(width=64)
    detector = Detector(small.model.cuda(), small.config, small.classes, capture=True)
    original = detector.model.encoder.forward

    class Synchronising(type(detector.model.encoder)):  # type: ignore[misc]
        def forward(self, *inputs: Any) -> Any:
            torch.cuda.synchronize()
            return original(*inputs)

    detector.model.encoder.__class__ = Synchronising
    expected = Detector(small.model, small.config, small.classes, capture=False).predict(IMAGE, threshold=0)
    stream = torch.cuda.current_stream()
    for _ in range(2):
        (result,) = detector.predict(IMAGE, threshold=0)
        np.testing.assert_allclose(result.scores, expected[0].scores, atol=1e-4)
        assert torch.cuda.current_stream() == stream
    assert sum("cannot be captured" in record.message for record in caplog.records) == 1
    torch.rand(1, device="cuda")  # the generator has left the capture, too


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_models_on_two_gpus_have_graphs_of_their_own() -> None:
    """An image each, so that stale outputs of an empty graph differ."""
    random = np.random.default_rng(3)
    images = random.integers(0, 256, (4, 60, 90, 3), dtype=np.uint8)
    small = small_detector(width=64)
    expected = small.predict(list(images), threshold=0)
    for device in ("cuda:0", "cuda:1"):
        model = copy.deepcopy(small.model).to(device)
        detector = Detector(model, small.config, small.classes, capture=True)
        with torch.backends.cudnn.flags(allow_tf32=False):
            for image, other in zip(images, expected, strict=True):
                np.testing.assert_allclose(
                    detector.predict(image, threshold=0)[0].scores, other.scores, atol=1e-4
                )
        assert detector._graphs.drop() == 1


@pytest.mark.gpu
def test_threads_and_streams_share_captured_passes() -> None:
    small = small_detector(width=64)
    detector = Detector(small.model.cuda(), small.config, small.classes, capture=True)
    random = np.random.default_rng(2)
    images = [random.integers(0, 256, (60, 90, 3), dtype=np.uint8) for _ in range(8)]
    expected = [result.scores for result in detector.predict(images, threshold=0)]
    errors: list[float] = []

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                (result,) = detector.predict(images[number], threshold=0)
                errors.append(float(np.abs(result.scores - expected[number]).max()))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 160 and max(errors) < 1e-4
