import copy
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import masksparsity as ms


@pytest.fixture(scope="module")
def bound():
    torch.manual_seed(0)
    model = ms.models.create("resnet20", num_classes=7).eval()
    x = torch.randn(2, 3, 32, 32)
    graph = ms.trace(model, x)
    keep = ms.select.budget(graph, ms.scores.norm(model, graph), pruned_macs=0.6)
    return model, graph, keep, x


def test_a_mask_survives_its_file(bound, tmp_path):
    _, graph, keep, _ = bound
    keep.save(tmp_path / "mask.json")
    for name in ("mask.json", "mask.safetensors", "mask"):
        again = ms.KeepMask.load(tmp_path / name, graph)
        assert again == keep
        assert again.origin == keep.origin
    about = json.loads((tmp_path / "mask.json").read_text())
    assert about["macs"]["slim"] == graph.cost(keep).macs
    assert about["kept"]["conv1"] == [int(keep["conv1"].sum()), 16]


def test_what_selectors_were_given_is_saved_with_a_mask(bound, tmp_path):
    _, graph, keep, _ = bound
    keep = ms.KeepMask(graph, dict(keep))
    keep.origin = {"a": torch.tensor(0.5), "b": np.float32(0.5), "c": torch.inf, "d": {"y", "x"},
                   "e": {"layer": (torch.float32, 1)}}  # fmt: skip
    keep.save(tmp_path / "mask")
    found = ms.KeepMask.load(tmp_path / "mask", graph).origin
    assert found == {"a": 0.5, "b": 0.5, "c": "inf", "d": ["x", "y"],
                     "e": {"layer": ["torch.float32", 1]}}  # fmt: skip
    (tmp_path / "mask.json").write_text('{"origin": 5}')
    with pytest.raises(ms.MaskSparsityError, match=r"mask\.json is damaged"):
        ms.KeepMask.load(tmp_path / "mask", graph)


def test_a_mask_of_another_model_is_refused(bound, tmp_path):
    _, _, keep, x = bound
    keep.save(tmp_path / "mask")
    other = ms.trace(ms.models.create("resnet20", width=8), x)
    with pytest.raises(ms.MaskSparsityError, match=r"mask\.safetensors: mask of .*: expected"):
        ms.KeepMask.load(tmp_path / "mask", other)
    deeper = ms.trace(ms.models.create("resnet32"), x)  # with layers of the same names and widths
    with pytest.raises(ms.MaskSparsityError, match=r"says nothing of layer1\.3\.conv1"):
        ms.KeepMask.load(tmp_path / "mask", deeper)


def test_an_archive_rebuilds_the_slim_model(bound, tmp_path):
    model, graph, keep, x = bound
    slim = ms.prune(model, graph, keep)
    ms.save(slim, tmp_path / "slim.safetensors")
    for again in (
        ms.load(tmp_path / "slim.safetensors"),
        ms.load(tmp_path / "slim.safetensors", model),
    ):
        with torch.no_grad():
            assert torch.equal(again(x), slim(x))
        assert again.layer1[0].conv1.out_channels == int(keep["layer1.0.conv1"].sum())
        # As torch aligns what it makes: or some products would differ in the last bit.
        assert all(p.data_ptr() % 64 == 0 for p in again.parameters())
        again.load_state_dict(slim.state_dict())
        ms.prune(again, *_half(again, x))  # a slim model can be pruned again
    assert model.layer1[0].conv1.out_channels == 16


def test_a_graph_and_its_mask_can_be_pickled(bound):
    model, _, keep, x = bound
    graph, again = pickle.loads(pickle.dumps((ms.trace(model, x), keep)))
    slim = ms.prune(model, graph, ms.KeepMask(graph, dict(again)))
    with torch.no_grad():
        assert torch.equal(slim(x), ms.prune(model, keep.graph, keep)(x))


def test_an_archive_takes_the_memory_format_of_the_dense_model(bound, tmp_path):
    model, graph, keep, _ = bound
    ms.save(ms.prune(model, graph, keep), tmp_path / "slim.safetensors")
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    again = ms.load(tmp_path / "slim.safetensors", model).layer1[0].conv1.weight
    assert again.is_contiguous(memory_format=torch.channels_last)


def _half(model, x):
    graph = ms.trace(model, x)
    return graph, ms.select.uniform(graph, ms.scores.norm(model, graph), 0.5)


