"""Traces that compute no convolution: they say what those with values say, or have values."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import masksparsity as ms
from masksparsity.tracing import forward

from .networks import networks
from .test_hidden import Middle


def by_first_mean(s, x):
    """Channels are rolled if the convolution before gave less than ones."""
    return x.roll(1, 1) if x.mean() < 0.9 else x


def caught(s, x):
    try:
        return by_first_mean(s, x)
    except:  # noqa: E722
        return x


def summary(graph: ms.ChannelGraph) -> list:
    return [
        (g.name, g.size, str(g.reason), [(s.tensor, s.axis, s.index.tolist()) for s in g.slices])
        for g in graph.groups
    ]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(model=networks())
def test_the_same_graph_as_with_values(model):
    x = torch.randn(2, 3, 8, 8)
    made_up = ms.trace(model, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "_stand_in", lambda *args: None)
        assert summary(made_up) == summary(ms.trace(model, x))


def test_no_convolution_is_computed_where_values_do_not_matter(monkeypatch):
    outs, stand_in = [], forward._stand_in

    def watched(*args):
        outs.append(stand_in(*args))
        return outs[-1]

    monkeypatch.setattr(forward, "_stand_in", watched)
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
    out = forward._stand_in(x, layer.weight, layer.bias, *lists, False, [0] * dims, 2)
    assert out.shape == layer(x).shape
    assert out.stride() == layer(x).stride()


@pytest.mark.parametrize(
    "way", [by_first_mean, caught, lambda s, x: x.roll(int(x.numpy().mean() < 0.9), 1)]
)
def test_code_that_decides_by_values_has_them(way):
    model = Middle(way).eval()
    for p in model.parameters():
        p.data.clamp_(max=0.1)
    graph = ms.trace(model, torch.rand(1, 3, 4, 4))
    assert not graph.made_up
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "_stand_in", lambda *args: None)
        assert summary(graph) == summary(ms.trace(model, torch.rand(1, 3, 4, 4)))


def test_a_choice_of_elements_by_values_has_them():
    def positive(s, x: Tensor) -> Tensor:
        return x + torch.zeros(len(x[x < 0.9]) + 1).sum()

    assert not ms.trace(Middle(positive), torch.rand(1, 3, 4, 4)).made_up


def test_a_model_that_does_not_run_is_told_with_its_layer():
    with pytest.raises(ms.MaskSparsityError, match=r"does not run on example_inputs.*\(in b\)"):
        ms.trace(Middle(lambda s, x: x[:, :7]), torch.rand(1, 3, 4, 4))
