"""Traces that compute no convolution: they say what those with values say, or have values."""

import contextlib
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from torch import nn

import masksparsity as ms
from masksparsity.channels import analysis
from masksparsity.tracing import forward, standin
from masksparsity.tracing.tracer import Tracer

from .middle import Middle
from .networks import networks


def summary(graph: ms.ChannelGraph) -> list:
    return [
        (g.name, g.size, str(g.reason), [(s.tensor, s.axis, s.index.tolist()) for s in g.slices])
        for g in graph.groups
    ]


def made_up_at_first(model: nn.Module, rules: Any, **how: bool) -> Tracer:
    return Tracer(model, rules, made_up="made_up" in how)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(model=networks())
def test_the_same_graph_as_with_values(model):
    x = torch.randn(2, 3, 8, 8)
    real = ms.trace(model, x)
    assert not real.made_up  # these networks are users' code
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "Tracer", made_up_at_first)
        assert summary(ms.trace(model, x)) == summary(real)


def test_no_convolution_is_computed_where_values_do_not_matter(monkeypatch):
    outs = []

    def watched(*args):
        outs.append(standin.stand_in(*args))
        return outs[-1]

    monkeypatch.setattr(forward, "stand_in", watched)
    graph = ms.trace(ms.models.create("resnet20", shortcut="B"), torch.randn(1, 3, 32, 32))
    assert graph.made_up
    assert len(outs) == 21
    assert all(out is not None for out in outs)


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (3, 2, 2)])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_what_stands_in_has_the_shape_of_the_result(dims, stride, padding, dilation):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer = kind(4, 6, 3, stride, padding, dilation, groups=2)
    x = torch.randn(2, 4, *range(7, 7 + dims))
    lists = [[n] * dims for n in (stride, padding, dilation)]
    out = standin.stand_in(x, layer.weight, layer.bias, *lists, False, [0] * dims, 2)
    assert out.shape == layer(x).shape
    assert out.stride() == layer(x).stride()


@pytest.mark.parametrize("sort", ["class", "hook", "global hook", "forward", "activation", "rule"])
def test_code_of_users_sees_real_values(sort):
    seen, rules = [], {}

    def look(*args):
        seen.append(args[-1])

    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with contextlib.ExitStack() as hooks:
        if sort == "class":
            model = Middle(lambda s, x: look(x) or x)
        elif sort == "hook":
            model[0].register_forward_hook(look)
        elif sort == "global hook":
            hooks.callback(nn.modules.module.register_module_forward_hook(look).remove)
        elif sort == "forward":
            model[1].forward = lambda x: look(x) or x.relu()
        elif sort == "activation":
            layer = nn.TransformerEncoderLayer(16, 2, activation=lambda x: look(x) or x.relu())
            model = nn.Sequential(model[0], nn.Flatten(2), layer)
        else:
            rules = {"relu": lambda t, op, args, kwargs, out, inplace: look(out) or t.set(out, ())}
        graph = ms.trace(model, torch.rand(1, 3, 4, 4), rules=rules)
    assert not graph.made_up
    whole = [x for x in seen if x.shape[1] == 8]  # others are of trials
    assert whole
    assert not any((x == 1).all() for x in whole)


def test_values_that_something_looks_at_are_real():
    unflat = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    assert ms.trace(unflat, torch.rand(1, 3, 4, 4)).made_up
    detector = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None
    )
    assert not ms.trace(detector.eval(), torch.rand(1, 3, 320, 320)).made_up


def test_a_divisor_that_is_computed_matters(monkeypatch):
    monkeypatch.setattr(analysis, "Tracer", made_up_at_first)
    divided = Middle(lambda s, x: (x / x.mean(1, keepdim=True).relu()).nan_to_num(1.0, 1.0, -1.0))
    assert not ms.trace(divided, torch.rand(2, 3, 4, 4)).made_up


def test_where_the_memory_format_is_open_it_is_not_guessed():
    x, one = torch.rand(2, 3, 4, 4), torch.rand(2, 4, 4, 1).movedim(-1, 1)
    weight, last = torch.rand(8, 3, 1, 1), torch.rand(8, 1, 1, 3).movedim(-1, 1)
    rest = (None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    assert standin.stand_in(x, weight, *rest) is not None
    assert last.is_contiguous()
    assert standin.stand_in(x, last, *rest) is None
    assert one.is_contiguous()
    assert standin.stand_in(one, weight[:, :1].contiguous(), *rest) is None


def test_a_model_that_does_not_run_is_told_with_its_layer():
    with pytest.raises(ms.MaskSparsityError, match=r"does not run on example_inputs.*\(in b\)"):
        ms.trace(Middle(lambda s, x: x[:, :7]), torch.rand(1, 3, 4, 4))


@pytest.mark.parametrize("pooled", [False, True])
def test_a_batch_of_one_is_doubled_where_a_norm_needs_two(pooled):
    pool = (lambda s, x: s.n(x.mean((2, 3), keepdim=True))) if pooled else (lambda s, x: s.n(x))
    model, x = Middle(pool, n=nn.BatchNorm2d(8)), torch.rand(1, 3, 4, 4)
    graph = ms.trace(model, x)
    assert (graph.training, graph.doubled) == (1, pooled)
    keep = ms.select.uniform(graph, ms.scores.norm(model, graph), 0.5)
    assert ms.prune(model, graph, keep).n.num_features == 4


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_norm_of_another_length_is_refused(name):
    """The operation that a trace calls would read beyond its end."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    tensor = getattr(model[1], name)
    tensor.data = tensor.data[:3]
    with pytest.raises(ms.MaskSparsityError, match="should contain 8 elements not 3"):
        ms.trace(model, torch.randn(1, 3, 8, 8))


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm
        x = torch.batch_norm(
            input=self.conv(x), weight=n.weight, bias=n.bias, running_mean=n.running_mean,
            running_var=n.running_var, training=False, momentum=0.1, eps=n.eps, cudnn_enabled=False,
        )  # fmt: skip
        return self.last(x)


def test_a_norm_may_be_called_with_names():
    whole = torch.batch_norm
    graph = ms.trace(ByName(), torch.randn(1, 3, 8, 8))
    assert torch.batch_norm is whole
    assert [g.name for g in graph.groups if g.reason is None] == ["conv"]
