import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import masksparsity as ms


@pytest.fixture(scope="module")
def bound():
    torch.manual_seed(0)
    model = ms.models.create("resnet20")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, -1, 1)
    return model, ms.trace(model, torch.randn(1, 3, 32, 32))


def random_scores(graph, seed: int, levels: int) -> dict[str, torch.Tensor]:
    """Random scores with many ties."""
    generator = torch.Generator().manual_seed(seed)
    return {
        g.name: torch.randint(levels, (g.size,), generator=generator).float() / levels
        for g in graph.prunable
    }


def test_scale_is_the_largest_of_the_coupled(bound):
    model, graph = bound
    scores = ms.scores.scale(model, graph)
    assert scores.keys() == {g.name for g in graph.prunable}
    assert torch.equal(scores["layer1.0.conv1"], model.layer1[0].bn1.weight.detach().abs())
    stage3 = [model.layer3[0].bn2, model.layer3[1].bn2, model.layer3[2].bn2]
    expected = torch.stack([bn.weight.detach().abs()[:16] for bn in stage3]).amax(0)
    assert torch.equal(scores["layer3.0.conv2"], expected)


@given(
    share=st.floats(0, 0.8), seed=st.integers(0, 99), levels=st.sampled_from((3, 1000)),
    round_to=st.sampled_from((1, 4)), rounds=st.sampled_from((1, 3)), per_cost=st.booleans(),
)  # fmt: skip
def test_budget_is_met_within_a_channel(bound, share, seed, levels, round_to, rounds, per_cost):
    _, graph = bound
    scores = random_scores(graph, seed, levels)
    how = {"rounds": rounds, "per_cost": per_cost}
    keep = ms.select.budget(graph, scores, pruned_macs=share, round_to=round_to, **how)
    dense, slim = graph.cost().macs, graph.cost(keep).macs
    assert 1 - slim / dense >= share
    assert (keep.kept >= 1).all()
    assert all(int(v.sum()) % round_to == 0 for n, v in keep.items() if n != "linear")
    for name, kept in keep.items():  # one step back, in any group, is too much
        back = (~kept).nonzero().squeeze(1)[:round_to]
        if len(back) == round_to:
            more = ms.KeepMask(graph, {**keep, name: kept.index_fill(0, back, True)})
            assert 1 - graph.cost(more).macs / dense < share


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_budget_per_cost_keeps_more_of_the_sum(bound, share, seed):
    """Scores that add up, equal in all groups: those of groups that cost more go first."""
    _, graph = bound
    scores = random_scores(graph, seed, 1000)
    plain = ms.select.budget(graph, scores, pruned_macs=share)
    keep = ms.select.budget(graph, scores, pruned_macs=share, per_cost=True)
    assert 1 - graph.cost(keep).macs / graph.cost().macs >= share
    left = [
        sum(float(scores[n][v].sum()) for n, v in m.items() if n in scores) for m in (keep, plain)
    ]
    assert left[0] > left[1]
    for name, kept in keep.items():  # within a group the best stay
        if name in scores and not kept.all():
            assert scores[name][kept].min() >= scores[name][~kept].max()


@pytest.mark.parametrize("share", [0.2, 0.3, 0.5])
def test_in_rounds_the_best_of_each_group_stay(bound, share):
    _, graph = bound
    for seed in range(8):
        scores = random_scores(graph, seed, 1000)
        keep = ms.select.budget(graph, scores, pruned_macs=share, rounds=3)
        for name, kept in keep.items():
            if name in scores and not kept.all():
                assert scores[name][kept].min() >= scores[name][~kept].max()


def test_in_rounds_one_of_two_alike_stays(bound):
    """Each is worth little, as long as the other is there."""
    _, graph = bound
    seen, noise = [], random_scores(graph, 0, 1000)

    def worth(kept: ms.KeepMask) -> dict[str, torch.Tensor]:
        seen.append(kept)
        twin = {n: k.view(-1, 2).flip(1).flatten() for n, k in kept.items() if n != "linear"}
        return {n: torch.where(k, 0.1, 1.1) + noise[n] for n, k in twin.items()}

    def pairs_lost(keep: ms.KeepMask) -> int:
        return sum(int((~k.view(-1, 2).any(1)).sum()) for k in keep.values())

    at_once, in_rounds = (
        ms.select.budget(graph, worth, pruned_macs=0.6, rounds=rounds) for rounds in (1, 20)
    )
    assert pairs_lost(at_once) > 20 > 2 > pairs_lost(in_rounds)
    for earlier, later in itertools.pairwise([*seen[1:], in_rounds]):
        assert earlier & later == later
    with pytest.raises(ms.MaskSparsityError, match="rounds=0: at least 1"):
        ms.select.budget(graph, worth, pruned_macs=0.3, rounds=0)


