import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import masksparsity as ms

from .networks import random_mask


@pytest.fixture(scope="module")
def graph() -> ms.ChannelGraph:
    return ms.trace(ms.models.create("resnet20"), torch.randn(1, 3, 32, 32))


@pytest.fixture(scope="module")
def resnet50() -> ms.ChannelGraph:
    return ms.trace(torchvision.models.resnet50(), torch.randn(1, 3, 224, 224))


def test_unnamed_groups_are_kept_whole(graph):
    keep = ms.KeepMask(graph, {"layer1.0.conv1": torch.arange(16) < 4})
    assert keep["layer1.0.conv1"].sum() == 4
    assert keep.kept.sum() == graph.units - 12
    assert keep.pruned_fraction == pytest.approx(12 / sum(g.size for g in graph.prunable))
    assert ms.KeepMask(graph, keep) == keep  # a mapping, of all groups
    for plain in ([k < 4 for k in range(16)], (torch.arange(16) < 4).numpy()):
        assert ms.KeepMask(graph, {"layer1.0.conv1": plain}) == keep
    assert list(keep) == [g.name for g in graph.groups]
    assert "layer1.0.conv1" in keep
    assert "layer1" not in keep
    norms = keep.by_norm()
    assert norms["layer1.0.bn1"].tolist() == [True] * 4 + [False] * 12
    assert all(v.all() for n, v in norms.items() if n != "layer1.0.bn1")


def test_repair_leaves_the_mask_as_it_is(graph):
    keep = ms.KeepMask(graph, {"conv1": torch.zeros(16, dtype=torch.bool)})
    assert keep.repaired()["conv1"].sum() == 1
    assert keep["conv1"].sum() == 0


@given(seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)))
def test_algebra(graph, seeds):
    a, b = (random_mask(graph, seed) for seed in seeds)
    assert ~~a == a
    assert ~(a & b) == (~a | ~b)
    assert (a & b).kept.sum() <= a.kept.sum() <= (a | b).kept.sum()
    assert a.iou(a) == 1
    assert a.iou(b) == b.iou(a)
    assert graph.cost(a & b).macs <= graph.cost(a).macs <= graph.cost().macs


def test_iou_of_what_has_no_norms():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 4, 1))
    graph = ms.trace(model, torch.randn(1, 3, 4, 4))
    keep = ms.KeepMask(graph, {"0": torch.arange(8) < 4})
    other = ms.KeepMask(graph, {"0": torch.arange(8) < 6})
    assert (keep.iou(~keep), keep.iou(other)) == (0, 0.5)


@given(seed=st.integers(0, 999))
def test_norms_and_back(graph, seed):
    keep = random_mask(graph, seed)
    assert ms.KeepMask.from_norms(graph, keep.by_norm(), tie="equal") == keep


def test_ties(graph):
    """Ten norms share the stem's channels: nine want 0..7 away, the most cautious only 0..3."""
    group = graph.groups[0]
    wants = {n: torch.arange(16) >= 8 for n in group.scales}
    norms = {n.module: len(graph.slots[n.weight, 0]) for n in graph.norms}
    offset = {16: 0, 32: 8, 64: 24}  # option A places the stem's channels in the middle
    masks = {}
    for k, (name, want) in enumerate(wants.items()):
        masks[name] = torch.ones(norms[name], dtype=torch.bool)
        want = torch.arange(16) >= 4 if k == 3 else want
        start = offset[norms[name]]
        masks[name][start : start + 16] = want
    gone = {
        tie: (~ms.KeepMask.from_norms(graph, masks, tie)[group.name]).nonzero().flatten().tolist()
        for tie in ("vote", "any", "all")
    }
    assert gone == {"vote": [0, 1, 2, 3], "any": list(range(8)), "all": [0, 1, 2, 3]}
    with pytest.raises(ms.MaskSparsityError, match="disagree"):
        ms.KeepMask.from_norms(graph, masks, "equal")


def test_a_vote_never_drops_a_whole_group(graph):
    masks = {
        n.module: torch.zeros(len(graph.slots[n.weight, 0]), dtype=torch.bool) for n in graph.norms
    }
    assert (ms.KeepMask.from_norms(graph, masks).kept > 0).all()


