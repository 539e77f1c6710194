"""Values picked and put by index, along axes that hold no channels."""

import pytest
import torch
from torch import Tensor

from .middle import Middle, bound_and_exact, free_and_exact, row
from .test_writing import AT, written

MASK = row(6, 6) > 0
THIRDS = torch.arange(6)[:, None] // 2


def zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


FREE = {
    "rows put": lambda s, x: written(zeros(x), (AT[:, :, [3, 1, 4]], x[:, :, :3])),
    "over other rows": lambda s, x: written(x.relu(), (AT[:, :, [3, 1, 4]], x[:, :, :3])),
    "one row put": lambda s, x: written(zeros(x), (AT[:, :, [3]], x[:, :, :1])),
    "points put": lambda s, x: written(zeros(x), (AT[:, :, [3, 1], [0, 2]], x[:, :, 0, :2])),
    "under a mask": lambda s, x: written(zeros(x), (AT[:, :, MASK], x[:, :, MASK] * 2)),
    "zeros under a mask": lambda s, x: written(x.clone(), (AT[:, :, MASK], 0)),
    "by a mask": lambda s, x: x[:, :, MASK][..., None],
    "by points": lambda s, x: x[:, :, [0, 2, 4], [1, 3, 5]][..., None],
    "some examples": lambda s, x: x[torch.arange(len(x)) > 0],
    "added to rows": lambda s, x: zeros(x).index_add(2, torch.tensor([0, 2, 2, 1, 1, 0]), x),
    "copied to rows": lambda s, x: x.index_copy(2, torch.tensor([0, 2]), x[:, :, :2].relu()),
    "filled rows": lambda s, x: x.index_fill(2, torch.tensor([0, 2]), 0),
    "gathered": lambda s, x: x.gather(2, THIRDS.expand(*x.shape[:2], 6, 6)),
    "in order": lambda s, x: x.gather(2, x.argsort(2)),
    "scattered": lambda s, x: zeros(x).scatter_add_(2, THIRDS.expand(*x.shape[:2], 6, 6), x),
    "to maxima": lambda s, x: zeros(x).scatter_(2, x.argmax(2, keepdim=True), x[:, :, :1]),
    "dropped": lambda s, x: x.scatter(2, THIRDS[:2].expand(*x.shape[:2], -1, 6), 0.0),
}


@pytest.mark.parametrize("name", FREE)
def test_channels_pass(name):
    free_and_exact(FREE[name])


def seen(s: Middle, x: Tensor) -> Tensor:
    out = zeros(x)
    view = out[:, :, 3:]
    out[:, :, [3]] = x[:, :, :1]
    return out + view.sum((2, 3), keepdim=True).sigmoid()


def into_a_view(s: Middle, x: Tensor) -> Tensor:
    out = zeros(x)
    out[:, :, 3:].index_fill_(2, torch.tensor([0]), 1)
    return x + out


def kept(s: Middle, x: Tensor) -> Tensor:
    if s.memory is None or s.memory.shape != x.shape:
        s.memory = zeros(x)
    out = x.scatter(2, THIRDS[:2].expand(*x.shape[:2], -1, 6), s.memory)
    s.memory.index_fill_(2, torch.tensor([0]), 1)
    return out


BOUND = {
    "seen": seen,
    "into a view": into_a_view,
    "kept": kept,
    "over ones": lambda s, x: written(torch.ones_like(x), (AT[:, :, [3]], x[:, :, :1])),
    "a number": lambda s, x: written(x.clone(), (AT[:, :, [3]], 1)),
    "channels put": lambda s, x: written(x.clone(), (AT[:, [3, 2]], 0)),
    "examples and channels": lambda s, x: written(x.clone(), (AT[[0, 1], [3, 2]], 0)),
    "a value for each channel": lambda s, x: written(
        x.clone(), (AT[:, :, [3]], torch.arange(x.shape[1]).view(-1, 1, 1).to(x))
    ),
    "a place for each channel": lambda s, x: x.gather(
        2, torch.arange(x.shape[1]).view(1, -1, 1, 1).expand(len(x), -1, 1, 6) % 6
    ),
    "fewer channels": lambda s, x: x.gather(
        2, torch.zeros(len(x), 3, 1, 6, dtype=torch.long)
    ).mean(1, keepdim=True).expand(-1, x.shape[1], -1, -1),
    "zero for the first channels": lambda s, x: x.scatter(
        2, torch.zeros(len(x), 3, 1, 6, dtype=torch.long), 0.0
    ),
    "added to the first channels": lambda s, x: x.scatter_add(
        2, torch.zeros(len(x), 3, 1, 6, dtype=torch.long), x.relu()
    ),
    "a value for each channel and point": lambda s, x: x * written(
        x.clone(), (AT[:, :, [1, 2], [3, 4]], 1 + torch.arange(x.shape[1])[:, None].to(x))
    ),
    "along channels": lambda s, x: x.gather(1, x.argsort(1)),
    "to channels": lambda s, x: zeros(x).scatter_add_(
        1, torch.arange(x.shape[1])[:, None, None].expand_as(x) // 2, x
    ),
    "not zero": lambda s, x: zeros(x).scatter_add_(
        2, THIRDS.expand(*x.shape[:2], 6, 6), x.sigmoid()
    ),
    "filled": lambda s, x: x.index_fill(2, torch.tensor([0]), 3),
    "multiplied": lambda s, x: torch.ones_like(x).scatter_(
        2, THIRDS.expand(*x.shape[:2], 6, 6), x, reduce="multiply"
    ),
    "a number of the width": lambda s, x: x.index_add(
        2, torch.arange(6), x[:, :, :6].relu(), alpha=x.shape[1]
    ),
    "a place of the width": lambda s, x: x.index_fill(2, torch.tensor([x.shape[1] // 4]), 0),
    "a mask by values": lambda s, x: written(x.clone(), (AT[:, :, x[0, 0] > 0], 0)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The reduce argument")
@pytest.mark.parametrize("name", BOUND)
def test_what_is_put_otherwise_is_exact_or_refused(name):
    bound_and_exact(BOUND[name])
