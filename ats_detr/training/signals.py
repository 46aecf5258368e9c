"""Stop signals: a run saves and ends at its next step, or is ended where it cannot."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, TypeVar

from ats_detr import distributed
from ats_detr.data.loader import STOP_SIGNALS
from ats_detr.errors import Stopped

T = TypeVar("T")

GRACE_SECONDS = 25.0
"""Time from the first signal to the end of the process. Schedulers and torchrun kill it after 30 seconds."""
_STOP = "stop"
"""Key of the announcement to the other processes."""


class Interrupted(Exception):
    """A stop signal arrived while a process waited for data."""


class StopSignals:
    """Within the context STOP_SIGNALS are recorded instead of ending the process.

    A thread ends the process GRACE_SECONDS after the first one if it waits for other processes, data or a disk until
    then, also while it writes a checkpoint: the previous one is intact. A second Ctrl-C ends a single process at once.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal of this process."""
        self.outcome: Stopped | None = None
        """Set when the run has saved and ends."""
        self._is_waiting = False
        self._handlers: dict[int, Any] = {}
        self._ended = threading.Event()

    def __enter__(self) -> StopSignals:
        # The thread gets its signals from a socket: Python's handlers do not run while the main thread waits in C++.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            self._handlers[number] = signal.signal(number, self._record)
        threading.Thread(target=self._end_if_stuck, args=(self._reader,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._ended.set()
        self._writer.close()
        if kind is None and self.received is not None and distributed.world_size() == 1:
            # It came after the last evaluation; a further stage must not start.
            exit_code = 130 if self.received == "SIGINT" else 0
            raise Stopped(f"stopped by {self.received}; run the same command to resume", exit_code=exit_code)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and distributed.world_size() == 1:
            if self.received is not None:
                raise KeyboardInterrupt
            os.write(2, b"saving after this step; press Ctrl-C again to end at once\n")
        self.received = self.received or signal.Signals(number).name
        if self._is_waiting:
            self._is_waiting = False
            raise Interrupted

    def _end_if_stuck(self, reader: socket.socket) -> None:
        with reader:
            while (number := reader.recv(1)) and number[0] not in STOP_SIGNALS:
                pass
        if not number or self._ended.wait(GRACE_SECONDS):
            return
        if self.outcome is not None:  # stalled loader processes are all that is left
            os.write(1, f"{self.outcome}\n".encode())
            os._exit(self.outcome.exit_code)
        if distributed.is_main():
            what = f"ended {GRACE_SECONDS:.0f} s after {signal.Signals(number[0]).name}"
            why = "waiting for other processes, data or a disk"
            fix = "run the same command to resume from the last checkpoint"
            os.write(2, f"error: {what}, {why}; {fix}\n".encode())
        os._exit(2)

    def stops_after(self, step: int) -> bool:
        """Whether the run stops after this step; equal on all processes, which are then at the same step.

        A process that announces the stop after step s has not started step s + 1. No other process can finish step
        s + 1 without it, so all of them read the announcement by the end of step s + 2.
        """
        if distributed.world_size() == 1:
            return self.received is not None
        if self.received is not None:
            distributed.announce(_STOP, str(step + 2))
        announced = distributed.announced(_STOP)
        return announced is not None and step >= int(announced)

    def is_requested(self) -> bool:
        """Whether a process has received a signal, as far as this one knows."""
        if self.received is not None:
            distributed.announce(_STOP, "0")
        return self.received is not None or distributed.announced(_STOP) is not None

    def interruptible(self, elements: Iterable[T]) -> Iterator[T]:
        """The elements. In a single process a signal while waiting for one raises Interrupted."""
        iterator = iter(elements)
        end = object()
        while True:
            try:
                self._is_waiting = distributed.world_size() == 1
                if self._is_waiting and self.received is not None:
                    raise Interrupted
                element = next(iterator, end)
            finally:
                self._is_waiting = False
            if element is end:
                return
            yield element  # type: ignore[misc]
