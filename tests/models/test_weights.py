import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import masksparsity as ms
from masksparsity.errors import MaskSparsityError
from masksparsity.models import create, load_weights


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(value, other[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("nest", [None, "state_dict", "model_state", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_the_usual_layouts_load(tmp_path: Path, nest: str | None, prefix: str) -> None:
    source = create("resnet20", width=2)
    state: dict = {prefix + name: value for name, value in source.state_dict().items()}
    torch.save({"epoch": 3, nest: state} if nest else state, tmp_path / "w.pt")
    assert equal(create("resnet20", width=2, weights=tmp_path / "w.pt"), source)


def test_safetensors_load(tmp_path: Path) -> None:
    source = create("resnet20", width=2)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    assert equal(create("resnet20", width=2, weights=str(tmp_path / "w.safetensors")), source)


def test_an_archive_of_the_dense_network_loads(tmp_path: Path) -> None:
    source = create("resnet20", width=2)
    ms.save(source, tmp_path / "w.safetensors")  # with the zeros of its shortcuts
    assert equal(create("resnet20", width=2, weights=tmp_path / "w.safetensors"), source)

    def tied(bias: bool) -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=bias))
        model[1].weight = model[0].weight
        model.register_buffer("scale", torch.randn(2), persistent=False)
        return model

    first, second = tied(True), tied(True)
    ms.save(first, tmp_path / "w.safetensors")
    load_weights(second, tmp_path / "w.safetensors")
    assert equal(second, first)
    assert second[1].weight is second[0].weight
    assert torch.equal(second.get_buffer("scale"), first.get_buffer("scale"))
    with pytest.raises(MaskSparsityError, match=r"1 unexpected: 1\.bias"):
        load_weights(tied(False), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "other", [{"width": 4}, {"shortcut": "B", "width": 2}, {"width": 2, "depth": 32}]
)
def test_another_architecture_leaves_the_model_untouched(tmp_path: Path, other: dict) -> None:
    path = tmp_path / "w.pt"
    torch.save(create(f"resnet{other.pop('depth', 20)}", **other).state_dict(), path)
    model = create("resnet20", width=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MaskSparsityError, match=r"w\.pt.*(unexpected|other shape): \w+"):
        load_weights(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_a_poisoned_file_is_refused_and_does_not_run(tmp_path: Path, how: str) -> None:
    path, trace = tmp_path / "w.pt", tmp_path / "it_ran"
    if how == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Malicious(trace)}))
    else:
        torch.save(
            {"state_dict": Malicious(trace)}, path, _use_new_zipfile_serialization=how == "zip"
        )
    match = "is not a weights file" if how == "pickle" else r"refused.*mkdir.*save the state_dict"
    with pytest.raises(MaskSparsityError, match=match):
        load_weights(create("resnet20", width=2), path)
    assert not trace.exists()


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".th"])
def test_a_truncated_file_says_so(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"w{suffix}"
    state = create("resnet20", width=2).state_dict()
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == ".pt")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(MaskSparsityError, match=rf"w{suffix} .*cut short"):
        load_weights(create("resnet20", width=2), path)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    state = ms.models.create("resnet20", width=2).state_dict()
    state["layer1.0.conv1.weight"][0] = torch.nan
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(MaskSparsityError, match=r"layer1.0.conv1.weight is not finite"):
        load_weights(ms.models.create("resnet20", width=2), tmp_path / "weights.pt")


def test_what_is_no_state_dict_says_so(tmp_path: Path) -> None:
    model = create("resnet20", width=2)
    with pytest.raises(MaskSparsityError, match="no such weights file"):
        load_weights(model, tmp_path / "absent.pt")
    for payload in ([1], {}, {"a": 1}, {1: torch.ones(1)}):
        torch.save(payload, tmp_path / "w.pt")
        with pytest.raises(MaskSparsityError, match="holds no state dict"):
            load_weights(model, tmp_path / "w.pt")


@pytest.mark.parametrize(("name", "correct"), [("resnet20", 932), ("resnet56", 943)])
def test_trained_third_party_weights(shared_data: Path, name: str, correct: int) -> None:
    model = create(name, weights=shared_data / f"{name}-cifar10.th").eval()
    with np.load(shared_data / "cifar10-test-lossless-1017.npz") as file:
        x, y = torch.from_numpy(file["x"]), torch.from_numpy(file["y"])
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.inference_mode():
        logits = torch.cat([model((part / 255 - mean) / std) for part in x.split(256)])
    assert int((logits.argmax(1) == y).sum()) == correct