def test_groups_of_convolutions_come_back(tmp_path):
    model = ms.models.create("torchvision/mobilenet_v2", width_mult=0.25).eval()
    x = torch.randn(1, 3, 32, 32)
    slim = ms.prune(model, *_half(model, x))
    ms.save(slim, tmp_path / "slim.safetensors")
    with torch.no_grad():
        assert torch.equal(ms.load(tmp_path / "slim.safetensors")(x), slim(x))


def test_a_users_own_model_needs_its_dense_form(tmp_path):
    dense = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3)
    ).eval()
    x = torch.randn(1, 3, 8, 8)
    slim = ms.prune(dense, *_half(dense, x))
    ms.save(slim, tmp_path / "slim.safetensors")
    with pytest.raises(ms.MaskSparsityError, match="model="):
        ms.load(tmp_path / "slim.safetensors")
    with torch.no_grad():
        assert torch.equal(ms.load(tmp_path / "slim.safetensors", model=dense)(x), slim(x))


def test_a_model_whose_train_returns_nothing_is_loaded(tmp_path):
    class Net(nn.Sequential):
        def train(self, mode: bool = True) -> None:
            super().train(mode)

    dense, x = Net(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)), torch.randn(1, 3, 8, 8)
    slim = ms.prune(dense, *_half(dense, x))
    ms.save(slim, tmp_path / "slim.safetensors")
    assert torch.equal(ms.load(tmp_path / "slim.safetensors", model=dense)(x), slim(x))


class Odd(nn.Module):
    """Tied weights, a frozen one, and buffers of every kind."""

    def __init__(self, kind=None):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=kind is None)
        self.register_buffer("number", torch.tensor(2**40 + 1))
        self.register_buffer("all", torch.randn(6), persistent=False)
        self.register_buffer("part", self.all[2:4])
        if kind is not None:
            self.register_buffer("odd", kind)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_archive_keeps_every_bit_and_what_is_frozen(tmp_path, dtype):
    path, dense = tmp_path / "odd.safetensors", Odd()
    saved = Odd().to(dtype)
    saved.frozen.requires_grad_(False)
    ms.save(saved, path)
    again = ms.load(path, model=dense)
    for (name, a), (_, b) in zip(
        (*again.named_parameters(), *again.named_buffers()),
        (*saved.named_parameters(), *saved.named_buffers()),
        strict=True,
    ):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
        assert a.requires_grad == b.requires_grad, name
    assert again.second.weight is again.first.weight
    assert dense.frozen.requires_grad

    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["masksparsity"])
    del about["frozen"]  # as in the archives of before
    save_file(load_file(path), path, {"masksparsity": json.dumps(about)})
    assert ms.load(path, model=dense).frozen.requires_grad


@pytest.mark.filterwarnings("ignore")  # torch's, of the layouts
@pytest.mark.parametrize("kind", ["sparse", "quantized", "meta", "uninitialized", "complex128"])
def test_tensors_that_cannot_be_stored_are_named(tmp_path, kind):
    made = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "meta": lambda: torch.ones(3, device="meta"),
        "uninitialized": nn.UninitializedBuffer,
        "complex128": lambda: torch.ones(3, dtype=torch.complex128),
    }
    with pytest.raises(ms.MaskSparsityError, match=f"odd is {kind}"):
        ms.save(Odd(made[kind]()), tmp_path / "odd.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_constructor_that_no_file_may_set_asks_for_the_model(tmp_path):
    model = ms.models.create("torchvision/shufflenet_v2_x0_5", num_classes=3)
    object.__setattr__(ms.models.constructor(model), "kwargs", {"norm_layer": nn.BatchNorm2d})
    ms.save(model, tmp_path / "m.safetensors")
    with pytest.raises(ms.MaskSparsityError, match=r"norm_layer=.*pass it as\s+model="):
        ms.load(tmp_path / "m.safetensors")
    ms.load(tmp_path / "m.safetensors", model=model)


def smaller_stem(model: nn.Module) -> None:
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)