@given(fraction=st.floats(0, 0.9), seed=st.integers(0, 99), levels=st.sampled_from((1, 3, 1000)))
def test_fraction_does_not_mind_ties(bound, fraction, seed, levels):
    """30 % asked is 30 % removed, also where most scores are equal."""
    _, graph = bound
    keep = ms.select.fraction(graph, random_scores(graph, seed, levels), fraction)
    prunable = sum(g.size for g in graph.prunable)
    assert fraction <= keep.pruned_fraction < fraction + 2 / prunable


def test_uniform(bound):
    model, graph = bound
    keep = ms.select.uniform(graph, ms.scores.norm(model, graph), 0.25)
    assert all(int(v.sum()) == 0.75 * len(v) for n, v in keep.items() if n != "linear")


def test_threshold_and_optimal(bound):
    _, graph = bound
    scores = {g.name: torch.ones(g.size) for g in graph.prunable}
    scores["layer1.0.conv1"] = torch.tensor([1.0] * 12 + [0.001] * 3 + [0.02])
    keep = ms.select.threshold(graph, scores, 0.01)
    assert keep["layer1.0.conv1"].tolist() == [True] * 12 + [False] * 3 + [True]
    assert keep.kept.sum() == graph.units - 3
    keep = ms.select.optimal(graph, scores, 1e-4)  # 3e-6 + 4e-4 of 12: the 0.02 goes as well
    assert keep["layer1.0.conv1"].tolist() == [True] * 12 + [False] * 4


def test_a_group_wholly_under_the_threshold_keeps_its_best(bound):
    _, graph = bound
    scores = {g.name: torch.ones(g.size) for g in graph.prunable}
    scores["layer2.1.conv1"] = torch.linspace(0, 0.005, 32)
    for min_keep, round_to, left in ((1, 1, 1), (3, 1, 3), (3, 8, 8)):
        keep = ms.select.threshold(graph, scores, 0.01, min_keep=min_keep, round_to=round_to)
        assert keep["layer2.1.conv1"].tolist() == [False] * (32 - left) + [True] * left
    keep = ms.select.threshold(graph, {n: 0 * s for n, s in scores.items()}, 0.01)
    assert (keep.kept[:-1] == 1).all()  # all zero: still a network


def test_ignore_leaves_layers_whole(bound):
    model, graph = bound
    scores = ms.scores.scale(model, graph)
    keep = ms.select.fraction(graph, scores, 0.3, ignore=("layer3", "conv1"))
    assert all(v.all() for n, v in keep.items() if n.startswith("layer3"))
    assert keep["conv1"].all()


def test_max_pruned_limits_layers(bound):
    model, graph = bound
    scores = ms.scores.scale(model, graph)
    keep = ms.select.fraction(graph, scores, 0.4, max_pruned=0.5)
    assert all(v.float().mean() >= 0.5 for _, v in keep.items())
    shares = {"layer3": 0.25, "layer3.1.conv1": 0.1, "": 0.9}
    keep = ms.select.budget(graph, scores, pruned_macs=0.4, max_pruned=shares)
    assert keep["layer3.1.conv1"].sum() >= 58  # of 64
    assert all(v.float().mean() >= 0.75 for n, v in keep.items() if n.startswith("layer3"))
    assert all(v.float().mean() >= 0.1 for _, v in keep.items())
    assert any(v.float().mean() < 0.5 for _, v in keep.items())


def test_taylor_leaves_the_model_alone(bound):
    model, graph = bound
    state = {k: v.clone() for k, v in model.state_dict().items()}
    batch = (torch.randn(4, 3, 32, 32), torch.arange(4))
    scores = ms.scores.taylor(model, graph, [batch, batch])
    assert scores.keys() == ms.scores.scale(model, graph).keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert ms.scores.taylor(model, graph, [batch, batch])["conv1"].equal(scores["conv1"])
    with pytest.raises(ms.MaskSparsityError, match="no batches to measure on"):
        ms.scores.taylor(model, graph, [])
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 4, 1))
    with pytest.raises(ms.MaskSparsityError, match=r"no BatchNorm scale.*use scores\.norm"):
        ms.scores.taylor(plain, ms.trace(plain, batch[0]), [batch])


