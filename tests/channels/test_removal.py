"""What removal says of channels that are not zero, and what it leaves of an optimizer."""

import warnings

import pytest
import torch
from timm.optim import Lookahead
from torch import Tensor, nn

import masksparsity as ms

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_prune_warns_while_what_it_removes_is_not_zero():
    model = ms.models.create("resnet20", width=4)
    graph = ms.trace(model, X)
    keep = ms.select.uniform(graph, ms.scores.norm(model, graph), 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    ms.ScheduledDecay(model, graph, keep, steps=4).attach(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()

    for _ in range(3):
        step()
    with pytest.warns(UserWarning, match="not zero: .*apply_mask"):
        ms.prune(model, graph, keep)
    step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slim = ms.prune(model, graph, keep)
        ms.prune(model, graph, keep, absorb="bias")
        ms.prune(model, graph, ms.KeepMask(graph))
    assert torch.allclose(slim.eval()(X), model.eval()(X), atol=1e-4)


def test_latencies_are_measured_without_a_word():
    model = ms.models.create("resnet20", width=4)
    graph = ms.trace(model, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure = ms.latency(model, graph, runs=2)
        assert measure(ms.select.uniform(graph, ms.scores.norm(model, graph), 0.5)) > 0


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    graph = ms.trace(model, X)
    return model, graph, ms.select.uniform(graph, ms.scores.norm(model, graph), 0.5)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def test_a_fresh_lbfgs_trains_the_slim_model(small):
    model, graph, keep = small
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    slim = ms.prune(model, graph, keep, optimizer=optimizer)
    before = slim[3].weight.detach().clone()
    train(slim, optimizer)
    assert not torch.equal(slim[3].weight, before)


def test_a_penalty_on_the_dense_model_ends_with_it(small):
    model, graph, keep = small
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ms.ScheduledDecay(model, graph, keep, steps=9).attach(optimizer)
    slim = ms.prune(model, graph, keep, optimizer=optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    train(slim, optimizer)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_wrapped_optimizer_that_shares_its_groups_goes_on(small):
    model, graph, keep = small
    base = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    optimizer = Lookahead(base, k=2)
    for _ in range(2):
        train(model, optimizer)
    kept, momentum = keep["0"], base.state[model[0].weight]["momentum_buffer"]
    slim = ms.prune(model, graph, keep, optimizer=optimizer)
    assert base.state.keys() == set(slim.parameters())
    assert torch.equal(base.state[slim[0].weight]["momentum_buffer"], momentum[kept])
    for _ in range(2):
        train(slim, optimizer)


class Apart(torch.optim.SGD):
    """As ZeroRedundancyOptimizer does, it works through another, with groups of its own."""

    def __init__(self, params):
        params = list(params)
        super().__init__(params, 0.1)
        self.optim = torch.optim.SGD(params, 0.1, momentum=0.9)

    def step(self, closure=None):
        return self.optim.step(closure)


class History(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["seen"] = [p.detach().clone(), None]
            self.state[p]["rows"] = {"sum": self.rows(p.detach())}

    def rows(self, p: Tensor) -> Tensor:
        return p.clone()


class Rows(History):
    def rows(self, p: Tensor) -> Tensor:
        return p.flatten(1).sum(1) if p.ndim > 1 else p.clone()


def test_tensors_inside_optimizer_state_are_sliced(small):
    model, graph, keep = small
    optimizer = History(model.parameters(), 0.1)
    train(model, optimizer)
    slim = ms.prune(model, graph, keep, optimizer=optimizer)
    for p in slim.parameters():
        assert torch.equal(optimizer.state[p]["seen"][0], p)
        assert torch.equal(optimizer.state[p]["rows"]["sum"], p)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Apart, "Apart wraps an optimizer, SGD, with parameter groups of its own"),
        (lambda p: Rows(p, 0.1), r"'rows' of 0\.weight has shape \(8,\)"),
    ],
)
def test_optimizers_that_cannot_follow_are_refused_and_left_alone(small, make, why):
    model, graph, keep = small
    optimizer = make(model.parameters())
    train(model, optimizer)
    state = dict(optimizer.state)
    with pytest.raises(ms.MaskSparsityError, match=why):
        ms.prune(model, graph, keep, optimizer=optimizer)
    assert dict(optimizer.state) == state
    held = optimizer.param_groups[0]["params"]
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("conv", "memory_format", "size"),
    [
        (nn.Conv2d, torch.channels_last, (8, 8)),
        (nn.Conv3d, torch.channels_last_3d, (6, 6, 6)),
    ],
)
def test_weights_keep_their_memory_format(conv, memory_format, size):
    model = nn.Sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 4, 3)).to(memory_format=memory_format)
    graph = ms.trace(model, torch.randn(1, 3, *size))
    slim = ms.prune(model, graph, ms.select.uniform(graph, ms.scores.norm(model, graph), 0.5))
    assert slim[2].weight.shape[1] == 4
    assert slim[2].weight.is_contiguous(memory_format=memory_format)