def other_activation(model: nn.Module) -> None:
    model.layer1[0].relu = nn.SiLU()


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (smaller_stem, r"conv1.weight is \(\d+, 3, 3, 3\)"),
        (other_activation, r"layer1.0.relu is SiLU\(\), not ReLU"),
        (lambda model: setattr(model.conv1, "stride", (1, 1)), r"conv1 is .*stride=\(1, 1\)"),
        (lambda model: setattr(model, "more", nn.Identity()), r"more is Identity\(\), not None"),
    ],
)
def test_what_has_been_altered_since_it_was_made_asks_for_the_model(alter, said, tmp_path):
    model = ms.models.create("torchvision/resnet18", num_classes=3)
    alter(model)
    inputs = torch.randn(2, 3, 32, 32)
    graph = ms.trace(model.eval(), inputs)
    keep = ms.select.uniform(graph, ms.scores.norm(model, graph), 0.3)
    slim = ms.prune(ms.apply_mask(model, graph, keep), graph, keep)
    ms.save(slim, tmp_path / "m.safetensors")
    with pytest.raises(ms.MaskSparsityError, match=f"altered .*{said}.*as\\s+model="):
        ms.load(tmp_path / "m.safetensors")
    loaded = ms.load(tmp_path / "m.safetensors", model=model)
    assert torch.equal(loaded(inputs), slim(inputs))


def test_what_only_training_sees_may_have_changed(tmp_path):
    model = ms.models.create("torchvision/mobilenet_v2", width_mult=0.35)
    model.classifier[0].p = 0.7
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.momentum = None
    ms.save(model, tmp_path / "m.safetensors")
    inputs = torch.randn(2, 3, 32, 32)
    assert torch.equal(ms.load(tmp_path / "m.safetensors")(inputs), model.eval()(inputs))


def test_what_cannot_be_made_without_values_is_made_with_them(tmp_path):
    state = torch.get_rng_state()
    model = ms.models.create("torchvision/regnet_x_400mf")
    torch.set_rng_state(state)
    ms.save(model, tmp_path / "m.safetensors")
    loaded = ms.load(tmp_path / "m.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))


def test_kernels_are_of_the_size_that_they_had(tmp_path):
    ms.save(nn.Sequential(nn.Conv2d(3, 8, 3)), tmp_path / "m.safetensors")
    with pytest.raises(ms.MaskSparsityError, match=r"0.weight is \(8, 3, 3, 3\)"):
        ms.load(tmp_path / "m.safetensors", model=nn.Sequential(nn.Conv2d(3, 8, 7)))


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a file ran code",))


@pytest.mark.parametrize(
    "change",
    [
        {"groups": None},
        {"constructor": ...},
        {"groups": ...},
        {"constructor": "resnet20"},
        {"constructor": {"name": "resnet20"}},
        {"attributes": [1]},
        {"attributes": {"conv1": 3}},
        {"frozen": 5},
    ],
)
def test_a_header_of_another_form_is_damage(tmp_path, change):
    path, model = tmp_path / "a.safetensors", nn.Linear(2, 2)
    about = {"format": "masksparsity archive 1", "groups": {}, "constructor": None} | change
    header = json.dumps({key: value for key, value in about.items() if value is not ...})
    save_file(model.state_dict(), path, {"masksparsity": header})
    with pytest.raises(ms.MaskSparsityError, match=r"a\.safetensors is damaged"):
        ms.load(path, model=model)


@pytest.mark.parametrize("kind", ["missing", "truncated", "pickle", "plain", "wide", "constructor"])
def test_bad_archives_are_named(bound, tmp_path, kind):
    model, *_ = bound
    path = tmp_path / "slim.safetensors"
    ms.save(model, path)
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "plain":
        save_file({"a": torch.ones(3)}, path)
    elif kind == "wide":
        ms.save(ms.models.create("resnet20", num_classes=8), path)
        with pytest.raises(ms.MaskSparsityError, match=r"slim\.safetensors.*another architecture"):
            ms.load(path, model=model)
        return
    else:
        about = {"format": "masksparsity archive 1", "groups": {},
                 "constructor": {"name": "os:system", "kwargs": {"command": "true"}}}  # fmt: skip
        save_file(model.state_dict(), path, {"masksparsity": json.dumps(about)})
    with pytest.raises(ms.MaskSparsityError, match=r"slim\.safetensors"):
        ms.load(path)


def test_a_poisoned_mask_of_the_original_does_not_run(bound, tmp_path):
    _, graph, *_ = bound
    path = tmp_path / "bad.mask"
    torch.save({"stem.bn": Bomb()}, path)
    with pytest.raises(ms.MaskSparsityError, match=r"bad\.mask.*weights_only"):
        ms.KeepMask.from_original(path, graph)
    torch.save({"encoder.bn": torch.ones(3)}, path)
    with pytest.raises(ms.MaskSparsityError, match=r"encoder\.bn"):
        ms.KeepMask.from_original(path, graph)
