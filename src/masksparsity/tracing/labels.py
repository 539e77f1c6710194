"""The words of a trace: labels travel beside tensors, findings are left behind by operations.

id: a number for one channel in one place. Where channels meet, their ids are *united*; all that was
    united is a *unit*, which stays or goes as one.
slot: one axis of one parameter or buffer, with an id per index.
producer: a slot that makes channels: where it is zero, so is the channel. It is *exposed* if
    something other than a norm reads the channel, so that the slot itself has to become zero.
consumer: a slot that a product sums over. What is summed without a weight is *swallowed*. Where a
    channel is not zero with its producers, its consumers have to be zero: they are *shut*.
clean: zero wherever the producers are zero, as behind a ReLU and not behind a sigmoid.
blank: made in forward from sizes and numbers alone, all channels alike; a *canvas* while it is
    filled.
pin: protect channels, with a reason.
cut: an axis taken apart into pieces, whose lengths the code has from somewhere.
record: what one operation read, which the proof compares. In the proof the ids of all slots are
    *given*: nothing is united or pinned then.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

Slot = tuple[str, int]
"""One axis of one parameter or buffer: (name in the model, axis)."""

ANONYMOUS = 0
"""The label of all that came from nowhere we know: protected, and so is what it meets."""

NOTHING: frozenset[Slot] = frozenset()


class Labels(NamedTuple):
    """Which channel each element of a tensor belongs to, along some of its axes."""

    ids: Tensor
    """int64, as many axes as the tensor; full size along `axes`, 1 along all others."""
    axes: frozenset[int]
    clean: bool = True
    """Elements of a channel are zero whenever the channel's producers are."""
    sources: frozenset[Slot] = NOTHING
    """The producers that make it so, as long as no operation but a norm has read them."""
    finite: bool = True
    """They are no infinity then, either: what is not zero can still be multiplied by zero."""


class Reason(NamedTuple):
    """Why channels are protected: what happened, in which operation of which module."""

    why: str
    operation: str
    module: str

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        return f"{self.why} ({self.operation}{where})"


class Record(NamedTuple):
    """One operation that consumed labels: what the proof compares."""

    operation: str
    module: str
    ids: tuple[Tensor, ...]
    scalars: tuple[Any, ...]
    shapes: tuple[torch.Size | None, ...]
    """Of ids that vary along several axes: their shape."""
    origins: tuple[int | None, ...]
    """Of all tensors that were read."""


class Cut(NamedTuple):
    """Channels that an operation parted into pieces."""

    operation: str
    module: str
    whole: Tensor
    """Ids [rows, length]: several rows where other axes hold channels, too."""
    pieces: tuple[Tensor, ...]
    """Ids [rows, length of the piece]."""
    numbers: tuple[int, ...]
    """What the call may have written down: lengths, bounds or axes."""


class Product(NamedTuple):
    """A convolution or matrix product: `factor` times the lengths of all these MACs."""

    module: str
    factor: float
    outputs: Tensor
    inputs: Tensor
    rows: tuple[Tensor, ...] = ()
    """Channels along axes that it neither makes nor sums over."""


class Norm(NamedTuple):
    """A batch normalisation with scale: names of the module and of its tensors."""

    module: str
    weight: str
    bias: str | None
