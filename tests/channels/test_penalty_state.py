"""What a penalty keeps, and of which tensors: resumed, of other masks, modes and dtypes."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import masksparsity as ms

from .networks import random_mask
from .penalised import INPUTS, OPTIMIZERS, PENALTIES, network, step


@pytest.fixture
def bound():
    model = network()
    graph = ms.trace(model, INPUTS)
    return model, graph, random_mask(graph, 1)


def attached(kind, model, graph, keep):
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    penalty = PENALTIES[kind](model, graph, keep)
    penalty.attach(optimizer)
    return optimizer, penalty


@pytest.mark.parametrize("kind", PENALTIES)
def test_resumed_is_uninterrupted(bound, kind):
    model, graph, keep = bound
    opt, penalty = attached(kind, *bound)
    for _ in range(3):
        step(model, opt)
    twin = copy.deepcopy(model)
    again = OPTIMIZERS["sgd"](twin.parameters())
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    resumed = PENALTIES[kind](twin, graph, keep)
    resumed.load_state_dict(copy.deepcopy(penalty.state_dict()))
    resumed.attach(again)
    for _ in range(3):
        step(model, opt)
        step(twin, again)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["proximal", "decay"])
def test_the_state_of_another_penalty_is_refused(bound, kind):
    model, graph, keep = bound
    penalty = PENALTIES[kind](model, graph, keep)
    other = PENALTIES[kind](model, graph, ~keep)
    slim = ms.prune(model, graph, keep)
    narrow = ms.trace(slim, INPUTS)
    before = copy.deepcopy(penalty.state_dict())
    narrower = PENALTIES[kind](slim, narrow, random_mask(narrow, 1))
    for state in (other.state_dict(), narrower.state_dict(), {}):
        with pytest.raises(ms.MaskSparsityError, match="another model or mask"):
            penalty.load_state_dict(state)
    for key, value in penalty.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("kind", PENALTIES)
def test_a_model_converted_since_is_refused(bound, kind):
    model, *_ = bound
    optimizer, penalty = attached(kind, *bound)
    model.double()
    with pytest.raises(ms.MaskSparsityError, match=r"1\.\w+ or .* no longer torch.float32"):
        penalty.apply()
    model.float()
    step(model, optimizer)


@pytest.mark.parametrize("kind", PENALTIES)
def test_a_penalty_made_in_inference_mode_works(bound, kind):
    model, graph, keep = bound
    twin = copy.deepcopy(model)
    for net, inference in ((model, True), (twin, False)):
        with torch.inference_mode(inference):
            penalty = PENALTIES[kind](net, graph, keep)
        optimizer = OPTIMIZERS["sgd"](net.parameters())
        penalty.attach(optimizer)
        step(net, optimizer)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_decay_does_not_depend_on_the_default_dtype(bound, dtype):
    model, graph, keep = bound
    usual = ms.ScheduledDecay(model, graph, keep, steps=1000).state_dict()
    try:
        torch.set_default_dtype(dtype)
        state = ms.ScheduledDecay(model, graph, keep, steps=1000).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    for key, value in usual.items():
        assert value.dtype == state[key].dtype
        assert torch.equal(value, state[key])


def test_a_state_of_another_span_is_refused(bound):
    model, graph, keep = bound
    state = ms.ScheduledDecay(model, graph, keep, steps=10).state_dict()
    with pytest.raises(ms.MaskSparsityError, match="or span"):
        ms.ScheduledDecay(model, graph, keep, steps=10, span=1.0).load_state_dict(state)


def test_decay_drives_the_buffers_of_frozen_norms():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    model[1].bias.normal_()
    model[1].running_mean.normal_()
    graph = ms.trace(model, INPUTS)
    keep = random_mask(graph, 1)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    ms.ScheduledDecay(model, graph, keep, steps=3).attach(optimizer)
    free = model[1].bias.clone()
    for _ in range(3):
        step(model, optimizer)
    kept = keep["0"]
    assert (model[1].bias[~kept] == 0).all()
    assert torch.equal(model[1].bias[kept], free[kept])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slim = ms.prune(model, graph, keep, optimizer=optimizer)
    torch.testing.assert_close(slim(INPUTS), model(INPUTS), rtol=1e-4, atol=1e-5)
