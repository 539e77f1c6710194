import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

import masksparsity as ms
from masksparsity import exporting

NETS = {
    "resnet20": lambda: (ms.models.create("resnet20"), 32),
    "mobilenet_v2": lambda: (torchvision.models.mobilenet_v2(), 64),
    "resnet18": lambda: (torchvision.models.resnet18(), 64),
}


def pruned(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, size = NETS[name]()
    x = torch.randn(1, 3, size, size)
    ms.recalibrate(model, [torch.randn(4, 3, size, size)])
    graph = ms.trace(model, x)
    return ms.prune(model, graph, ms.select.uniform(graph, ms.scores.scale(model, graph), 0.5)), x


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("name", NETS)
def test_the_file_computes_what_the_model_does_at_any_batch(
    name: str, suffix: str, tmp_path: Path
) -> None:
    if suffix == ".onnx":
        for library in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(library)
    slim, x = pruned(name)
    slim.train()
    next(slim.children()).eval()
    modes = [m.training for m in slim.modules()]
    before = {k: v.clone() for k, v in slim.state_dict().items()}
    path = tmp_path / f"slim{suffix}"
    ms.export(slim, x, path)
    assert [m.training for m in slim.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in slim.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    batch = torch.randn(5, *x.shape[1:])
    with torch.no_grad():
        expected = slim.eval()(batch)
    torch.testing.assert_close(run(path, batch), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="exports from a GPU: needs one")
def test_a_file_from_a_gpu_is_for_the_cpu(tmp_path: Path) -> None:
    model, path = ms.models.create("resnet20").cuda(), tmp_path / "dense.pt2"
    ms.export(model, torch.randn(1, 3, 32, 32, device="cuda"), path)
    assert next(model.parameters()).is_cuda
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        expected = model.cpu().eval()(x)
    torch.testing.assert_close(run(path, x), expected, rtol=1e-3, atol=1e-4)


def run(path: Path, x: Tensor) -> Tensor:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(x)
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    (value,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {value.name: x.numpy()})[0])


class Two(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor | None]:
        return {"sum": left + right, "none": None, "product": left * right}


def test_keyword_inputs_and_several_outputs(tmp_path: Path) -> None:
    path = tmp_path / "two.pt2"
    ms.export(Two(), {"left": torch.randn(2, 3), "right": torch.randn(2, 3)}, path)
    x = torch.randn(4, 3)
    assert torch.equal(torch.export.load(path).module()(left=x, right=x)["sum"], x + x)


def test_onnx_names_outputs_by_their_keys(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    x = torch.randn(2, 3)
    for model, inputs, names in (
        (Two(), (x, x), ["sum", "product"]),
        (nn.Linear(3, 2), x, ["output"]),
    ):
        ms.export(model, inputs, tmp_path / "model.onnx")
        outputs = runtime.InferenceSession(tmp_path / "model.onnx").get_outputs()
        assert [value.name for value in outputs] == names


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_forward_that_writes_to_its_input(tmp_path: Path, suffix: str) -> None:
    class Ranged(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x *= 255
            return super().forward(x) / 255

    x = torch.randn(2, 3, 8, 8)
    before = x.clone()
    ms.export(Ranged(nn.Conv2d(3, 4, 3)), x, tmp_path / f"net{suffix}")
    assert torch.equal(x, before)


def test_wrappers_that_take_any_arguments(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    ms.export(averaged, torch.randn(2, 3, 8, 8), tmp_path / "slim.pt2")
    assert (tmp_path / "slim.pt2").exists()


def test_a_file_that_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: nn.Module, inputs: exporting.Inputs) -> tuple[bytes, exporting.Run]:
        return b"", lambda inputs: [model(*inputs[0]) * (1 + 1e-3)]

    monkeypatch.setitem(exporting._FORMATS, ".pt2", wrong)
    path = tmp_path / "model.pt2"
    path.write_text("as it was")
    with pytest.raises(ms.MaskSparsityError, match=r"model\.pt2: not written, its output .* of 2"):
        ms.export(nn.Linear(3, 2), torch.randn(2, 3), path)
    assert path.read_text() == "as it was"


class OneSize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, 12)


def test_mistakes_name_the_file_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 12)
    with pytest.raises(ms.MaskSparsityError, match=r"model\.pth.*\.onnx or \.pt2"):
        ms.export(nn.Identity(), x, tmp_path / "model.pth")
    with pytest.raises(ms.MaskSparsityError, match=r"one\.pt2.*batch of any length"):
        ms.export(OneSize(), x, tmp_path / "one.pt2")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ms.MaskSparsityError, match=r"model\.onnx.*pip install onnx onnxscript"):
        ms.export(nn.Identity(), x, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Counting(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor | int]:
        return {"twice": 2 * x, "count": x.ndim}


def test_outputs_that_onnx_lacks_are_named(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(ms.MaskSparsityError, match=r"n\.onnx.*output\['count'\] is 2.*\.pt2"):
        ms.export(Counting(), torch.randn(2, 3), tmp_path / "n.onnx")


class Coloured(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("\x1b[31mred\x1b[0m")


def test_messages_have_no_colours(tmp_path: Path) -> None:
    with pytest.raises(ms.MaskSparsityError, match=r": red$"):
        ms.export(Coloured(), torch.randn(2, 3), tmp_path / "a.pt2")


def test_onnx_without_onnxruntime_says_that_it_is_not_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.warns(UserWarning, match=r"model\.onnx is written but not compared"):
        ms.export(nn.Linear(3, 2), torch.randn(2, 3), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size > 0
