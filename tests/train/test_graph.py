"""What a captured step does, with a stand-in for the capture on the CPU; and really, on a GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import masksparsity as ms
from masksparsity.data import Data
from masksparsity.errors import MaskSparsityError
from masksparsity.train.config import Phase, TrainConfig
from masksparsity.train.graph import WARM_UP, Captured, CaptureStream
from masksparsity.train.loop import fit, read_metrics
from masksparsity.train.step import Step, create_optimizer

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph: needs a GPU")
PHASE = Phase(epochs=3, lr=0.1, weight_decay=5e-4)


class Rerun(CaptureStream):
    """Runs again what a capture would replay: the same work on the same memory."""

    def __init__(self) -> None:
        self.runs = self.captures = 0

    def run(self, work: Callable[[], None]) -> None:
        self.runs += 1
        work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        return work


def batches(device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(n, 1, 8, 8, generator=generator).to(device),
            torch.randint(4, (n,), generator=generator).to(device),
        )
        for n in [16, 16, 5, 16, 16, 16, 16, 5, 16, 16]
    ]


def penalties(model: nn.Module, form: str, device: str = "cpu") -> ms.MaskedL1:
    graph = ms.trace(model, torch.zeros(1, 1, 8, 8, device=device))
    keep = ms.select.uniform(graph, ms.scores.norm(model, graph), 0.5)
    if form == "decay":
        return ms.ScheduledDecay(model, graph, keep, steps=7)
    return getattr(ms, form)(model, graph, keep, strength=0.1)


def trained(
    model: nn.Module, form: str, mode: str, stream: Rerun | None = None, device: str = "cpu"
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """All that the training leaves behind."""
    model = model.to(device)
    optimizer = create_optimizer(model, PHASE)
    penalty = penalties(model, form, device)
    penalty.attach(optimizer)
    step = Step(model, optimizer, TrainConfig(step=mode))  # type: ignore[arg-type]
    if stream is not None:
        step.usual = Captured(step.eager, stream)
    model.train()
    torch.manual_seed(5)  # dropout
    for k, (images, labels) in enumerate(batches(device)):
        step(images, labels, 0.1 / (1 + k))
    moments = {f"moment {k}": s["momentum_buffer"] for k, s in
               enumerate(optimizer.state.values())}  # fmt: skip
    return model.state_dict() | moments | penalty.state_dict(), step.read()


def assert_same(ours: tuple, theirs: tuple) -> None:
    assert ours[1] == theirs[1]
    assert ours[0].keys() == theirs[0].keys()
    for name, value in theirs[0].items():
        assert torch.equal(ours[0][name], value), name


@pytest.mark.parametrize("form", ["MaskedL1", "Proximal", "decay"])
def test_warm_up_and_static_inputs_change_nothing(
    network: Callable[[], nn.Module], form: str
) -> None:
    stream = Rerun()
    assert_same(trained(network(), form, "eager", stream), trained(network(), form, "eager"))
    assert (stream.runs, stream.captures) == (WARM_UP, 1)


def test_inputs_keep_their_place_and_layout() -> None:
    seen = []
    captured = Captured(lambda images: seen.append((images.data_ptr(), images.clone())), Rerun())
    given = [torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last) for _ in range(6)]
    for images in given:
        captured(images)
    assert len({place for place, _ in seen}) == 1
    assert all(torch.equal(own, images) for (_, own), images in zip(seen, given, strict=True))
    assert captured.inputs[0].is_contiguous(memory_format=torch.channels_last)


@gpu
@pytest.mark.parametrize("form", ["MaskedL1", "Proximal", "decay"])
def test_captured_equals_eager_to_the_bit(network: Callable[[], nn.Module], form: str) -> None:
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        captured = trained(network(), form, "graph", device="cuda")
        assert_same(captured, trained(network(), form, "eager", device="cuda"))


@gpu
def test_resumed_under_capture_is_bit_identical(
    data: Data, network: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in (data.train, data.test):
        split.images, split.labels = split.images.cuda(), split.labels.cuda()  # type: ignore[union-attr]

    def run(folder: Path, epochs: int) -> nn.Module:
        model = network().cuda()
        phase = Phase(epochs=epochs, lr=0.1, schedule="constant")
        config = TrainConfig(step="graph")
        fit(
            model,
            data,
            phase,
            config,
            folder=folder,
            seed=3,
            penalty=penalties(model, "decay", "cuda"),
        )
        return model

    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        whole = run(tmp_path / "whole", 4)
        run(tmp_path / "stopped", 2)
        resumed = run(tmp_path / "stopped", 4)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    losses = [[line["train_loss"] for line in read_metrics(tmp_path / part)]
              for part in ("whole", "stopped")]  # fmt: skip
    assert losses[0] == losses[1]


@gpu
def test_a_network_that_reads_the_device_is_refused(network: Callable[[], nn.Module]) -> None:
    class Reads(nn.Sequential):
        def forward(self, images: Tensor) -> Tensor:
            images.sum().item()
            return super().forward(images)

    model = Reads(*network()).cuda()
    step = Step(model, create_optimizer(model, PHASE), TrainConfig(step="graph"))
    images, labels = batches("cuda")[0]
    for _ in range(WARM_UP):
        step(images, labels, 0.1)
    with pytest.raises(MaskSparsityError, match=r"--train\.step eager"):
        step(images, labels, 0.1)
