import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from masksparsity.data import Data
from masksparsity.train.config import Phase, TrainConfig
from masksparsity.train.loop import fit
from masksparsity.train.step import Step, Teacher, create_optimizer

HEADER = Path(sysconfig.get_path("include")) / "Python.h"
pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") and HEADER.exists()), reason="compiles: needs g++ and Python's headers"
)


@pytest.fixture
def plain(network: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Without dropout: compiled, it draws other numbers. And one network is compiled once."""

    def make() -> nn.Module:
        model = network()
        model[3] = nn.Identity()
        return model

    return make


def test_compiled_equals_eager_to_rounding(plain: Callable[[], nn.Module]) -> None:
    found = []
    for mode in ("eager", "compile"):
        model = plain()
        optimizer = create_optimizer(model, Phase(epochs=1, lr=0.1))
        step = Step(model, optimizer, TrainConfig(amp=False, step=mode))  # type: ignore[arg-type]
        torch.manual_seed(0)
        for n in (32, 32, 5, 32, 3):
            step(torch.randn(n, 1, 8, 8), torch.randint(4, (n,)), 0.1)
        found.append((model.state_dict(), step.read()))
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, rtol=1e-4, atol=1e-5)


def test_a_compiled_teacher_says_the_same(plain: Callable[[], nn.Module]) -> None:
    losses = []
    for mode in ("eager", "compile"):
        model, teacher = plain(), Teacher(plain().eval(), 0.5, 4.0)
        optimizer = create_optimizer(model, Phase(epochs=1, lr=0.1))
        config = TrainConfig(amp=False, step=mode)  # type: ignore[arg-type]
        step = Step(model, optimizer, config, teacher)
        torch.manual_seed(0)
        for n in (32, 32, 5):
            step(torch.randn(n, 1, 8, 8), torch.randint(4, (n,)), 0.1)
        losses.append(step.read()[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_resumed_is_bit_identical(
    data: Data, plain: Callable[[], nn.Module], tmp_path: Path
) -> None:
    def run(folder: str, epochs: int) -> nn.Module:
        model = plain()
        phase = Phase(epochs=epochs, lr=0.1, schedule="constant")
        config = TrainConfig(amp=False, step="compile")
        fit(model, data, phase, config, folder=tmp_path / folder, seed=3)
        return model

    whole, _ = run("whole", 2), run("stopped", 1)
    resumed = run("stopped", 2).state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed[name]), name


def test_widths_of_many_stages_are_all_compiled() -> None:
    """One class, many widths: without a reset, the ninth falls back to eager with a warning."""
    from torch._dynamo.utils import counters

    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, width), nn.Linear(width, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(self.fc1(x))

    for width in range(3, 13):
        model = Net(width)
        optimizer = create_optimizer(model, Phase(epochs=1, lr=0.1))
        step = Step(model, optimizer, TrainConfig(amp=False, step="compile"))
        counters.clear()
        step(torch.randn(8, 4), torch.zeros(8, dtype=torch.long), 0.1)
        assert counters["stats"]["unique_graphs"] == 1, width
