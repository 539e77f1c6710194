import pytest
import torch

from masksparsity.errors import MaskSparsityError
from masksparsity.models import create

GOLDEN = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962}


@pytest.mark.parametrize("depth", GOLDEN)
def test_parameters(depth: int) -> None:
    model = create(f"resnet{depth}")
    assert sum(p.numel() for p in model.parameters()) == GOLDEN[depth]
    assert not any("shortcut" in name for name in model.state_dict())


def test_option_b_adds_projections_alone() -> None:
    with_b, with_a = create("resnet20", shortcut="B").state_dict(), create("resnet20").state_dict()
    added = {name.rpartition(".")[0] for name in with_b.keys() - with_a.keys()}
    assert added == {f"layer{s}.0.shortcut.{i}" for s in (2, 3) for i in (0, 1)}
    with pytest.raises(MaskSparsityError, match="shortcut='C'"):
        create("resnet20", shortcut="C")


def test_option_a_subsamples_and_pads_on_both_sides() -> None:
    shortcut = create("resnet20").layer2[0].shortcut
    x = torch.randn(2, 16, 6, 5)
    out = shortcut(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out.shape == (2, 32, 3, 3)
    assert not out[:, :8].any()
    assert not out[:, 24:].any()
    assert shortcut(x.bfloat16()).dtype == torch.bfloat16


def test_padding_may_be_cut_to_nothing() -> None:
    shortcut = create("resnet20").layer2[0].shortcut
    shortcut.pad_before = shortcut.pad_before[:, :0]
    shortcut.pad_after = shortcut.pad_after[:, :3]
    assert shortcut(torch.randn(2, 16, 4, 4)).shape == (2, 19, 2, 2)
    shortcut.pad_after = shortcut.pad_after[:, :0]
    assert shortcut(torch.randn(2, 0, 4, 4)).shape == (2, 0, 2, 2)


def test_zero_init_residual_starts_every_block_as_its_shortcut() -> None:
    model = create("resnet20", zero_init_residual=True).eval()
    x = torch.randn(1, 16, 8, 8).relu()
    assert torch.equal(model.layer1(x), x)
