import pytest
import torch
from torch import nn

import masksparsity as ms


def test_statistics_are_the_plain_average_over_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()).train()
    batches = [torch.randn(8, 3) + k for k in range(3)]
    labelled = [(images, torch.zeros(8)) for images in batches]
    assert ms.recalibrate(model, labelled) == 3
    torch.testing.assert_close(
        model[0].running_mean, torch.stack([b.mean(0) for b in batches]).mean(0)
    )
    torch.testing.assert_close(
        model[0].running_var, torch.stack([b.var(0) for b in batches]).mean(0)
    )
    assert model.training
    assert model[0].momentum == 0.1


def test_no_batches_change_nothing():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].running_mean += 1
    with pytest.raises(ms.MaskSparsityError, match="no batches"):
        ms.recalibrate(model, [])
    assert (model[0].running_mean == 1).all()
