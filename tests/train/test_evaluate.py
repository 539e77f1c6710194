from collections.abc import Callable

import pytest
import torch
from torch import nn

from masksparsity.data import Data
from masksparsity.train.evaluate import evaluate


def test_counts_every_image_once_and_leaves_the_modes(
    data: Data, network: Callable[[], nn.Module]
) -> None:
    model = network()
    model[1].eval()  # frozen statistics, as people have them
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = evaluate(model, data.test)

    reference = network().eval()
    images, labels = data.test.images, data.test.labels  # type: ignore[attr-defined]
    outputs = reference(images)
    assert found.correct == int((outputs.argmax(1) == labels).sum())
    assert found.total == 101
    assert found.accuracy == found.correct / 101
    assert found.loss == pytest.approx(nn.functional.cross_entropy(outputs, labels).item())
    rounded = evaluate(model, data.test, amp=True).loss
    assert rounded != found.loss
    assert rounded == pytest.approx(found.loss, rel=0.05)
    assert model.training
    assert not model[1].training
    assert model[2].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
