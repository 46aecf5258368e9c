"""Loaders that yield (ImageBatch, list[Target]).

Training: the batches of an epoch and the augmentation of each image are a function of (seed, epoch), independent of the
number of processes and workers, and of interruptions. Evaluation: every image exactly once over all processes, in
batches of equal padded size. The padded size is a function of the image alone, so no result depends on the other images
of a batch.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import math
import multiprocessing
import signal
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ats_detr.batch import ImageBatch, Target, bucket_size
from ats_detr.data.coco import CocoDetection, ImageFileError
from ats_detr.data.transforms import Transform, evaluation_transform, resized_size
from ats_detr.errors import UserError
from ats_detr.text import first_line

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Sent by cluster schedulers before they end a job, and by Ctrl-C."""

_POLL_SECONDS = 5.0

Batch = tuple[ImageBatch, list[Target]]


@dataclass
class _Sample:
    """One transformed image, or none, with the errors that occurred."""

    image: torch.Tensor | None
    target: Target | None
    problems: list[str]


@dataclass
class _LoadedBatch:
    """A batch from a worker. Errors are data: an exception would carry the worker's traceback."""

    images: ImageBatch | None
    targets: list[Target]
    problems: list[str]

    def pin_memory(self) -> _LoadedBatch:
        images = None if self.images is None else self.images.pin_memory()
        return _LoadedBatch(images, self.targets, self.problems)

    def __reduce__(self) -> tuple[Any, ...]:
        """Tensors that are not in shared memory, which may be full, are sent through the pipe as arrays."""
        images = self.images
        if images is not None and not images.images_B3HW.is_shared():
            images = ImageBatch(images.images_B3HW.numpy(), images.sizes)  # type: ignore[arg-type]
        arrays = [(t.image_id, t.original_size, t.labels_N.numpy(), t.boxes_N4.numpy()) for t in self.targets]
        return _from_arrays, (images, arrays, self.problems)


def _from_arrays(
    images: ImageBatch | None, arrays: list[tuple[Any, ...]], problems: list[str]
) -> _LoadedBatch:
    """Inverse of `_LoadedBatch.__reduce__`."""
    if images is not None:
        images.images_B3HW = torch.as_tensor(images.images_B3HW)
    targets = [
        Target(image_id, size, torch.as_tensor(labels), torch.as_tensor(boxes))
        for image_id, size, labels, boxes in arrays
    ]
    return _LoadedBatch(images, targets, problems)


def _collate(size_multiple: int, samples: list[_Sample]) -> _LoadedBatch:
    """Collate samples to a batch, padded to a multiple of `size_multiple`."""
    images = [sample.image for sample in samples if sample.image is not None]
    targets = [sample.target for sample in samples if sample.target is not None]
    problems = [problem for sample in samples for problem in sample.problems]
    batch = ImageBatch.collate(images, size_multiple) if images else None
    if batch is not None and get_worker_info() is not None:
        with contextlib.suppress(RuntimeError):  # /dev/shm is full: the batch goes through the pipe
            batch.images_B3HW.share_memory_()
    return _LoadedBatch(batch, targets, problems)


class _Reader:
    """Reads `batches` in worker processes, or in this process. No wait for a worker is unbounded."""

    def __init__(
        self,
        samples: _TrainingSamples | _EvaluationSamples,
        *,
        size_multiple: int,
        num_workers: int = 0,
        pin_memory: bool = False,
        timeout_minutes: float = 30,
    ) -> None:
        self.batches: list[list[Any]] = []
        """Keys of the samples of each batch; its content is replaced for each epoch while the workers stay alive."""
        self._on_bad_image = samples.dataset.on_bad_image
        self._skipped: set[str] = set()
        self._timeout_minutes = timeout_minutes
        self._loader = DataLoader(
            samples,
            batch_sampler=self.batches,
            num_workers=num_workers,
            collate_fn=functools.partial(_collate, size_multiple),
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=_ignore_stop_signals,
            timeout=_POLL_SECONDS if num_workers else 0,
            # A generator of its own: the global one, from which dropout draws, must not change.
            generator=torch.Generator().manual_seed(0),
        )
        self.close = weakref.finalize(self, _end_workers, self._loader)

    def __iter__(self) -> Iterator[_LoadedBatch]:
        iterator = self._wait_for(lambda: _start(self._loader))
        while (loaded := self._wait_for(lambda: next(iterator, None))) is not None:
            for problem in loaded.problems:
                if self._on_bad_image == "error":
                    raise ImageFileError(f"{problem} (data.on_bad_image=skip omits such images)")
                if problem not in self._skipped:
                    self._skipped.add(problem)
                    log.warning("skipped: %s (%d so far)", problem, len(self._skipped))
            yield loaded

    def _wait_for(self, result: Callable[[], Any]) -> Any:
        """The result of torch's loader, which checks its workers every _POLL_SECONDS. Raises UserError if one fails."""
        deadline = time.monotonic() + self._timeout_minutes * 60
        fix = (
            "memory may be too small: lower data.num_workers, or enlarge /dev/shm (docker run --shm-size=8g)"
        )
        while True:
            try:
                with _alarm(deadline):
                    return result()
            except _Overdue as error:
                cause: BaseException = error
                reason = f"no batch in train.timeout_minutes = {self._timeout_minutes:g}"
                fix = "the disk may not respond"
            except RuntimeError as error:
                reason = first_line(error)
                if not reason.startswith(("DataLoader", "Pin memory")):
                    raise
                if "timed out" in reason:
                    continue
                cause = error
            except (ConnectionError, EOFError, FileNotFoundError) as error:
                cause, reason = error, f"a loader process ended while it sent a batch: {error}"
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                cause, reason = error, "no space in /dev/shm"
            if self._loader.num_workers:
                fix += "; data.num_workers=0 uses no loader processes"
            raise UserError(f"loading images failed ({reason}); {fix}") from cause


