"""What forward makes from sizes alone and fills piece by piece."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from .middle import bound_and_exact, free_and_exact, row
from .test_exact import attempt


def written(out: Tensor, *pairs: tuple) -> Tensor:
    for place, value in pairs:
        out[place] = value
    return out


class At:
    def __getitem__(self, place):
        return place


AT, ALL = At(), slice(None)
FREE = {
    "border": lambda s, x: written(x.new_zeros(*x.shape[:2], 8, 8), (AT[..., 1:-1, 1:-1], x)),
    "rows": lambda s, x: written(torch.zeros_like(x), (AT[:, :, 1:], x[:, :, :-1])),
    "halves": lambda s, x: written(
        torch.empty_like(x), (AT[:, :, :3], x[:, :, 3:].relu()), (AT[:, :, 3:], x[:, :, :3])
    ),
    "every second": lambda s, x: written(x.new_zeros(*x.shape[:2], 12, 12), (AT[..., ::2, ::2], x)),
    "two layers": lambda s, x: written(
        torch.empty_like(x), (AT[..., ::2], x[..., ::2].relu()), (AT[..., 1::2], s.n(x)[..., ::2])
    ),
    "last axis": lambda s, x: written(
        x.new_empty(len(x), 6, 6, x.shape[1]), (ALL, x.permute(0, 2, 3, 1))
    ).permute(0, 3, 1, 2),
    "frames": lambda s, x: written(
        x.new_zeros(len(x), 2, *x.shape[1:]), (AT[:, 0], x), (AT[:, 1], 2 * x)
    ).mean(1),
    "circular": lambda s, x: F.pad(x, (2, 1, 1, 2), mode="circular"),
    "zero rows": lambda s, x: written(x.clone(), (AT[:, :, 0], 0)),
    "zero where": lambda s, x: written((y := x.clone()), (y < 0.1, 0)),
    "or zero": lambda s, x: torch.where(x > 0.1, x, 0.0),
    "or zeros": lambda s, x: torch.where(x > 0.1, x, torch.zeros_like(x)),
    "at least zeros": lambda s, x: torch.maximum(x, torch.zeros(1).to(x).expand_as(x)),
    "beside zeros": lambda s, x: torch.cat([x, x.new_zeros(*x.shape[:2], 6, 1), x], 3),
    "under zeros": lambda s, x: torch.stack([torch.zeros_like(x), x], 2).mean(2),
    "one filter for all": lambda s, x: F.conv2d(
        x, x.new_ones(1, 1, 3, 3).expand(x.shape[1], -1, -1, -1), groups=x.shape[1]
    ),
    "its copies": lambda s, x: F.conv2d(
        x, row(1, 1, 3, 3).to(x).repeat(x.shape[1], 1, 1, 1), groups=x.shape[1]
    ),
    "frequencies": lambda s, x: torch.fft.irfft2(torch.fft.rfft2(x) * 2, s=x.shape[2:]),
    "real and imaginary": lambda s, x: torch.fft.irfft2(
        torch.complex(*[part.relu() for part in (torch.fft.rfft2(x).real, torch.fft.rfft2(x).imag)])
    ),
}


@pytest.mark.parametrize("name", FREE)
def test_channels_are_followed_into_memory_and_stay_free(name):
    free_and_exact(FREE[name], n=nn.BatchNorm2d(8))


def held(s: nn.Module, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    view = out[:, :, 1:]
    out[:, :, 1:] = x[:, :, 1:]
    return out + view.sum((2, 3), keepdim=True)


def beside(s: nn.Module, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :, :1] += x[:, :, :1].sigmoid()
    out[:, :, 1:] = x[:, :, 1:]
    return out


def by_numpy(s: nn.Module, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out.numpy()[:, 3] = 7
    return torch.where(x > 0, x, out)


def without_a_base(s: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        out = torch.zeros(x.shape[2:], dtype=x.dtype)
        out[1:] = -3
    return x + out


def target_kept(s: nn.Module, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :, :3] = x[:, :, :3]
    target = out[:, :, 3:]
    target.copy_(x[:, :, 3:].sigmoid())
    return target


def target_read(s: nn.Module, x: Tensor) -> Tensor:
    target = x.new_zeros(len(x), 2, *x.shape[1:])[:, 0]
    target.copy_(x)
    return x * target[:, torch.tensor([0])]


def diagonal(s: nn.Module, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    view = out[:, :1].diagonal(dim1=2, dim2=3)
    out[:] = x
    return x * view.mean(2)[:, :, None, None]


def turned(s: nn.Module, x: Tensor) -> Tensor:
    out = torch.ones_like(x)
    out[..., :4] = x[..., :4]
    out[:, :, 0:2, 0:3] = out[:, :, 0:3, 4:6].transpose(2, 3)
    out[..., 4:] = x[..., 4:]
    return out


def emptied(s: nn.Module, x: Tensor) -> Tensor:
    out = torch.ones_like(x)
    view = out[:, :, :1]
    out.zero_()
    out[:] = x
    return x * view[:, torch.tensor([0])]


def emptied_by_numpy(s: nn.Module, x: Tensor) -> Tensor:
    out = x.new_zeros(1, 1, x.shape[2], 1)
    array = out.numpy()
    out.zero_()
    array[:, :, 1:] = 5
    return x + out


def remembered(s: nn.Module, x: Tensor) -> Tensor:
    if s.memory is None or s.memory.shape != x.shape:
        s.memory = torch.zeros_like(x)
        s.memory[:, :, 1:] = x[:, :, 1:]
    out = torch.where(x > 0, x, s.memory)
    s.memory[:, :, :1] = x[:, :, :1].sigmoid()
    return out


def zeros_kept(s: nn.Module, x: Tensor) -> Tensor:
    zeros = torch.zeros_like(x) if s.memory is None else s.memory[0]
    s.memory = (zeros,)
    out = torch.where(x > 0, x, zeros)
    zeros[:, :, 1:] = 3
    return out


BOUND = {
    "zeros kept": zeros_kept,
    "beside ones": lambda s, x: torch.cat([x, torch.ones_like(x)], 3),
    "halves of complex ones": lambda s, x: x * torch.view_as_real(
        torch.ones(x.shape[1], dtype=torch.cdouble)
    ).view(-1)[: x.shape[1]].to(x).view(1, -1, 1, 1),
    "beside zeros that were": lambda s, x: torch.cat(
        [x, (y := torch.zeros_like(x)), y.add_(1)], 3
    ),
    "without a base": without_a_base,
    "target kept": target_kept,
    "target read": target_read,
    "diagonal": diagonal,
    "turned": turned,
    "emptied": emptied,
    "emptied by numpy": emptied_by_numpy,
    "remembered": remembered,
    "angle": lambda s, x: torch.angle(torch.complex(-x, x)),
    "strides of zero": lambda s, x: written(
        torch.empty_strided(x.shape, (0, 64, 8, 1), dtype=x.dtype), (0, x[0])
    ),
    "held": held,
    "beside": beside,
    "by numpy": by_numpy,
    "not all covered": lambda s, x: written(torch.ones_like(x), (AT[:, :, 1:], x[:, :, 1:])),
    "a row of ones": lambda s, x: written(
        torch.zeros_like(x), (AT[:, :, 1:], x[:, :, 1:]), (AT[:, :, :1], 1.0)
    ),
    "unclean": lambda s, x: written(torch.zeros_like(x), (AT[:, :, 1:], x[:, :, 1:].sigmoid())),
    "literal": lambda s, x: written(torch.zeros_like(x), (AT[:, :3], x[:, :3])),
    "literal width": lambda s, x: written(
        x.new_zeros(len(x), 8, *x.shape[2:]), (AT[:, : x.shape[1]], x)
    ),
    "in another order": lambda s, x: written(
        torch.empty_like(x), (AT[:, :4], x[:, 4:]), (AT[:, 4:], x[:, :4])
    ),
    "first ones zero": lambda s, x: written(x.clone(), (AT[:, :4], 0)),
    "not zero where": lambda s, x: written((y := x.clone()), (y < 0.1, 0.1)),
    "filters of their own": lambda s, x: F.conv2d(x, row(8, 1, 3, 3).to(x), groups=x.shape[1]),
    "over channels": lambda s, x: torch.fft.fft(x, dim=1).real,
}  # fmt: skip


@pytest.mark.parametrize("name", BOUND)
def test_what_is_not_known_of_memory_is_exact_or_refused(name):
    bound_and_exact(BOUND[name])


class Program(nn.Module):
    """Two convolutions, whose channels are written into memory by a list of steps."""

    def __init__(self, make: str, beside: bool, steps: list[tuple]):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 3, padding=1)])
        self.make, self.beside, self.steps = make, beside, steps
        self.norm = nn.BatchNorm2d(12 if beside else 6)
        self.last = nn.Conv2d(12 if beside else 6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [conv(x) for conv in self.convs]
        width = parts[0].shape[1]
        shape = (len(x), 2 * width if self.beside else width, *x.shape[2:])
        out = {"zeros": x.new_zeros, "empty": x.new_empty, "ones": x.new_ones}[self.make](shape)
        views = []
        for k, rows, act, how in self.steps:
            part = parts[k].relu() if act == "relu" else parts[k].sigmoid() if act else parts[k]
            target = out[:, k * width : (k + 1) * width] if self.beside else out
            if how == "hold":
                views.append(target[:, :, rows])
            elif how == "fill":
                target[:, :, rows] = 0
            elif how == "add":
                target[:, :, rows] += part[:, :, rows]
            elif how == "from itself":
                target[:, :, rows] = target[:, :, rows].flip(2)
            else:
                target[:, :, rows] = part[:, :, rows]
        total = sum(view.nan_to_num(0.0, 0.0, 0.0).mean() for view in views)
        return self.last(self.norm(out.nan_to_num(0.0, 0.0, 0.0))).mean((2, 3)) + total


PARTS = [slice(0, 4), slice(4, None), slice(None, None, 2), slice(1, None, 2)]
rows = st.sampled_from([*[slice(None)] * 4, *PARTS])
step = st.tuples(
    st.integers(0, 1), rows, st.sampled_from([*["", "relu"] * 4, "sigmoid"]),
    st.sampled_from([*[""] * 12, "hold", "fill", "add", "from itself"]),
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    make=st.sampled_from(["zeros", "empty", "ones"]), beside=st.booleans(),
    steps=st.lists(step, min_size=1, max_size=4), seed=st.integers(0, 99),
)  # fmt: skip
def test_random_programs_are_exact_or_refused(make, beside, steps, seed):
    torch.manual_seed(seed)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # not a number where nothing was written
    try:
        outcome, distance = attempt(Program(make, beside, steps), seed, empty=0.0)
    finally:
        torch.use_deterministic_algorithms(before)
    assert outcome != "wrong", distance
