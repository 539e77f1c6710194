"""What forward keeps and writes: a trace undoes it, and sees what the next forward reads."""

import copy
from collections import OrderedDict
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import masksparsity as ms

from .middle import Middle, exact, row
from .networks import random_mask
from .test_exact import TOLERANCE, _distance


class Cached(nn.Module):
    """As timm's attention does: a table that is looked up is kept, until the module is moved."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 1)
        self.table, self.places = nn.Parameter(row(2, 16)), torch.arange(16).flip(0).view(4, 4)
        self.widths, self.cache = [4, 4], {}

    def _apply(self, fn, *args, **kwargs):
        self.cache = {}
        return super()._apply(fn, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        if "scale" not in self.cache:
            self.cache["scale"] = self.table[:, self.places].detach()
        p, q = self.a(x).split(self.widths, 1)
        return self.b(torch.cat([p * self.cache["scale"].mean(0), q], 1)).mean((2, 3))


def test_what_was_kept_since_the_trace_does_not_stand_in_the_way():
    model, x = Cached().eval(), torch.randn(2, 3, 4, 4)
    graph = ms.trace(model, x)
    model(x)
    keep = {g.name: torch.arange(g.size) % 3 > 0 for g in graph.prunable}
    keep = ms.KeepMask(graph, keep)
    slim = ms.prune(model, graph, keep)
    assert slim.widths != [4, 4]
    assert torch.allclose(slim(x), ms.apply_mask(model, graph, keep)(x), atol=1e-6)


WRITES = {
    "in place": lambda w: w.div_(2),
    "a part": lambda w: w[0].zero_(),
    "the data": lambda w: w.data.mul_(2),
    "the data of itself": lambda w: setattr(w, "data", w.data.mul_(2)),
    "other data": lambda w: setattr(w, "data", w * 2),
    "detached": lambda w: w.detach().fill_(1),
    "out=": lambda w: torch.add(w, 1, out=w),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_forward_writes_to_parameters_is_undone(name):
    def write(s: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            WRITES[name](s.b.weight)
        return x

    model = Middle(write)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    where = model.b.weight.data_ptr()
    ms.trace(model, torch.randn(2, 3, 4, 4))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert model.b.weight.data_ptr() == where


def test_what_an_operation_writes_beside_its_input_is_undone():
    on = torch.ones(1, dtype=torch.long)
    model = Middle(
        lambda s, x: torch.fused_moving_avg_obs_fake_quant(
            x, on, on, *(s.get_buffer(name) for name in observed), 0.01, 0, 255, 0
        )
    )
    observed = {"low": torch.zeros(1), "high": torch.ones(1), "scale": torch.ones(1), "zero": on}
    for name, value in observed.items():
        model.register_buffer(name, value.int() if name == "zero" else value.clone())
    ms.trace(model, torch.randn(2, 3, 4, 4))
    assert all(torch.equal(model.get_buffer(name), value) for name, value in observed.items())


def test_a_buffer_that_repeats_its_values_is_traced_in_training_too():
    model = Middle(lambda s, x: F.conv2d(x, s.blur, groups=x.shape[1])).double()
    model.register_buffer("blur", torch.full((1, 1, 2, 2), 0.25).double().expand(8, 1, 2, 2))
    x = torch.randn(2, 3, 4, 4).double()
    graph = ms.trace(model, x)
    assert [g.size for g in graph.prunable] == [8]
    exact(model, x, graph)


@pytest.mark.parametrize("training", [False, True])
def test_what_a_function_writes_is_undone(training):
    def write(s: nn.Module, x: Tensor) -> Tensor:
        if s.training is training:
            s.count.apply_(lambda n: n + 1)
        return x

    model = Middle(write).eval()
    model.register_buffer("count", torch.zeros(2))
    ms.trace(model, torch.randn(2, 3, 4, 4))
    assert model.count.tolist() == [0, 0]


def another(s: nn.Module, x: Tensor) -> Tensor:
    before, s.last = s.last, x
    return x if before is None else x + before.flip(1)


def queued(s: nn.Module, x: Tensor) -> Tensor:
    s.queue.append(x.detach())
    return x + s.queue[0].roll(1, 1)


def gated(s: nn.Module, x: Tensor) -> Tensor:
    gate = 1 if s.last is None else s.last.sigmoid()
    s.last = x + 1
    return x * gate


def rebound(s: nn.Module, x: Tensor) -> Tensor:
    if s.last is None:
        s.last = x.new_zeros(len(x), 1, 1, 1)
    y = x + s.last
    s.last = x.abs().sum((1, 2, 3), keepdim=True)
    return y


def counted(s: nn.Module, x: Tensor) -> Tensor:
    if s.last is None:
        s.last = x.new_zeros(1)
    y = torch.where(x > 0, x, s.last)
    s.last = s.last + 1
    return y


def later(s: nn.Module, x: Tensor) -> Tensor:
    y = x if s.last is None else x + s.last
    s.last = x.new_ones(1)
    return y


KEPT = {
    "another": another,
    "queued": queued,
    "gated": gated,
    "rebound": rebound,
    "counted": counted,
    "later": later,
}


@pytest.mark.parametrize("name", KEPT)
def test_what_the_next_forward_reads_is_followed(name):
    torch.manual_seed(0)
    model = Middle(KEPT[name], last=None, queue=[]).double().eval()
    x = torch.randn(2, 3, 4, 4, dtype=torch.double)
    graph = ms.trace(model, x)
    assert (model.last, model.queue) == (None, [])
    assert graph.cost() == ms.trace(Middle(lambda s, x: x).double(), x).cost()
    for seed in range(3):
        keep = random_mask(graph, seed)
        masked, slim = ms.apply_mask(model, graph, keep), ms.prune(model, graph, keep)
        with torch.no_grad():
            for _ in range(3):
                assert _distance(masked(x), slim(x)) <= TOLERANCE


def test_what_forward_writes_to_tensors_of_its_own_is_undone():
    def write(s: nn.Module, x: Tensor) -> Tensor:
        s.mean.mul_(0.9).add_(x.mean((0, 2, 3)))
        s.views[0].add_(1)
        return x * torch.rand(1, generator=s.random)

    mean, bank, random = torch.ones(8), torch.ones(2, 3), torch.Generator().manual_seed(5)
    model = Middle(write, random=random)
    model.mean, model.views = mean, [bank[1]]
    ms.trace(model, torch.randn(2, 3, 4, 4))
    assert model.mean is mean
    assert torch.equal(mean, torch.ones(8))
    assert torch.equal(bank, torch.ones(2, 3))
    assert torch.equal(random.get_state(), torch.Generator().manual_seed(5).get_state())


def test_what_forward_writes_to_its_input_is_undone():
    class Ranged(nn.Module):
        """As super-resolution networks scale their images."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x *= 255
            x[:, 0] -= 1
            return self.b(self.a(x).relu())

    model, x = Ranged(), torch.rand(2, 3, 8, 8)
    before = x.clone()
    ms.prune(model, graph := ms.trace(model, x), random_mask(graph, 0))
    assert torch.equal(x, before)