class _Overdue(BaseException):
    """A wait has passed its deadline. Not an Exception: a handler of reading errors must not take it for one."""


@contextmanager
def _alarm(deadline: float) -> Iterator[None]:
    """Raise _Overdue at this time in the main thread. A stalled worker can stop anywhere, also within a message."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise _Overdue
    if threading.current_thread() is not threading.main_thread():
        yield
    else:
        handler = signal.signal(signal.SIGALRM, _raise_overdue)
        # Repeated every second: Python drops an exception that is raised while it forks or runs a finaliser.
        before, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            if before:
                elapsed = time.monotonic() - (deadline - seconds)
                signal.setitimer(signal.ITIMER_REAL, max(before - elapsed, 1e-3), interval)


def _raise_overdue(number: int, frame: FrameType | None) -> None:
    raise _Overdue


def _start(loader: DataLoader) -> Iterator[_LoadedBatch]:
    """An iterator of torch's loader. Without torch's handler, which reports killed workers in any code that runs."""
    if loader._iterator is None:
        # If /dev/shm is full, this fails; torch would fail with a second error at the end.
        [multiprocessing.Queue() for _ in range(loader.num_workers + 3)]
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    except RuntimeError as error:
        # Workers that time out here have delivered all batches of the last epoch, so nothing is lost with them.
        if "timed out" in str(error):
            log.warning("loader processes did not respond for %g s and are replaced", loader.timeout)
        _end_workers(loader)
        raise
    finally:
        if signal.getsignal(signal.SIGCHLD) is not handler:
            signal.signal(signal.SIGCHLD, handler)


def _end_workers(loader: DataLoader) -> None:
    """End the workers. They ignore SIGTERM: at its end, the process would wait for a stalled one forever."""
    iterator: Any = loader._iterator
    loader._iterator = None
    if iterator is None:
        return
    # It may wait for stalled workers.
    shutdown = threading.Thread(target=iterator._shutdown_workers, daemon=True)
    with contextlib.suppress(RuntimeError):  # no threads start at the end of the interpreter
        shutdown.start()
        shutdown.join(_POLL_SECONDS)
    for worker in iterator._workers:
        worker.kill()
    if shutdown.is_alive():
        shutdown.join(_POLL_SECONDS)


def _ignore_stop_signals(worker: int) -> None:
    """Clusters and terminals send stop signals to all processes, and a run needs its workers to finish a step."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _sample(dataset: CocoDetection, transform: Transform, index: int) -> _Sample:
    """Image and target of `index`; an unreadable image is returned as an error text."""
    try:
        image = dataset.read_image(index)
    except ImageFileError as error:
        return _Sample(None, None, [str(error)])
    tensor, boxes, labels = transform(image, *dataset.objects(index))
    return _Sample(tensor, Target(dataset.image_id(index), dataset.size(index), labels, boxes), [])


