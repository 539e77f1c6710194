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


class Sum(nn.Module):
    """Of two inputs, or of those in a list."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x, y=0):
        return self.norm(torch.stack(x).sum(0) if isinstance(x, list) else x + y)


@pytest.mark.parametrize(
    "batch", [lambda x, y: ((x, y), 0), lambda x, y: {"x": x, "y": y}, lambda x, y: ([x, y], 0)]
)
def test_batches_of_several_inputs(batch):
    x, y, model = torch.randn(8, 3), torch.randn(8, 3), Sum()
    ms.recalibrate(model, [batch(x, y)])
    torch.testing.assert_close(model.norm.running_mean, (x + y).mean(0))


def test_norms_of_other_makers():
    class Own(nn.BatchNorm1d):
        def forward(self, x):
            mean, var = self.running_mean, self.running_var
            return nn.functional.batch_norm(x, mean, var, None, None, self.training, self.momentum)

    batches = [torch.randn(8, 3) + k for k in range(3)]
    model = nn.Sequential(norm := Own(3))
    ms.recalibrate(model, batches)
    torch.testing.assert_close(norm.running_mean, torch.cat(batches).mean(0))
    assert norm.momentum == 0.1
    assert not norm._forward_pre_hooks


def test_a_batch_that_fails_changes_nothing():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model(torch.randn(8, 3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        ms.recalibrate(model, [(torch.randn(8, 3),), (torch.randn(8, 3, 2, 2),)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_no_batches_change_nothing():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].running_mean += 1
    with pytest.raises(ms.MaskSparsityError, match="no batches"):
        ms.recalibrate(model, [])
    assert (model[0].running_mean == 1).all()
