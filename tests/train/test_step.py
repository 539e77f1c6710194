from collections.abc import Callable

import pytest
import torch
from torch import nn

from masksparsity.train.config import Phase, TrainConfig
from masksparsity.train.step import Step, create_optimizer


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
