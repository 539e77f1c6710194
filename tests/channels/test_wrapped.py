"""Models in data-parallel wrappers and `torch.compile`: the network inside is meant."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import masksparsity as ms

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


WRAPPERS: dict[str, Callable] = {
    "DDP": nn.parallel.DistributedDataParallel,
    "compile": compiled,
    "compile in place": compiled_in_place,
    "DDP of compiled": lambda model: nn.parallel.DistributedDataParallel(compiled(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_analysed_trained_and_pruned_as_the_bare_one(
    wrapper, process_group, tmp_path
):
    torch.manual_seed(0)
    bare = ms.models.create("resnet20", width=4)
    model = WRAPPERS[wrapper](copy.deepcopy(bare))
    model(X)  # what compiles, has compiled
    graph = ms.trace(model, X)
    assert [repr(g) for g in graph.groups] == [repr(g) for g in ms.trace(bare, X).groups]
    keep = ms.select.uniform(graph, ms.scores.scale(model, graph), 0.5)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ms.MaskedL1(model, graph, keep).attach(optimizer)
    ms.ScheduledDecay(model, graph, keep, steps=1).attach(optimizer)
    model(X).square().sum().backward()
    optimizer.step()

    masked = outputs(ms.apply_mask(model, graph, keep))
    slim = ms.prune(model, graph, keep, optimizer=optimizer)
    assert type(slim) is type(bare)
    assert optimizer.param_groups[0]["params"][0] is slim.conv1.weight
    torch.testing.assert_close(outputs(slim), masked, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs(model), masked, rtol=1e-4, atol=1e-5)

    ms.save(model, tmp_path / "dense.safetensors")
    assert torch.equal(outputs(ms.load(tmp_path / "dense.safetensors")), outputs(model))


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model.eval()(X)
