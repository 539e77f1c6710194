from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from masksparsity.errors import MaskSparsityError
from masksparsity.files import checkpoint


def test_a_tree_comes_back_equal(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    tree = {
        "tensor": "a string",
        "model": {"a.weight": shared, "a.again": shared, "scalar": torch.tensor(3)},
        "list": [1, 2.5, None, True, {"deep": torch.zeros(0, dtype=torch.bfloat16)}, {}, []],
        "image": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        7: "keys need not be strings",
    }
    checkpoint.write(tmp_path / "c.safetensors", tree)
    back = checkpoint.read(tmp_path / "c.safetensors")
    assert back.keys() == tree.keys()
    assert torch.equal(back["image"], tree["image"])
    assert all(torch.equal(back["model"][k], v) for k, v in tree["model"].items())
    assert back["list"][:4] + back["list"][5:] == [1, 2.5, None, True, {}, []]
    deep: Tensor = back["list"][4]["deep"]
    assert (deep.dtype, deep.shape) == (torch.bfloat16, (0,))


def test_bytes_are_a_function_of_the_tree(tmp_path: Path) -> None:
    for name in "ab":
        checkpoint.write(tmp_path / name, {"x": torch.ones(3), "y": {"z": torch.zeros(2)}})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("damage", ["cut", "garbage", "plain", "missing"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "c.safetensors"
    checkpoint.write(path, {"x": torch.randn(100)})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "garbage":
        path.write_bytes(b"\x80\x04no pickle is ever read here")
    elif damage == "plain":
        import safetensors.torch

        safetensors.torch.save_file({"x": torch.ones(1)}, path)
    else:
        path.unlink()
    with pytest.raises(MaskSparsityError, match=r"c\.safetensors"):
        checkpoint.read(path)


def test_optimizer_state_by_name_in_the_layout_of_the_parameters(tmp_path: Path) -> None:
    def make() -> tuple[torch.optim.Optimizer, dict[nn.Parameter, str], nn.Module]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        return optimizer, {p: n for n, p in model.named_parameters()}, model

    optimizer, names, model = make()
    model(torch.ones(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    state = checkpoint.optimizer_state(optimizer, names)
    checkpoint.write(tmp_path / "c", state)

    other, other_names, other_model = make()
    checkpoint.load_optimizer_state(other, other_names, checkpoint.read(tmp_path / "c"))
    first, second = optimizer.state[model.weight], other.state[other_model.weight]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["exp_avg"].stride() == second["exp_avg"].stride()
