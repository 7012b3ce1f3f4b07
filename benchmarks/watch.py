"""A stopwatch for wall time, CPU time and memory, which can be stopped and started again.

Memory is that of the process above what it held when the watch was made: resident memory, sampled by a thread, or what torch allocated on a GPU.
Memory that was freed but not given back would hide a job's own, so it is given back first.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
from types import TracebackType

import psutil
import torch

# a forward pass of the smallest job takes a hundred times as long
_SAMPLE_SECONDS = 0.002


def settle() -> None:
    """Give freed memory back to the system, where the system has a way to (glibc)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident() -> int:
    """Return the process's resident memory in bytes."""
    return int(psutil.Process().memory_info().rss)


class Watch:
    """Adds up the stretches between `start` and `stop`.

    Attributes:
        seconds: Wall time.
        cpu_seconds: CPU time of all the process's threads.
        peak: Most memory above that at the watch's making, in bytes; 0 if it was not to be watched.
        started: Whether it ever was.
    """

    def __init__(self, *, device: str = "cpu", memory: bool = False) -> None:
        """Make a watch, stopped, at zero."""
        self.seconds = self.cpu_seconds = 0.0
        self.peak = 0
        self.started = False
        self._on_gpu = torch.device(device).type == "cuda"
        self._memory = memory
        if memory:
            settle()
        self._before = self._held()
        self._started = (0.0, 0.0)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start or go on."""
        self.started = True
        self._synchronize()
        if self._memory and self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        elif self._memory:
            self._stopped.clear()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        self._started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Stop."""
        self._synchronize()
        wall, cpu = self._started
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu
        if self._memory and self._on_gpu:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - self._before)
        elif self._thread is not None:
            self._stopped.set()
            self._thread.join()

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def _held(self) -> int:
        return torch.cuda.memory_allocated() if self._on_gpu else resident()

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._stopped.wait(_SAMPLE_SECONDS):
            self.peak = max(self.peak, process.memory_info().rss - self._before)
