"""What cannot be meant is refused by a word of ours, where Python or torch would not help."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import masksparsity as ms


@pytest.fixture(scope="module")
def given() -> SimpleNamespace:
    torch.manual_seed(0)
    model, x = ms.models.create("resnet20", width=4), torch.randn(2, 3, 32, 32)
    graph, wider = ms.trace(model, x), ms.trace(ms.models.create("resnet20", width=8), x)
    scores = ms.scores.scale(model, graph)
    return SimpleNamespace(
        model=model, x=x, graph=graph, scores=scores, other=ms.KeepMask(wider),
        batch=(x, torch.tensor([0, 1])),
    )  # fmt: skip


MISTAKES = {
    "expected a KeepMask, got a NoneType": lambda s: ms.prune(s.model, s.graph, None),
    "got a NoneType: KeepMask": lambda s: ms.apply_mask(s.model, s.graph, None),
    "expected a KeepMask, got a dict": lambda s: s.graph.cost({"conv1": [True]}),
    "made for another graph": lambda s: s.graph.cost(s.other),
    r"min_keep=2\.5, round_to=1: whole": lambda s: ms.select.uniform(
        s.graph, s.scores, 0.5, min_keep=2.5
    ),
    "max_pruned of all is 0.5: not in": lambda s: ms.select.uniform(
        s.graph, s.scores, 0.5, max_pruned="0.5"
    ),
    "latency= is for the budget pruned_latency": lambda s: ms.select.budget(
        s.graph, s.scores, pruned_macs=0.5, latency=lambda keep: 1.0
    ),
    r"the loss is \[2\], not a number": lambda s: ms.scores.taylor(
        s.model, s.graph, [s.batch], nn.CrossEntropyLoss(reduction="none")
    ),
    "runs=0: at least 1": lambda s: ms.latency(s.model, s.graph, runs=0),
    "there is no example": lambda s: ms.trace(s.model, s.x[:0]),
    "resnet20 raised RuntimeError": lambda s: ms.models.create("resnet20", width=-1),
    "no name of a file": lambda s: ms.KeepMask(s.graph).save(""),
    "is a folder": lambda s: ms.load("."),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_is_refused(given, message):
    with pytest.raises(ms.MaskSparsityError, match=message):
        MISTAKES[message](given)


def test_scores_and_masks_of_lists_are_as_good(given):
    listed = {name: values.tolist() for name, values in given.scores.items()}
    keep = ms.select.uniform(given.graph, listed, 0.5)
    again = ms.KeepMask.from_norms(
        given.graph, {name: values.tolist() for name, values in keep.by_norm().items()}
    )
    assert torch.equal(again.units, keep.units)


def test_a_mask_does_not_overwrite_an_archive(given, tmp_path):
    keep, path = ms.KeepMask(given.graph), tmp_path / "net.safetensors"
    ms.save(given.model, path)
    before = path.read_bytes()
    with pytest.raises(ms.MaskSparsityError, match="something else than a mask"):
        keep.save(tmp_path / "net")
    assert path.read_bytes() == before
    keep.save(tmp_path / "mask")
    keep.save(tmp_path / "mask")  # over one of its kind
