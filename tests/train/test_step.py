from collections.abc import Callable

import pytest
import torch
from torch import nn

from masksparsity.errors import MaskSparsityError
from masksparsity.train import dist
from masksparsity.train.config import Phase, TrainConfig
from masksparsity.train.step import Step, Teacher, create_optimizer, step_mode

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_twenty_steps_equal_a_plain_loop(network: Callable[[], nn.Module]) -> None:
    phase = Phase(epochs=1, lr=0.1, weight_decay=5e-4)
    model, plain = network(), network()
    step = Step(model, create_optimizer(model, phase), TrainConfig(amp=False))
    sgd = torch.optim.SGD(plain.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    generator = torch.Generator().manual_seed(0)
    total, right = 0.0, 0
    for i in range(20):
        images = torch.randn(16, 1, 8, 8, generator=generator)
        labels = torch.randint(4, (16,), generator=generator)
        sgd.param_groups[0]["lr"] = lr = 0.1 / (1 + i)
        torch.manual_seed(i)
        step(images, labels, lr)
        torch.manual_seed(i)
        outputs = plain(images)
        loss = nn.functional.cross_entropy(outputs, labels)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        total += loss.item()
        right += int((outputs.argmax(1) == labels).sum())
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    loss_mean, accuracy = step.read()
    assert loss_mean == pytest.approx(total / 20, rel=1e-5)
    assert accuracy == pytest.approx(right / 320, abs=1 / 160)


def test_autocast_keeps_scales_in_float32(network: Callable[[], nn.Module]) -> None:
    model = network()
    step = Step(model, create_optimizer(model, Phase(epochs=1, lr=0.1)), TrainConfig())
    step(torch.randn(16, 1, 8, 8), torch.zeros(16, dtype=torch.long), 0.1)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model[1].running_mean.dtype == torch.float32


def test_auto_captures_on_a_single_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert step_mode("auto", CPU) == "eager"
    assert step_mode("auto", CUDA) == step_mode("graph", CUDA) == "graph"
    monkeypatch.setattr(dist, "size", lambda: 2)
    assert step_mode("auto", CUDA) == "eager"
    with pytest.raises(MaskSparsityError, match="one process"):
        step_mode("graph", CUDA)


def test_graph_on_a_cpu_says_what_to_do(network: Callable[[], nn.Module]) -> None:
    model = network()
    optimizer = create_optimizer(model, Phase(epochs=1, lr=0.1))
    with pytest.raises(MaskSparsityError, match=r"needs a GPU.*use auto"):
        Step(model, optimizer, TrainConfig(step="graph"))


def test_the_rate_may_be_a_tensor(network: Callable[[], nn.Module]) -> None:
    """As on CUDA, where a captured step reads it."""
    found = []
    for tensor in (False, True):
        model = network()
        optimizer = create_optimizer(model, Phase(epochs=1, lr=0.1))
        if tensor:
            optimizer.param_groups[0]["lr"] = rate = torch.tensor(0.1)
        step = Step(model, optimizer, TrainConfig(amp=False))
        torch.manual_seed(0)
        for k in range(5):
            step(torch.randn(16, 1, 8, 8), torch.randint(4, (16,)), 0.1 / (1 + k))
        found.append(model.state_dict())
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.02)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_teacher_counts_for_its_share(network: Callable[[], nn.Module], share: float) -> None:
    """Against the definition: cross-entropy with softened targets, less what the teacher's own
    entropy is, times the square of the temperature."""
    model, plain = network(), network()
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
    taught = Teacher(teacher, share, temperature=3.0)
    phase = Phase(epochs=1, lr=0.1, momentum=0, weight_decay=0)
    step = Step(model, create_optimizer(model, phase), TrainConfig(amp=False), taught)
    images, labels = torch.randn(16, 1, 8, 8), torch.randint(4, (16,))
    torch.manual_seed(0)
    step(images, labels, 0.1)

    torch.manual_seed(0)
    outputs, targets = plain(images), (teacher(images).detach() / 3).softmax(1)
    soft = -(targets * (outputs / 3).log_softmax(1)).sum(1).mean()
    soft = soft + (targets * targets.log()).sum(1).mean()
    loss = (1 - share) * nn.functional.cross_entropy(outputs, labels) + share * 9 * soft
    loss.backward()
    assert step.read()[0] == pytest.approx(loss.item(), rel=1e-5)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad)
    assert all(p.grad is None for p in teacher.parameters())
