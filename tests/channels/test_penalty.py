import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import masksparsity as ms

from .networks import random_mask
from .penalised import INPUTS, LABELS, LR, OPTIMIZERS, PENALTIES, STRENGTH, network, step


@pytest.fixture
def bound():
    model = network()
    graph = ms.trace(model, INPUTS)
    return model, graph, random_mask(graph, 1)


def masked_scales(model, keep) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(scale, shift, which are masked) of every norm."""
    modules = dict(model.named_modules())
    return [(modules[n].weight, modules[n].bias, ~k) for n, k in keep.by_norm().items()]


STEPS: dict[str, Callable] = {
    "plain": lambda optimizer, closure: (closure(), optimizer.step()),
    "closure": lambda optimizer, closure: optimizer.step(closure),
    "keyword": lambda optimizer, closure: optimizer.step(closure=closure),
}


@pytest.mark.parametrize("by", STEPS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_published_form_to_the_bit(bound, optimizer, by):
    model, graph, keep = bound
    plain = copy.deepcopy(model)
    ours, theirs = (OPTIMIZERS[optimizer](m.parameters()) for m in (model, plain))
    ms.MaskedL1(model, graph, keep, STRENGTH).attach(ours)

    def closure() -> Tensor:
        ours.zero_grad()
        loss = nn.functional.cross_entropy(model(INPUTS), LABELS)
        loss.backward()
        return loss

    for _ in range(4):
        STEPS[by](ours, closure)
        theirs.zero_grad()
        nn.functional.cross_entropy(plain(INPUTS), LABELS).backward()
        modules = dict(plain.named_modules())
        for name, kept in keep.by_norm().items():
            gamma = modules[name].weight
            gamma.grad += STRENGTH * torch.sign(gamma.detach()) * (1 - kept.float())
        theirs.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_every_call_of_a_closure_is_penalised(bound):
    model, graph, keep = bound
    optimizer = torch.optim.LBFGS([*model[1].parameters(), *model[6].parameters()], max_iter=3)
    penalty = ms.MaskedL1(model, graph, keep, STRENGTH)
    penalty.attach(optimizer)
    calls = []
    plain, penalty.apply = penalty.apply, lambda: (calls.append("penalty"), plain())

    def closure() -> Tensor:
        calls.append("closure")
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(INPUTS), LABELS)
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert len(calls) > 2
    assert calls == ["closure", "penalty"] * (len(calls) // 2)


def test_global_l1_reaches_every_scale(bound):
    model, graph, _ = bound
    penalty = ms.MaskedL1(model, graph, None, STRENGTH)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    penalty.apply()
    for name, p in model.named_parameters():
        is_scale = name in ("1.weight", "6.weight")
        assert torch.equal(
            p.grad, STRENGTH * p.detach().sign() if is_scale else torch.zeros_like(p)
        )


@pytest.mark.parametrize("kind", ["l2", "smooth_l1"])
def test_other_kinds(bound, kind):
    model, graph, keep = bound
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    penalty = ms.MaskedL1(model, graph, keep, STRENGTH, kind=kind)
    penalty.attach(optimizer)
    with torch.no_grad():
        model[1].weight[:2] = torch.tensor([0.5 * LR * STRENGTH, -2.0])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = model[1].weight.detach().clone()
    penalty.apply()
    masked = (~keep.by_norm()["1"]).float()
    form = {"l2": lambda g: STRENGTH * g,
            "smooth_l1": lambda g: STRENGTH * (g / (LR * STRENGTH)).clamp(-1, 1)}  # fmt: skip
    torch.testing.assert_close(model[1].weight.grad, form[kind](before) * masked)


@pytest.mark.parametrize("masked", [False, True])
def test_polarization_is_the_gradient_of_its_formula(bound, masked):
    model, graph, keep = bound
    keep = keep if masked else None
    scales = {n: model.get_submodule(n).weight for n in ("1", "6")}
    with torch.no_grad():  # about zero, and about the mean
        for k, gamma in enumerate(scales.values()):
            gamma.copy_(torch.randn(len(gamma), generator=torch.Generator().manual_seed(k)))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    ms.MaskedL1(model, graph, keep, STRENGTH, kind="polarization").apply()
    kept = keep.by_norm() if keep else {n: torch.zeros(8, dtype=torch.bool) for n in scales}
    size = torch.cat([gamma[~kept[n]] for n, gamma in scales.items()]).abs()
    loss = STRENGTH * (1.2 * size.sum() - (size - size.mean()).abs().sum())
    expected = torch.autograd.grad(loss, list(scales.values()))
    for gamma, gradient in zip(scales.values(), expected, strict=True):
        torch.testing.assert_close(gamma.grad, gradient)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_proximal_zeros_are_exact_and_stay(bound, optimizer):
    model, graph, keep = bound
    opt = OPTIMIZERS[optimizer](model.parameters())
    ms.Proximal(model, graph, keep, strength=3.0).attach(opt)
    for _ in range(60):
        step(model, opt)
    for gamma, beta, masked in masked_scales(model, keep):
        assert (gamma[masked] == 0).all()
        assert (beta[masked] == 0).all()
        assert (gamma[~masked] != 0).all()


def test_proximal_is_the_soft_threshold(bound):
    model, graph, keep = bound
    plain = copy.deepcopy(model)
    ours, theirs = (OPTIMIZERS["sgd"](m.parameters()) for m in (model, plain))
    ms.Proximal(model, graph, keep, STRENGTH).attach(ours)
    step(model, ours)
    step(plain, theirs)
    reach = LR * STRENGTH / (1 - 0.9)
    for (gamma, _, masked), (free, _, _) in zip(
        masked_scales(model, keep), masked_scales(plain, keep), strict=True
    ):
        expected = torch.where(
            masked, nn.functional.softshrink(free.detach(), reach), free.detach()
        )
        torch.testing.assert_close(gamma.detach(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("span", [0.25, 1.0])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_scheduled_decay_arrives_on_time_and_stays(bound, optimizer, span):
    model, graph, keep = bound
    with torch.no_grad():  # an order to go in
        for gamma, _, _ in masked_scales(model, keep):
            gamma.copy_(torch.rand(len(gamma)) + 0.5)
    opt = OPTIMIZERS[optimizer](model.parameters())
    penalty = ms.ScheduledDecay(model, graph, keep, steps=10, span=span)
    penalty.attach(opt)
    starts = [gamma.detach().abs() for gamma, _, _ in masked_scales(model, keep)]
    for k in range(1, 16):
        step(model, opt)
        for (gamma, _, masked), start in zip(masked_scales(model, keep), starts, strict=True):
            rank = torch.argsort(torch.argsort(start[masked]))
            begin = (1 - span) * rank / max(1, int(masked.sum()) - 1)
            cap = (1 - (k / 10 - begin) / span).clamp(0, 1) * start[masked]
            assert (gamma[masked].abs() <= cap * (1 + 1e-5) + 1e-6 * (k < 10)).all()
    model.eval()
    with torch.no_grad():  # nothing left to remove: as trained, masked and slim are one function
        slim = ms.prune(model, graph, keep, optimizer=opt)
        torch.testing.assert_close(slim.eval()(INPUTS), model(INPUTS), rtol=1e-4, atol=1e-5)
    for p, entries in opt.state.items():
        for value in entries.values():
            assert value.ndim == 0 or value.shape == p.shape
    step(slim.train(), opt)


def test_momentum_of_what_is_zero_is_cleared(bound):
    model, graph, keep = bound
    opt = OPTIMIZERS["sgd"](model.parameters())
    ms.ScheduledDecay(model, graph, keep, steps=2).attach(opt)
    for _ in range(3):
        step(model, opt)
    for gamma, _, masked in masked_scales(model, keep):
        assert (opt.state[gamma]["momentum_buffer"][masked] == 0).all()
        assert (opt.state[gamma]["momentum_buffer"][~masked] != 0).all()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", PENALTIES)
def test_loss_scaling_changes_nothing(bound, kind, fused):
    """Under a GradScaler the same training, and an overflowing step is skipped whole."""
    model, graph, keep = bound
    plain = copy.deepcopy(model)
    results = []
    for net, scaler in ((plain, None), (model, torch.amp.GradScaler("cpu", init_scale=1024.0))):
        opt = torch.optim.SGD(net.parameters(), LR, momentum=0.9, fused=fused)
        PENALTIES[kind](net, graph, keep).attach(opt)
        for _ in range(3):
            step(net, opt, scaler)
        results.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    step(model, opt, scaler, scale=torch.inf)
    for p, before in zip(model.parameters(), results[1], strict=True):
        assert torch.equal(p, before)


def test_gradient_accumulation_adds_the_penalty_once(bound):
    model, graph, keep = bound
    opt = torch.optim.SGD(model.parameters(), LR)
    ms.MaskedL1(model, graph, keep, STRENGTH).attach(opt)
    for _ in range(3):
        nn.functional.cross_entropy(model(INPUTS), LABELS).backward()
    before, grad = model[1].weight.detach().clone(), model[1].weight.grad.clone()
    opt.step()
    masked = (~keep.by_norm()["1"]).float()
    expected = before - LR * (grad + STRENGTH * before.sign() * masked)
    torch.testing.assert_close(model[1].weight.detach(), expected)


def test_masked_channels_without_a_scale_are_told(bound):
    model, graph, _ = bound
    keep = ms.KeepMask(graph, {"3": torch.arange(6) > 2})
    with pytest.warns(UserWarning, match="masked channels of 3 have no BatchNorm scale"):
        ms.MaskedL1(model, graph, keep)
    keep = ms.KeepMask(graph, {"0": torch.arange(8) > 2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ms.Proximal(model, graph, keep)


def test_detach_ends_it(bound):
    model, graph, keep = bound
    opt = OPTIMIZERS["sgd"](model.parameters())
    penalty = ms.ScheduledDecay(model, graph, keep, steps=1)
    penalty.attach(opt)
    penalty.detach()
    step(model, opt)
    assert all((gamma != 0).all() for gamma, _, _ in masked_scales(model, keep))


def test_mistakes_are_named(bound):
    model, graph, _ = bound
    with pytest.raises(ms.MaskSparsityError, match=r"does not hold 1\.weight"):
        ms.MaskedL1(model, graph).attach(torch.optim.SGD(model[10].parameters(), 0.1))
    with pytest.raises(ms.MaskSparsityError, match="another model"):
        ms.MaskedL1(nn.Sequential(nn.Conv2d(3, 9, 3)), graph)
    keep = random_mask(graph, 1)
    for wrong in ({"steps": 0}, {"steps": 9, "span": 0.0}, {"steps": 9, "span": 1.5}):
        with pytest.raises(ms.MaskSparsityError, match="steps"):
            ms.ScheduledDecay(model, graph, keep, **wrong)
    with pytest.raises(ms.MaskSparsityError, match="needs a mask"):
        ms.ScheduledDecay(model, graph, None, steps=9)
    for form in (ms.MaskedL1, ms.Proximal):
        with pytest.raises(ms.MaskSparsityError, match=r"strength=-1: at least 0"):
            form(model, graph, keep, strength=-1)
    model[1].weight.requires_grad_(False)
    with pytest.raises(ms.MaskSparsityError, match=r"1.weight is frozen"):
        ms.MaskedL1(model, graph)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(ms.MaskSparsityError, match="no BatchNorm"):
        ms.MaskedL1(plain, ms.trace(plain, INPUTS))
