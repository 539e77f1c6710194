"""Trainings that share a device in turns end with the bits of trainings one after the other."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from masksparsity.data import Data
from masksparsity.train.config import Phase, TrainConfig
from masksparsity.train.loop import fit

PHASE = Phase(epochs=2, lr=0.1)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("turns")


def plain(network: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Without dropout, whose random numbers all would share."""
    model = network()
    model[3] = nn.Identity()
    torch.manual_seed(seed)
    nn.init.kaiming_normal_(model[0].weight)
    return model


def test_each_is_as_if_alone(
    script: ModuleType, network: Callable[[], nn.Module], data: Data, tmp_path: Path
) -> None:
    seen: list[int] = []

    def train(folder: str, data: Data, seed: int) -> nn.Module:
        model = plain(network, seed)
        model.register_forward_pre_hook(lambda *_: seen.append(seed) if model.training else None)
        config = TrainConfig(amp=False)
        fit(model, data, PHASE, config, folder=tmp_path / folder / str(seed), seed=seed)
        return model

    alone = [train("alone", data, seed) for seed in range(3)]
    assert sum(a != b for a, b in pairwise(seen)) == 2
    seen.clear()
    turns = script.Turns(2)
    shared = replace(data, train=turns.share(data.training()))
    together: dict[int, nn.Module] = {}

    def task(seed: int) -> None:
        together[seed] = train("together", shared, seed)

    turns.run([partial(task, seed) for seed in range(3)])
    assert sum(a != b for a, b in pairwise(seen)) > len(seen) / 2
    for seed, model in enumerate(alone):
        for name, value in model.state_dict().items():
            assert torch.equal(together[seed].state_dict()[name], value), (seed, name)


def test_what_one_raises_is_raised_when_all_are_done(script: ModuleType) -> None:
    done: list[int] = []

    def fail() -> None:
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        script.Turns(2).run([fail, *(partial(done.append, k) for k in range(4))])
    assert done == [0, 1, 2, 3]