class _TrainingSamples(Dataset):
    """Augmented samples by (epoch, index), which seed the augmentation, independent of the worker."""

    MAX_REPLACEMENTS = 100

    def __init__(self, dataset: CocoDetection, transform: Transform, seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> _Sample:
        epoch, index = key
        problems: list[str] = []
        for attempt in range(self.MAX_REPLACEMENTS):
            with torch.random.fork_rng(devices=[]):
                # torch.manual_seed would also reset the GPU's generator when loading in this process.
                torch.default_generator.manual_seed(_mix(self.seed, epoch, index))
                sample = _sample(self.dataset, self.transform, (index + attempt) % len(self.dataset))
            problems += sample.problems
            if sample.image is not None or self.dataset.on_bad_image == "error":
                return _Sample(sample.image, sample.target, problems)
        raise UserError(
            f"{self.MAX_REPLACEMENTS} consecutive images cannot be read, the last one: {problems[-1]}"
        )


def _mix(*numbers: int) -> int:
    """A 63-bit seed that differs for every tuple of numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class TrainingLoader:
    """Shuffled, augmented batches; each of `world_size` processes gets its share of each global batch.

    A global batch holds images of similar aspect ratio, which reduces padding; the last ones of an epoch mix the
    remaining images, and an incomplete global batch is dropped. Images without objects are included. With
    `on_bad_image="skip"` the next readable image replaces an unreadable one, so the batch size is constant. `indices`
    selects or repeats images (default: all, once per epoch).

    Args:
        reading: `num_workers`, `pin_memory` and `timeout_minutes`.

    Raises UserError if the dataset is smaller than one global batch; ImageFileError during iteration.
    """

    def __init__(
        self,
        dataset: CocoDetection,
        transform: Transform,
        *,
        batch_size: int,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
        size_multiple: int = 1,
        indices: Sequence[int] | None = None,
        **reading: Any,
    ) -> None:
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.indices = np.arange(len(dataset)) if indices is None else np.array(indices)
        self.rank, self.world_size = rank, world_size
        samples = _TrainingSamples(dataset, transform, seed)
        self.reader = _Reader(samples, size_multiple=size_multiple, **reading)
        if len(self) == 0:
            raise UserError(
                f"{len(dataset)} training images do not fill one batch of {batch_size} x {world_size} processes;"
                " lower data.batch_size"
            )

    def __len__(self) -> int:
        """Batches per epoch, equal in every epoch and process."""
        return len(self.indices) // (self.batch_size * self.world_size)

    def epoch(self, epoch: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """The batches of `epoch` from number `start`, to resume an interrupted epoch, up to `stop` (default: all)."""
        share = slice(self.rank, None, self.world_size)
        global_batches = self.global_batches(epoch)[start:stop]
        self.reader.batches[:] = [[(epoch, index) for index in batch[share]] for batch in global_batches]
        for loaded in self.reader:
            assert loaded.images is not None
            yield loaded.images, loaded.targets

    def global_batches(self, epoch: int) -> list[list[int]]:
        """Dataset indices of each batch of `epoch` over all processes; position i belongs to rank i % world_size."""
        size = self.batch_size * self.world_size
        batches: list[list[int]] = []
        waiting: dict[int, list[int]] = defaultdict(list)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.indices)
        groups = _aspect_groups(self.dataset.annotations.sizes)
        for index in order.tolist():
            group = waiting[int(groups[index])]
            group.append(index)
            if len(group) == size:
                batches.append(group.copy())
                group.clear()
        left_over = [index for group in sorted(waiting) for index in waiting[group]]
        batches += [left_over[i : i + size] for i in range(0, len(left_over) - size + 1, size)]
        return batches


def _aspect_groups(sizes: np.ndarray) -> np.ndarray:
    """Group of each (height, width): portrait or landscape, each up to or beyond an aspect ratio of sqrt(2)."""
    log_ratio = np.log2(sizes[:, 1] / sizes[:, 0])
    return np.digitize(log_ratio, [-0.5, 0.0, 0.5])


class _EvaluationSamples(Dataset):
    """Resized samples by index."""

    def __init__(self, dataset: CocoDetection, transform: Transform) -> None:
        self.dataset, self.transform = dataset, transform

    def __getitem__(self, index: int) -> _Sample:
        return _sample(self.dataset, self.transform, index)


class EvaluationLoader:
    """Every image once over all processes, in batches of one bucket: `bucket_size` of its resized size.

    The padding of an image does not depend on batch, order or number of processes. Images are not duplicated to give
    all processes equally many batches, so a step must not wait for other processes. `indices` selects or reorders the
    images (default: all). With `on_bad_image="skip"` unreadable images are omitted, also from the ground truth of
    `evaluate`.

    Args:
        reading: `num_workers`, `pin_memory` and `timeout_minutes`.
    """

    def __init__(
        self,
        dataset: CocoDetection,
        *,
        short_side: int = 800,
        long_side: int = 1333,
        size_multiple: int = 64,
        batch_size: int = 1,
        rank: int = 0,
        world_size: int = 1,
        indices: Sequence[int] | None = None,
        **reading: Any,
    ) -> None:
        self.dataset, self.rank, self.world_size = dataset, rank, world_size
        buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index in range(len(dataset)) if indices is None else indices:
            size = resized_size(dataset.size(index), short_side, long_side)
            buckets[bucket_size(size, size_multiple)].append(index)
        # Large buckets first: out of memory occurs at the start, and the processes finish at similar times.
        self.global_batches = [
            buckets[bucket][i : i + batch_size]
            for bucket in sorted(buckets, key=math.prod, reverse=True)
            for i in range(0, len(buckets[bucket]), batch_size)
        ]
        """Dataset indices of each batch over all processes; batch i belongs to rank i % world_size."""
        samples = _EvaluationSamples(dataset, evaluation_transform(short_side, long_side))
        self.reader = _Reader(samples, size_multiple=size_multiple, **reading)
        self.reader.batches[:] = self.global_batches[rank::world_size]

    def __len__(self) -> int:
        """Batches of this process."""
        return len(self.reader.batches)

    def __iter__(self) -> Iterator[Batch]:
        for loaded in self.reader:
            if loaded.images is not None:
                yield loaded.images, loaded.targets