def test_what_comes_back_keeps_a_multiple(bound):
    """Of the trunk, which the network cannot do without, nothing was to stay."""
    _, graph = bound
    scores = {g.name: torch.zeros(g.size) for g in graph.prunable}
    keep = ms.select.threshold(graph, scores, 0.01, min_keep=0, round_to=4)
    assert int(keep["conv1"].sum()) == 4
    assert all(int(v.sum()) % 4 == 0 for n, v in keep.items() if n != "linear")


def test_scores_in_double_precision_are_told_apart(bound):
    _, graph = bound
    for unit in (1e-60, 1e60):
        scores = {g.name: unit * torch.arange(1.0, 1 + g.size).double() for g in graph.prunable}
        keep = ms.select.uniform(graph, scores, 0.5)
        assert keep["conv1"].tolist() == [False] * 8 + [True] * 8


def test_mistakes_are_named(bound):
    model, graph = bound
    scores = ms.scores.scale(model, graph)
    with pytest.raises(ms.MaskSparsityError, match=r"cannot be met.*at most 0\."):
        ms.select.budget(graph, scores, pruned_macs=0.99, min_keep=8)
    with pytest.raises(ms.MaskSparsityError, match="'layer9'"):
        ms.select.fraction(graph, scores, 0.5, ignore=("layer9",))
    with pytest.raises(ms.MaskSparsityError, match="'layer9'"):
        ms.select.fraction(graph, scores, 0.5, max_pruned={"layer9": 0.5})
    with pytest.raises(ms.MaskSparsityError, match=r"max_pruned of all is 1\.5"):
        ms.select.fraction(graph, scores, 0.5, max_pruned=1.5)
    with pytest.raises(ms.MaskSparsityError, match=r"pruned_macs=1\.5"):
        ms.select.budget(graph, scores, pruned_macs=1.5)
    with pytest.raises(ms.MaskSparsityError, match="one budget"):
        ms.select.budget(graph, scores)
    with pytest.raises(ms.MaskSparsityError, match="no pruned_mac: did you mean pruned_macs"):
        ms.select.budget(graph, scores, pruned_mac=0.5)
    with pytest.raises(ms.MaskSparsityError, match=r"no pruned_macs; select\.budget does"):
        ms.select.uniform(graph, scores, 0.5, pruned_macs=0.5)
    with pytest.raises(ms.MaskSparsityError, match="threshold=nan"):
        ms.select.threshold(graph, scores, float("nan"))
    with pytest.raises(ms.MaskSparsityError, match="no channel group has a score"):
        ms.select.uniform(graph, {}, 0.5)
    with pytest.raises(ms.MaskSparsityError, match="per_cost"):
        ms.select.budget(graph, scores, pruned_latency=0.1, latency=lambda mask: 1.0, per_cost=True)
    with pytest.raises(ms.MaskSparsityError, match="finite"):
        ms.select.fraction(graph, {**scores, "conv1": torch.full((16,), torch.nan)}, 0.5)


def test_without_scales_there_is_no_score_by_scale():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
    graph = ms.trace(model, torch.randn(1, 3, 8, 8))
    with pytest.raises(ms.MaskSparsityError, match=r"no BatchNorm scale; use scores\.norm"):
        ms.scores.scale(model, graph)


def test_a_latency_budget_is_met_by_what_was_measured(bound):
    """Here the clock is a count of kept channels: the search sees only the function."""
    model, graph = bound
    keep = ms.select.budget(
        graph,
        ms.scores.scale(model, graph),
        pruned_latency=0.4,
        latency=lambda m: float(m.units.sum()),
    )
    assert 0.6 - 1 / graph.units <= keep.units.float().mean() <= 0.6
    with pytest.raises(ms.MaskSparsityError, match="latency="):
        ms.select.budget(graph, ms.scores.scale(model, graph), pruned_latency=0.4)
    measured = ms.latency(model, graph, runs=3)
    assert measured(keep) > 0
