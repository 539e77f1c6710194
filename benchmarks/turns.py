"""Several trainings at once on one GPU, each on a stream of its own.

The kernels of a small network are short, and each waits for the one before: alone it leaves most of
a GPU idle. Here each training has a thread, but only the one whose turn it is runs on the host; the
turn passes between two batches, when what was launched for the last one is still at work. Nothing
else interleaves, so each training computes what it would alone, unless its forward draws random
numbers.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock, Thread

import torch

from masksparsity.data.loader import Batch, Loader

# Between host and GPU there are 8 queues unless more are asked for; streams in one queue would wait
# for each other.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

AHEAD = 2
"""Steps that a training may be ahead of the GPU: enough that the GPU need not wait, and few enough
that a look at the loss, during which no other training has its turn, is short."""


class Turns:
    """Runs up to `width` tasks at once, in turns."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._guard = Lock()
        self._waiting: deque[Lock] = deque()  # the first one's turn it is

    def run(self, tasks: Sequence[Callable[[], object]]) -> None:
        """Do all tasks; what the first of those that failed raised is raised when all are over."""
        todo, failed = deque(tasks), list[BaseException]()
        workers = [
            Thread(target=self._work, args=(todo, failed), daemon=True) for _ in range(self.width)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if failed:
            raise failed[0]

    def share(self, loader: Loader) -> Loader:
        """`loader`, for the tasks: between its batches the turn passes."""
        return _InTurns(loader, self)

    def _work(self, todo: deque[Callable[[], object]], failed: list[BaseException]) -> None:
        cuda = torch.cuda.is_available()
        self._take()
        with torch.cuda.stream(torch.cuda.Stream()) if cuda else nullcontext():
            while todo:
                try:
                    todo.popleft()()
                except BaseException as error:
                    failed.append(error)
        self._give()

    def _take(self) -> None:
        own = Lock()
        own.acquire()
        with self._guard:
            self._waiting.append(own)
            if len(self._waiting) == 1:
                own.release()
        own.acquire()

    def _give(self) -> None:
        with self._guard:
            self._waiting.popleft()
            if self._waiting:
                self._waiting[0].release()


@dataclass
class _InTurns:
    """A `Loader` for a task of `turns`."""

    loader: Loader
    turns: Turns

    @property
    def samples(self) -> int:
        return self.loader.samples

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, index: int = 0) -> Iterator[Batch]:
        launched: deque[torch.cuda.Event] = deque()
        for images, labels in self.loader.epoch(index):
            yield images, labels
            if images.is_cuda:
                launched.append(torch.cuda.current_stream().record_event())
            self.turns._give()
            if len(launched) > AHEAD:
                launched.popleft().synchronize()
            self.turns._take()
