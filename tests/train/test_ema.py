from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import masksparsity as ms
from masksparsity.channels.surgery import already_zero
from masksparsity.data import Data
from masksparsity.train import loop
from masksparsity.train.config import Phase, TrainConfig
from masksparsity.train.ema import Ema
from masksparsity.train.evaluate import evaluate
from masksparsity.train.loop import fit, read_metrics

CONFIG = TrainConfig(amp=False)


def phase(epochs: int = 3) -> Phase:
    return Phase(epochs=epochs, lr=0.1, schedule="constant", ema=0.9)


def test_it_is_the_average(network: Callable[[], nn.Module]) -> None:
    """Of weights and statistics; counts, which have none, are those of now."""
    model = network()
    ema = Ema(model, 0.9)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(4):
        model(torch.randn(8, 1, 8, 8))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        ema.update()
        for name, value in model.state_dict().items():
            floats = value.is_floating_point()
            expected[name] = 0.9 * expected[name] + 0.1 * value if floats else value.clone()
    for name, value in ema.network.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert ema.network.state_dict()["1.num_batches_tracked"] == 4


def test_a_phase_ends_with_it_and_goes_on_after_a_kill(
    data: Data,
    network: Callable[[], nn.Module],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(folder: str, **settings: Any) -> nn.Module:
        model = network()
        fit(model, data, config=CONFIG, folder=tmp_path / folder, seed=3, **settings)
        return model

    whole = train("whole", phase=phase())
    assert (
        evaluate(whole, data.test).accuracy == read_metrics(tmp_path / "whole")[-1]["test_accuracy"]
    )
    plain = train("plain", phase=Phase(epochs=3, lr=0.1, schedule="constant"))
    assert not torch.equal(plain[0].weight, whole[0].weight)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(loop.Meter, "tell", stop)
        with pytest.raises(KeyboardInterrupt):
            train("stopped", phase=phase())
    resumed = train("stopped", phase=phase()).state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize("make", [ms.ScheduledDecay, ms.Proximal])
def test_what_is_masked_is_zero_in_it_too(
    data: Data, network: Callable[[], nn.Module], tmp_path: Path, make: Any
) -> None:
    model = network()
    graph = ms.trace(model, torch.randn(2, 1, 8, 8))
    keep = ms.select.uniform(graph, ms.scores.scale(model, graph), 0.5)
    goal: dict[str, Any] = {"steps": 14} if make is ms.ScheduledDecay else {"strength": 0.5}
    penalty = make(model, graph, keep, **goal)
    fit(model, data, phase(), CONFIG, folder=tmp_path, seed=3, penalty=penalty)
    scales = [norm.weight[~keep.by_norm()[n]] for n, norm in (("1", model[1]), ("5", model[5]))]
    assert all(len(s) and not s.any() for s in scales)
    if make is ms.ScheduledDecay:
        assert already_zero(model, graph, keep)
