"""Models in data-parallel wrappers and `torch.compile`: the network inside is meant."""

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import MethodType

import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.prune
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


class Carrying(Tensor):
    """As the tensors of image libraries, which carry a path or an affine along."""


def test_inputs_of_a_class_that_carries_something_along():
    model = ms.models.create("resnet20", width=4)
    plain, carrying = ms.trace(model, X), ms.trace(model, X.as_subclass(Carrying))
    assert [repr(g) for g in carrying.groups] == [repr(g) for g in plain.groups]


def layers() -> nn.Module:
    """Code of a library only."""
    torch.manual_seed(0)
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), *ends)


def centred(module: nn.Module, _: object, out: Tensor) -> Tensor:
    return out - out.mean(1, keepdim=True) if module.training else out


def test_a_hook_that_acts_in_training_is_seen():
    model = layers()
    model[1].register_forward_hook(centred)
    assert [g.name for g in ms.trace(model, X).prunable] == ["2"]
    model = layers()
    model[1].forward = MethodType(lambda self, x: centred(self, None, x.relu()), model[1])
    assert [g.name for g in ms.trace(model, X).prunable] == ["2"]


def test_what_forward_does_only_since_the_trace_is_not_believed():
    model = layers().eval()
    graph = ms.trace(model, X)
    model[1].register_forward_hook(lambda module, _, out: out - out.mean(1, keepdim=True))
    keep = ms.select.uniform(graph, ms.scores.norm(model, graph), 0.5)
    with pytest.raises(ms.MaskSparsityError, match="reduced over channels"):
        ms.prune(model, graph, keep)


class Threaded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = layers()

    def forward(self, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self.layers, x).result()


def test_layers_in_another_thread_are_refused():
    with pytest.raises(ms.MaskSparsityError, match=r"layers runs in a thread of its own"):
        ms.trace(Threaded(), X)


def test_models_are_traced_in_several_threads():
    models = [layers() for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        graphs = list(pool.map(lambda model: ms.trace(model, X), models))
    assert [len(graph.prunable) for graph in graphs] == [2] * 8


class Teacher(nn.Conv2d):
    def __deepcopy__(self, memo: dict) -> nn.Module:
        return self


def test_what_cannot_be_copied_is_not_written_to():
    model = nn.Sequential(Teacher(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    graph, before = ms.trace(model, X), model[0].weight.clone()
    keep = ms.select.uniform(graph, ms.scores.norm(model, graph), 0.5)
    for use in (ms.apply_mask, ms.prune):
        with pytest.raises(ms.MaskSparsityError, match=r"a copy has the same 0\.weight|its size"):
            use(model, graph, keep)
    assert torch.equal(model[0].weight, before)


def test_what_cannot_be_copied_is_named():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU()), nn.Conv2d(8, 4, 3))
    model[1][0].lock = threading.Lock()
    graph = ms.trace(model, X)
    keep = ms.select.uniform(graph, ms.scores.norm(model, graph), 0.5)
    with pytest.raises(ms.MaskSparsityError, match=r"lock' object \(in 1\.0\.lock\)"):
        ms.prune(model, graph, keep)


def test_a_model_without_values_is_pruned_but_not_run(tmp_path):
    with torch.device("meta"):
        model, x = ms.models.create("resnet20", width=4), torch.empty(2, 3, 16, 16)
    graph = ms.trace(model, x)
    keep = ms.KeepMask(graph, {g.name: torch.arange(g.size) % 2 == 0 for g in graph.prunable})
    slim = ms.prune(model, graph, keep)
    assert sum(p.numel() for p in slim.parameters()) == graph.cost(keep).params
    for run in (
        lambda: ms.scores.norm(model, graph),
        lambda: ms.profile(model, x),
        lambda: ms.export(model, x, tmp_path / "m.pt2"),
    ):
        with pytest.raises(ms.MaskSparsityError, match=r"conv1\.weight is on the meta device"):
            run()


def test_mistaken_arguments_are_named():
    model = layers()
    graph = ms.trace(model, X)
    with pytest.raises(ms.MaskSparsityError, match=r"expected an nn\.Module, got a function"):
        ms.trace(lambda x: x, X)
    with pytest.raises(ms.MaskSparsityError, match="expected a KeepMask, got a dict"):
        ms.prune(model, graph, {"0": torch.ones(8) > 0})
    with pytest.raises(ms.MaskSparsityError, match="batches of"):
        ms.scores.taylor(ms.models.create("resnet20"), ms.trace(ms.models.create("resnet20"), X), X)


def test_numbers_that_cannot_be_meant_are_named():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)
    )
    graph = ms.trace(model, X)
    keep = ms.select.uniform(graph, ms.scores.norm(model, graph), 0.5)
    for kind in (ms.MaskedL1, ms.Proximal):
        with pytest.raises(ms.MaskSparsityError, match="strength=inf"):
            kind(model, graph, keep, strength=float("inf"))
    with pytest.raises(ms.MaskSparsityError, match="steps=nan"):
        ms.ScheduledDecay(model, graph, keep, steps=float("nan"))  # type: ignore[arg-type]
    with pytest.raises(ms.MaskSparsityError, match="energy=2"):
        ms.select.optimal(graph, ms.scores.norm(model, graph), 2)