def test_a_config_that_refuses_to_be_written_to_is_left_alone():
    class Frozen(OrderedDict):
        def update(self, *args, **kwargs):
            raise TypeError("frozen")

        clear = pop = update

    model, x = Middle(lambda s, x: x * s.config["scale"]), torch.randn(2, 3, 4, 4)
    model.config = Frozen({"scale": 2.0})
    exact(model.double(), x.double(), ms.trace(model, x.double()))
    assert model.config == {"scale": 2.0}


def test_what_forward_says_of_its_parameters_is_undone():
    def say(s: nn.Module, x: Tensor) -> Tensor:
        s.a.weight.requires_grad_(False)
        s.a.weight.seen = x.shape
        s.b.bias.grad = torch.zeros_like(s.b.bias)
        return x * s.b.weight.detach().view(4, 8).mean(0)[:, None, None]

    model, x = Middle(say), torch.randn(2, 3, 4, 4)
    graph = ms.trace(model, x)
    ms.apply_mask(model, graph, random_mask(graph, 0))
    ms.prune(model, graph, random_mask(graph, 0))
    assert all(p.requires_grad and p.grad is None and not vars(p) for p in model.parameters())
    assert not vars(x)


def test_tensors_outside_of_the_model_carry_nothing_afterwards(tmp_path):
    kept = {"mean": torch.rand(3)}

    def positions(s: nn.Module, x: Tensor) -> Tensor:
        if "map" not in kept:
            kept["map"] = torch.linspace(-1, 1, 4)[:, None].expand(4, 4).contiguous()
        return x * kept["map"] - kept["mean"].view(3, 1, 1).mean()

    model, x = Middle(positions), torch.randn(2, 3, 4, 4)
    ms.prune(model, graph := ms.trace(model, x), random_mask(graph, 0))
    assert not any(map(vars, kept.values()))
    torch.save(kept, tmp_path / "kept.pt")
    torch.load(tmp_path / "kept.pt", weights_only=True)