@pytest.mark.parametrize(
    ("name", "macs", "params"), [("uniform", 54.68, 53.76), ("flops70", 30.01, 27.43)]
)
def test_masks_of_the_original(resnet50, real_data, name, macs, params):
    keep = ms.KeepMask.from_original(real_data / f"masksparsity-resnet50-{name}.mask", resnet50)
    dense, slim = resnet50.cost(), resnet50.cost(keep)
    assert round(100 * (1 - slim.macs / dense.macs), 2) == macs
    assert round(100 * (1 - slim.params / dense.params), 2) == params
    pruned = ms.trace(
        ms.prune(torchvision.models.resnet50(), resnet50, keep), torch.randn(1, 3, 224, 224)
    )
    assert pruned.cost() == slim


def test_iou_of_the_original_masks(resnet50, real_data):
    masks = [
        ms.KeepMask.from_original(real_data / f"masksparsity-resnet50-{n}.mask", resnet50)
        for n in ("uniform", "flops70")
    ]
    assert round(masks[0].iou(masks[1]), 3) == 0.070


def test_mistakes_are_named(graph, resnet50):
    with pytest.raises(ms.MaskSparsityError, match="'nowhere'"):
        ms.KeepMask(graph, {"nowhere": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(ms.MaskSparsityError, match="expected 16 bools"):
        ms.KeepMask(graph, {"conv1": torch.ones(8, dtype=torch.bool)})
    with pytest.raises(ms.MaskSparsityError, match=r"expected bools, got torch\.float32"):
        ms.KeepMask(graph, {"conv1": torch.ones(16)})
    with pytest.raises(ms.MaskSparsityError, match="protected"):
        ms.KeepMask(graph, {"linear": torch.zeros(10, dtype=torch.bool)})
    with pytest.raises(ms.MaskSparsityError, match="no BatchNorm"):
        ms.KeepMask.from_norms(graph, {"bn9": torch.ones(3)})
    with pytest.raises(ms.MaskSparsityError, match="made for another graph"):
        ms.KeepMask(graph).iou(ms.KeepMask(resnet50))
    with pytest.raises(ms.MaskSparsityError, match="expected a KeepMask, got a dict"):
        ms.KeepMask(graph) & {}
    model = ms.models.create("resnet20")
    for use in (ms.prune, ms.apply_mask, ms.MaskedL1):
        with pytest.raises(ms.MaskSparsityError, match="mask was made for another graph"):
            use(model, graph, ms.KeepMask(resnet50))
    scores = ms.scores.norm(model, graph)
    keep = ms.select.uniform(graph, scores, 0.5)
    for swapped in (
        lambda: ms.prune(graph, model, keep),
        lambda: ms.prune(model, keep, graph),
        lambda: ms.apply_mask(graph, model, keep),
        lambda: ms.ScheduledDecay(graph, model, keep, steps=3),
        lambda: ms.MaskedL1(graph, model, keep),
        lambda: ms.scores.scale(graph, model),
        lambda: ms.select.budget(scores, graph, pruned_macs=0.5),
        lambda: ms.KeepMask(model),
        lambda: ms.KeepMask.load(graph, "mask.json"),
        lambda: ms.export(model, "a.onnx", torch.randn(1, 3, 32, 32)),
        lambda: ms.prune(model, graph, keep, optimizer=model.parameters()),
    ):
        with pytest.raises(ms.MaskSparsityError, match=r"expected |example_inputs: a tensor"):
            swapped()
    first = random_mask(graph, 0)
    wrapped = nn.Sequential(ms.prune(model, graph, first))
    later = random_mask(ms.trace(wrapped, torch.randn(1, 3, 32, 32)), 1)
    with pytest.raises(
        ms.MaskSparsityError, match=r"prunes 0\.\S+, which is no channel group here"
    ):
        first.compose(later)


@given(seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)))
@settings(max_examples=10, deadline=None)
def test_prunings_in_a_row_compose(graph, seeds):
    model, x = ms.models.create("resnet20").double().eval(), torch.randn(2, 3, 32, 32).double()
    first = random_mask(graph, seeds[0], most=0.6)
    slim = ms.prune(model, graph, first)
    second = random_mask(ms.trace(slim, x), seeds[1], most=0.6)
    at_once = ms.prune(model, graph, first.compose(second))
    with torch.no_grad():
        in_a_row = ms.prune(slim, second.graph, second)(x)
        torch.testing.assert_close(at_once(x), in_a_row, rtol=0, atol=1e-12)
