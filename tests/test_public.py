"""The public surface: what other people's scripts call, and what they need installed for it."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import masksparsity as ms

ANY = object()  # a place for a value
CALLS = [
    (ms.models.create, ["resnet56"], {"weights": ANY}),
    (ms.trace, [ANY, ANY], {"protect": ("fc",), "rules": {}}),
    (ms.ChannelGraph.cost, [ANY], {"keep": None}),
    (ms.scores.scale, [ANY, ANY], {}),
    (ms.scores.norm, [ANY, ANY], {}),
    (ms.scores.taylor, [ANY, ANY, ANY], {}),
    (ms.select.threshold, [ANY, ANY, 0.01], {}),
    (ms.select.optimal, [ANY, ANY], {}),
    (ms.select.fraction, [ANY, ANY, 0.5], {}),
    (ms.select.uniform, [ANY, ANY, 0.5], {}),
    (
        ms.select.budget,
        [ANY, ANY],
        {"pruned_macs": 0.5, "round_to": 8, "min_keep": 1, "ignore": ("fc",)},
    ),
    (ms.KeepMask, [ANY, {}], {}),
    (ms.KeepMask.save, [ANY, ANY], {}),
    (ms.KeepMask.load, [ANY, ANY], {}),
    (ms.KeepMask.by_norm, [ANY], {}),
    (ms.KeepMask.from_norms, [ANY, {}], {"tie": "vote"}),
    (ms.KeepMask.from_original, [ANY, ANY], {}),
    (ms.KeepMask.iou, [ANY, ANY], {}),
    (ms.MaskedL1, [ANY, ANY, ANY], {"strength": 5e-4, "kind": "l2"}),
    (ms.MaskedL1, [ANY, ANY, None], {}),
    (ms.Proximal, [ANY, ANY, ANY], {"strength": 5e-4}),
    (ms.ScheduledDecay, [ANY, ANY, ANY], {"steps": 1000}),
    (ms.MaskedL1.attach, [ANY, ANY], {}),
    (ms.MaskedL1.detach, [ANY], {}),
    (ms.MaskedL1.apply, [ANY], {}),
    (ms.apply_mask, [ANY, ANY, ANY], {}),
    (ms.prune, [ANY, ANY, ANY], {"optimizer": None, "absorb": "exact"}),
    (ms.recalibrate, [ANY, ANY], {}),
    (ms.save, [ANY, ANY], {}),
    (ms.load, [ANY], {}),
    (ms.load, [ANY], {"model": ANY}),
    (ms.profile, [ANY, ANY], {}),
    (ms.export, [ANY, ANY, ANY], {}),
]


@pytest.mark.parametrize(
    ("function", "args", "kwargs"), CALLS, ids=lambda v: getattr(v, "__name__", "")
)
def test_is_called_as_the_design_says(function, args, kwargs):
    inspect.signature(function).bind(*args, **kwargs)
    assert inspect.getdoc(function)


def test_groups_and_masks_have_what_the_design_names():
    model = ms.models.create("resnet20", width=4)
    graph = ms.trace(model, torch.randn(1, 3, 16, 16))
    group = graph.groups[0]
    assert (group.name, group.size, group.prunable, group.reason) == ("conv1", 4, True, None)
    assert group.scales[0] == "bn1"
    assert {s.tensor for s in group.slices} > {"conv1.weight", "bn1.weight", "bn1.running_var"}
    assert [g.prunable for g in graph.protected] == [False]
    assert {*graph.protected, *graph.prunable} == {*graph.groups}
    keep = ms.KeepMask(graph, {group.name: torch.tensor([True, False, True, True])})
    assert (~~keep & keep | keep) == keep
    assert 0 < keep.pruned_fraction < 1
    assert issubclass(ms.MaskSparsityError, ValueError)


def test_every_public_name_is_there():
    assert sorted(ms.__all__) == ms.__all__
    assert all(hasattr(ms, name) for name in ms.__all__)


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


def test_a_slim_archive_needs_torch_safetensors_and_the_users_code(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Mine().eval(), torch.randn(2, 3, 8, 8)
    graph = ms.trace(model, x)
    slim = ms.prune(model, graph, ms.select.uniform(graph, ms.scores.norm(model, graph), 0.5))
    ms.save(slim, tmp_path / "slim.safetensors")
    torch.save({"x": x, "y": slim(x).detach()}, tmp_path / "example.pt")
    (tmp_path / "mine.py").write_text(
        f"import torch\nfrom torch import nn\n{inspect.getsource(Mine)}"
    )
    code = """
import sys
for name in ("numpy", "torchvision", "timm", "tyro", "rich", "matplotlib", "PIL"):
    sys.modules[name] = None
import torch, masksparsity
from mine import Mine
example = torch.load("example.pt", weights_only=True)
slim = masksparsity.load("slim.safetensors", model=Mine())
assert slim.head.in_features == 4
torch.testing.assert_close(slim(example["x"]), example["y"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
