"""Exactness is the specification: what `apply_mask` computes, `prune` computes."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import masksparsity as ms
from masksparsity.tracing.network import named_tensors

from .networks import calibrated, networks, random_mask

TOLERANCE = 1e-9
MODELS = {
    "resnet20-A": (lambda: ms.models.create("resnet20"), 32),
    "resnet20-B": (lambda: ms.models.create("resnet20", shortcut="B"), 32),
    "vgg16_bn": (lambda: ms.models.create("vgg16_bn", width=16), 32),
    "tv-resnet18": (lambda: ms.models.create("torchvision/resnet18"), 32),
    "tv-resnet50": (lambda: ms.models.create("torchvision/resnet50"), 32),
    # As torchvision's VGG, whose own classifier takes a minute in double precision.
    "flattened": (lambda: _flattened(), 32),
    # Narrow: grouped convolutions in double precision have no fast path on the CPU.
    "tv-mobilenet_v2": (lambda: ms.models.create("torchvision/mobilenet_v2", width_mult=0.35), 32),
    "tv-resnet50-grouped": (
        lambda: ms.models.create("torchvision/resnet50", groups=4, width_per_group=16),
        32,
    ),
}


def _flattened() -> nn.Module:
    def block(i: int, o: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(True), nn.MaxPool2d(2)

    head = nn.Linear(16 * 49, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 10)
    flat = nn.AdaptiveAvgPool2d(7), nn.Flatten()
    return nn.Sequential(*block(3, 8), *block(8, 16), *flat, *head)


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, ms.ChannelGraph, Tensor]:
    torch.manual_seed(0)
    build, size = MODELS[request.param]
    inputs = torch.randn(8, 3, size, size, dtype=torch.double)
    model = calibrated(build(), inputs)
    return model, ms.trace(model, inputs), inputs


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31))
def test_masked_equals_pruned(case, seed):
    model, graph, inputs = case
    keep = random_mask(graph, seed)
    masked, slim = ms.apply_mask(model, graph, keep), ms.prune(model, graph, keep)
    with torch.no_grad():
        dense, expected, actual = model(inputs), masked(inputs), slim(inputs)
    assert _distance(expected, actual) <= TOLERANCE
    assert _distance(expected, dense) > 1e-2, "the mask must matter, or the test cannot fail"
    assert graph.cost(keep) == ms.trace(slim, inputs).cost()
    assert graph.cost(keep).params == sum(p.numel() for p in slim.parameters())


def test_a_training_step_agrees(case):
    model, graph, inputs = case
    keep = random_mask(graph, 7)
    masked, slim = ms.apply_mask(model, graph, keep), ms.prune(model, graph, keep)
    for net in (masked, slim):
        for module in net.modules():
            module.training = not isinstance(module, nn.Dropout)
    with torch.random.fork_rng():
        expected, actual = masked(inputs), slim(inputs)
    assert _distance(expected, actual) <= TOLERANCE
    for out in (expected, actual):
        nn.functional.cross_entropy(out, torch.arange(8)).backward()
    ours = dict(named_tensors(slim))
    for name, tensor in named_tensors(masked):
        theirs = tensor if tensor.grad is None else tensor.grad
        for axis in range(tensor.ndim):
            if (name, axis) in graph.slots:
                theirs = theirs.index_select(axis, keep.slot(name, axis).nonzero().squeeze(1))
        mine = ours[name] if tensor.grad is None else ours[name].grad
        assert torch.allclose(mine.double(), theirs.double(), rtol=1e-7, atol=1e-9), name


def test_a_wrong_mask_is_seen(case):
    """Another mask of the same sizes gives another function: the equality above says something."""
    model, graph, inputs = case
    keep = random_mask(graph, 3, most=0.5)
    other = ms.KeepMask(graph, {n: v.flip(0) for n, v in keep.items() if graph.by_name[n].prunable})
    with torch.no_grad():
        masked, slim = ms.apply_mask(model, graph, keep), ms.prune(model, graph, other)
        assert _distance(masked(inputs), slim(inputs)) > 1e-2


def test_random_networks_are_exact_or_refused():
    outcomes: Counter[str] = Counter()

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(model=networks(), seed=st.integers(0, 2**31), empty=st.sampled_from((0.0, 0.2)))
    def check(model, seed, empty):
        outcome, distance = attempt(model, seed, empty)
        outcomes[outcome] += 1
        assert outcome != "wrong", distance

    check()
    assert outcomes["exact"] > outcomes["refused"]


def attempt(model: nn.Module, seed: int, empty: float) -> tuple[str, float]:
    """Trace, mask and prune: "exact", "refused" or "wrong", and the distance."""
    inputs = torch.randn(2, 3, 8, 8, dtype=torch.double)
    model = calibrated(copy.deepcopy(model), inputs)
    graph = ms.trace(model, inputs)
    keep = random_mask(graph, seed, empty=empty)
    try:
        slim = ms.prune(model, graph, keep)
    except ms.MaskSparsityError:
        return "refused", 0.0
    with torch.no_grad():
        distance = _distance(ms.apply_mask(model, graph, keep)(inputs), slim(inputs))
    return ("exact" if distance <= TOLERANCE else "wrong"), distance


def _distance(expected: Any, actual: Any) -> float:
    """Of tensors, or of structures of them."""
    pairs = zip(tree_leaves(expected), tree_leaves(actual), strict=True)
    return max(float(((a - b).abs().max() / a.abs().max()).detach()) for a, b in pairs)
