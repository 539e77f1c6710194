import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from masksparsity.data import Data
from masksparsity.errors import MaskSparsityError, RunFailure
from masksparsity.train import loop
from masksparsity.train.config import Phase, TrainConfig
from masksparsity.train.loop import CHECKPOINT, fit, read_metrics

PHASE = Phase(epochs=5, lr=0.1)


class Shrink:
    """A penalty with a state: pulls the first scales down a little more at every step."""

    def __init__(self, model: nn.Module) -> None:
        self.scale = model[1].weight
        self.count = torch.zeros(())

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        self.handle = optimizer.register_step_post_hook(lambda *_: self.apply())

    def detach(self) -> None:
        self.handle.remove()

    @torch.no_grad()
    def apply(self) -> None:
        self.count += 1
        self.scale *= 1 - self.count / 1000

    def state_dict(self) -> dict[str, Tensor]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.count.copy_(state["count"])


def train(network: Callable[[], nn.Module], data: Data, folder: Path, **kwargs: Any) -> nn.Module:
    model = network()
    settings = {"config": TrainConfig(amp=False), "seed": 3, "phase": PHASE} | kwargs
    fit(model, data, folder=folder, penalty=Shrink(model), **settings)
    return model


def without_time(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in history]


def test_learns(data: Data, network: Callable[[], nn.Module], tmp_path: Path) -> None:
    train(network, data, tmp_path)
    lines = read_metrics(tmp_path)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[-1]["test_accuracy"] > 0.9
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]


@pytest.mark.parametrize("amp", [False, True])
def test_resumed_is_bit_identical(
    data: Data,
    network: Callable[[], nn.Module],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    amp: bool,
) -> None:
    config = TrainConfig(amp=amp)
    whole = train(network, data, tmp_path / "whole", config=config)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    save = loop.State.save

    def save_then_stop(state: loop.State, line: dict[str, Any]) -> None:
        save(state, line)
        if line["epoch"] == 2:
            stop()

    with monkeypatch.context() as patch:
        patch.setattr(loop.State, "save", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            train(network, data, tmp_path / "stopped", config=config)
    torch.manual_seed(99)  # a new process has other generators
    resumed = train(network, data, tmp_path / "stopped", config=config)

    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    histories = [without_time(read_metrics(tmp_path / part)) for part in ("whole", "stopped")]
    assert histories[0] == histories[1]


def test_an_infinite_loss_stops_and_keeps_the_checkpoint(
    data: Data, network: Callable[[], nn.Module], tmp_path: Path
) -> None:
    images = data.train.images  # type: ignore[union-attr]
    train(network, data, tmp_path, phase=Phase(epochs=1, lr=0.1))
    before = (tmp_path / CHECKPOINT).read_bytes()
    images[7] = torch.inf
    with pytest.raises(RunFailure, match=r"not finite in epoch 2.*[Ll]ower the learning rate"):
        train(network, data, tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_weights_that_explode_in_the_last_step_are_not_saved(
    data: Data, network: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the last step is computed before its update: only the test set sees it."""
    step = loop.Step.__call__

    def explode(self: loop.Step, *batch: Any) -> None:
        step(self, *batch)
        with torch.no_grad():
            if len(batch[0]) < 32:  # the last one
                self.model[-1].weight.fill_(torch.inf)

    monkeypatch.setattr(loop.Step, "__call__", explode)
    with pytest.raises(RunFailure, match="epoch 1"):
        train(network, data, tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_checkpoint_of_another_network_is_refused_by_name(
    data: Data, network: Callable[[], nn.Module], tmp_path: Path
) -> None:
    train(network, data, tmp_path, phase=Phase(epochs=1, lr=0.1))
    with pytest.raises(MaskSparsityError, match=CHECKPOINT):
        train(lambda: network()[:-1].append(nn.Linear(32, 5)), data, tmp_path)


def test_no_training_images(data: Data, network: Callable[[], nn.Module], tmp_path: Path) -> None:
    fields = {**vars(data), "train": None}
    with pytest.raises(MaskSparsityError, match="blobs"):
        train(network, Data(**fields), tmp_path)


def test_metrics_are_json_lines(
    data: Data, network: Callable[[], nn.Module], tmp_path: Path
) -> None:
    train(network, data, tmp_path, phase=Phase(epochs=2, lr=0.1))
    lines = [json.loads(line) for line in (tmp_path / loop.METRICS).read_text().splitlines()]
    assert lines == read_metrics(tmp_path)