def test_what_forward_keeps_in_objects_is_undone_and_starts_anew_in_a_copy():
    def write(s: nn.Module, x: Tensor) -> Tensor:
        s.seen.count += 1
        s.seen.means.append(x.detach())
        s.counts += 1
        s.norms[0].train()(torch.ones(2, 3, 2, 2))
        return x * (1 + s.draws.random()) * s.seen.count * float(s.counts[0])

    seen, counts = SimpleNamespace(count=0, means=[]), np.zeros(2)
    model = Middle(write, seen=seen, counts=counts, draws=Random(3), norms=[nn.BatchNorm2d(3)])
    x, caught = torch.randn(2, 3, 4, 4), []
    model.a.register_forward_hook(lambda *_: model.caught.append(1))
    model.caught = caught
    keep = random_mask(graph := ms.trace(model, x), 0)
    assert graph.by_name["a"].prunable
    masked, slim = ms.apply_mask(model, graph, keep), ms.prune(model, graph, keep)
    assert (seen.count, seen.means, caught, counts.tolist()) == (0, [], [], [0, 0])
    assert model.draws.getstate() == Random(3).getstate()
    assert torch.equal(model.norms[0].running_mean, torch.zeros(3))
    with torch.no_grad():
        assert _distance(masked(x), slim(x)) <= 1e-6


def test_in_inference_mode_the_same_comes_out():
    model = Middle(lambda s, x: x)
    graph = ms.trace(model, torch.randn(2, 3, 4, 4))
    with torch.inference_mode():
        x = torch.randn(2, 3, 4, 4)
        other = ms.trace(model, x)
        assert [repr(g) for g in other.groups] == [repr(g) for g in graph.groups]
        keep = random_mask(other, 0)
        nets = ms.prune(model, other, keep), ms.apply_mask(model, other, keep)
        assert ms.profile(model, x, runs=2).macs == graph.cost().macs
    for net in nets:  # they can be trained
        net(torch.randn(2, 3, 4, 4)).sum().backward()


def test_a_layer_that_is_made_in_the_first_forward_has_to_be_there():
    def make(s: nn.Module, x: Tensor) -> Tensor:
        if not hasattr(s, "c"):
            s.c = nn.Conv2d(x.shape[1], 8, 1)
        return s.c(x)

    model, x = Middle(make), torch.randn(2, 3, 4, 4)
    with pytest.raises(ms.MaskSparsityError, match=r"c\.bias is made in the first forward: run"):
        ms.trace(model, x)
    assert not hasattr(model, "c")
    model(x)
    assert len(ms.trace(model, x).prunable) == 2
    lazy = nn.Sequential(nn.LazyConv2d(8, 1), nn.Conv2d(8, 4, 1))
    with pytest.raises(ms.MaskSparsityError, match=r"0\.weight has no shape yet"):
        ms.trace(lazy, x)


class Switch(nn.Conv2d):
    """Its mode decides more than itself: a branch, and whether a correction is in the weight."""

    def __init__(self, width: int):
        super().__init__(width, 8, 1)
        self.down, self.up = nn.Parameter(row(2, width)), nn.Parameter(row(8, 2))
        self.merged = self.auxiliary = False

    def train(self, mode: bool = True) -> "Switch":
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1) ** self.merged * (self.up @ self.down)[..., None, None]
        self.merged, self.auxiliary = not mode, mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + x.flip(1) if self.auxiliary else y


@pytest.mark.parametrize("training", [False, True])
def test_what_a_mode_does_beside_itself_is_seen_and_undone(training):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 1), Switch(8), nn.ReLU(), Switch(8), nn.Conv2d(8, 2, 1))
    model, x = layers.double().train(training), torch.randn(2, 3, 4, 4).double()
    before = copy.deepcopy(model)
    graph = ms.trace(model, x)
    keep = ms.KeepMask(graph, {g.name: torch.arange(g.size) % 4 > 0 for g in graph.prunable})
    keep = keep.repaired()
    masked, slim = ms.apply_mask(model, graph, keep), ms.prune(model, graph, keep)
    for a, b in zip(before.modules(), model.modules(), strict=True):
        assert getattr(a, "merged", None) == getattr(b, "merged", None)
    for a, b in zip(before.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert graph.cost(keep).params < graph.cost().params
    for mode in (True, False):
        assert _distance(masked.train(mode)(x), slim.train(mode)(x)) <= TOLERANCE