def test_a_mask_does_not_change_through_what_it_gives_out():
    graph = ms.trace(layers(), X)
    keep = ms.KeepMask(graph)
    for name in keep:
        keep[name][0] = False
    assert keep == ms.KeepMask(graph)


class Features(nn.Module):
    """A hook that holds the module, as feature extractors have it; a forward wrapped in another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.kept = layers(), {}
        self.layers[1].register_forward_hook(lambda m, _, out: self.kept.__setitem__("relu", out))
        plain = self.layers[2].forward
        self.layers[2].forward = lambda x, times=self.times: times() * plain(x)

    def times(self) -> float:
        return 2.0 if self.kept else 0.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.kept.clear()
        return self.layers(x), self.kept["relu"].mean((2, 3))


def test_functions_that_hold_the_model_hold_the_copy_in_a_copy():
    model = Features().eval()
    graph = ms.trace(model, X)
    assert [g.name for g in graph.prunable] == ["layers.2"]
    keep = ms.select.uniform(graph, ms.scores.norm(model, graph), 0.5)
    masked, slim = ms.apply_mask(model, graph, keep), ms.prune(model, graph, keep)
    for a, b in zip(masked(X), slim(X), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert not model.kept
    assert slim.kept


def test_a_compiled_forward_is_looked_into():
    model = layers()
    model.forward = torch.compile(model.forward, backend="eager")
    graph = ms.trace(model, X)
    assert [g.name for g in graph.prunable] == ["0", "2"]
    keep = ms.select.uniform(graph, ms.scores.norm(model, graph), 0.5)
    assert ms.prune(model, graph, keep)(X).shape == (2, 2)


@pytest.mark.parametrize("wrapper", [compiled, compiled_in_place])
def test_compiled_parts_run_as_they_were_written(wrapper):
    torch.manual_seed(0)
    model = ms.models.create("resnet20", width=4).eval()
    model.layer2, model.bn1 = wrapper(model.layer2), wrapper(model.bn1)
    outputs(model)
    graph = ms.trace(model, X)
    (scales,) = (g.scales for g in graph.groups if "layer1.0.bn2" in g.scales)
    assert scales[0].startswith("bn1")
    keep = ms.select.uniform(graph, ms.scores.scale(model, graph), 0.5)
    masked, slim = ms.apply_mask(model, graph, keep), ms.prune(model, graph, keep)
    torch.testing.assert_close(outputs(slim), outputs(masked), rtol=1e-4, atol=1e-5)


def test_a_trace_inside_of_autocast_sees_the_weights():
    model = layers()
    with torch.autocast("cpu", torch.bfloat16):
        model(X)  # casts of the weights are kept by now
        assert [g.name for g in ms.trace(model, X).prunable] == ["0", "2"]


def test_weights_pruned_one_by_one_are_as_slim_as_what_they_are_made_of():
    model = layers()
    nn.utils.prune.l1_unstructured(model[2], "weight", amount=0.4)
    graph = ms.trace(model, X)
    slim = ms.prune(model, graph, ms.select.uniform(graph, ms.scores.norm(model, graph), 0.5))
    assert slim[2].weight.shape == slim[2].weight_orig.shape == (4, 4, 3, 3)
    nn.utils.prune.l1_unstructured(slim[2], "weight", amount=0.4)
