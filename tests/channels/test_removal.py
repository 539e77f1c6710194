"""What removal says of channels that are not zero."""

import warnings

import pytest
import torch

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
        ms.prune(ms.models.create("resnet20", width=4), graph, keep, absorb="bias")
        ms.prune(model, graph, ms.KeepMask(graph))
    assert torch.allclose(slim.eval()(X), model.eval()(X), atol=1e-4)


def test_latencies_are_measured_without_a_word():
    model = ms.models.create("resnet20", width=4)
    graph = ms.trace(model, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure = ms.latency(model, graph, runs=2)
        assert measure(ms.select.uniform(graph, ms.scores.norm(model, graph), 0.5)) > 0
