"""A step as one CUDA graph: one launch in the place of hundreds of small ones."""

import gc
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from masksparsity.errors import MaskSparsityError

# CUDA's libraries allocate in their first calls, and so does SGD: not inside a capture.
WARM_UP = 3


class CaptureStream:
    """A stream that work is run on, and then captured from."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def run(self, work: Callable[[], None]) -> None:
        """Do `work` between what the current stream has queued and what it will."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            work()
        current.wait_stream(self.stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record `work`, which does nothing yet; calling what is returned does it.

        Raises:
            MaskSparsityError: it reads the device from the host, or else cannot be captured.
        """
        gc.collect()  # an earlier stage's graph is not to be freed in the middle of this one
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: threads that pin batches of a loader meanwhile break no capture.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            raise MaskSparsityError(
                "the training step of this network cannot be captured as a CUDA graph: use "
                f"--train.step eager ({error.__context__ or error})"
            ) from error
        return graph.replay


class Captured:
    """`work` on tensors of one shape, captured after `WARM_UP` calls and replayed from then on.

    The calls before run as they are: they are steps of the training, not copies of some, so that
    there is nothing to undo. What `work` does in Python beyond them happens once; it must
    allocate nothing that outlives it, and read nothing to the host.
    """

    def __init__(self, work: Callable[..., None], stream: CaptureStream) -> None:
        self.work, self.stream = work, stream
        self.warmed_up = 0
        self.inputs: tuple[Tensor, ...] = ()
        self.replay: Callable[[], None] | None = None

    def __call__(self, *given: Tensor) -> None:
        if not self.inputs:
            self.inputs = tuple(map(torch.empty_like, given))
        for own, tensor in zip(self.inputs, given, strict=True):
            own.copy_(tensor)
        work = partial(self.work, *self.inputs)
        if self.warmed_up < WARM_UP:
            self.warmed_up += 1
            self.stream.run(work)
            return
        if self.replay is None:
            self.replay = self.stream.capture(work)
        self.replay()
