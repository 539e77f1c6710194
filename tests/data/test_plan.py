from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from masksparsity.data.loader import Normalize, Plan
from masksparsity.errors import MaskSparsityError

world_and_images = st.integers(1, 4).flatmap(
    lambda world: st.tuples(st.just(world), st.integers(world, 60))
)


def ranks(world: int, **kwargs) -> list[Plan]:
    return [Plan(rank=rank, world=world, **kwargs) for rank in range(world)]


@given(world_and_images, st.integers(1, 70), st.integers(0, 2**40), st.integers(0, 300))
def test_ranks_share_one_permutation_equally(sizes, batch_size: int, seed: int, epoch: int) -> None:
    world, images = sizes
    plans = ranks(world, images=images, batch_size=batch_size, train=True, seed=seed)
    orders = [plan.epoch(epoch)[0] for plan in plans]
    seen = torch.cat(orders).tolist()
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(images))
    share = images // world
    for plan, order in zip(plans, orders, strict=True):
        assert len(order) == plan.samples > share - batch_size
        assert plan.samples == (share if share < batch_size else len(plan) * batch_size)
        assert torch.equal(plan.epoch(epoch)[0], order)
    if world == batch_size == 1:
        assert sorted(seen) == list(range(images))


@given(st.integers(1, 4), st.integers(0, 40), st.integers(1, 50))
def test_ranks_evaluate_every_image_once(world: int, images: int, batch_size: int) -> None:
    plans = ranks(world, images=images, batch_size=batch_size, train=False)
    orders = [plan.epoch(0)[0].tolist() for plan in plans]
    assert sorted(chain.from_iterable(orders)) == list(range(images))
    for plan, order in zip(plans, orders, strict=True):
        assert plan.samples == len(order)
        assert len(plan) == len(range(0, len(order), batch_size))


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> tuple:
        plan = Plan(images=50, batch_size=50, train=True, seed=seed)
        return tuple(plan.epoch(epoch)[0].tolist())

    seeds = (0, 1, 2, 2**20, 2**20 + 1)
    assert len({order(seed, epoch) for seed in seeds for epoch in range(10)}) == 50


@pytest.mark.parametrize(
    "bad",
    [{"batch_size": 0}, {"rank": 1}, {"rank": -1}, {"images": 2, "world": 3}],
)
def test_impossible_shares_are_errors(bad: dict) -> None:
    with pytest.raises(MaskSparsityError):
        Plan(**{"images": 10, "batch_size": 2, "train": True, **bad})


def test_normalize_is_exact() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(2, 1, 1, 3)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    out = Normalize(mean, std, 16, torch.device("cpu"))(pixels)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    exact = pixels.permute(0, 3, 1, 2).double() / 255
    exact -= torch.tensor(mean, dtype=torch.float64).view(3, 1, 1)
    exact /= torch.tensor(std, dtype=torch.float64).view(3, 1, 1)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=5e-7)
