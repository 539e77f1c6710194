import pytest

from masksparsity.errors import MaskSparsityError
from masksparsity.train.config import Phase, TaughtPhase, TrainConfig
from masksparsity.train.schedule import learning_rate


def test_cosine_falls_from_the_rate_to_zero() -> None:
    phase = Phase(epochs=10, lr=0.4)
    rates = [learning_rate(phase, epoch) for epoch in range(11)]
    assert rates[0] == 0.4
    assert rates[5] == pytest.approx(0.2)
    assert rates[10] == pytest.approx(0)
    assert rates == sorted(rates, reverse=True)


def test_steps_are_shares_of_the_phase() -> None:
    phase = Phase(epochs=100, lr=0.1, schedule="step")
    rates = [learning_rate(phase, epoch) for epoch in (0, 29.99, 30, 60, 90, 99.9)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.0001, 0.0001])


def test_warmup_rises_from_a_tenth() -> None:
    phase = Phase(epochs=10, lr=1, schedule="constant", warmup=2)
    assert [learning_rate(phase, e) for e in (0, 1, 2, 9)] == pytest.approx([0.1, 0.55, 1, 1])


@pytest.mark.parametrize("wrong", [{"epochs": -1}, {"lr": 0}, {"precise_bn": -1}, {"ema": 1}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(MaskSparsityError):
        Phase(**{"epochs": 1, "lr": 0.1} | wrong)  # type: ignore[arg-type]
    for taught in ({"distill": 1.1}, {"temperature": 0}):
        with pytest.raises(MaskSparsityError, match="share of the loss"):
            TaughtPhase(**{"epochs": 1, "lr": 0.1} | taught)  # type: ignore[arg-type]
    with pytest.raises(MaskSparsityError, match="batch_size"):
        TrainConfig(batch_size=0)
