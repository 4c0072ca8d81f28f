"""Learning rate, weight-average decay and step count, in numbers worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.configs import TrainConfig
from models.schedule import ema_decay, learning_rate, total_steps


def config(**settings: object) -> TrainConfig:
    return TrainConfig.model_validate({"model": {"name": "any"}, **settings})


PAPER = config()  # labeled batch 2048, 0.016 per 256, 5 epochs of warm-up, x0.97 every 2.4 epochs, 350 epochs
IMAGENET = 1_281_167
# 10 steps an epoch, peak 1, so that epochs are easy to count.
SMALL = {"labeled_batch": 256, "optimizer": {"lr_per_256": 1.0}, "epochs": 20}
NUM_SMALL = 2560


def rate_at_epoch(epoch: float, **schedule: object) -> float:
    return learning_rate(config(**SMALL, schedule=schedule), round(epoch * 10), NUM_SMALL)


def test_the_papers_peak_is_0_128_at_a_labeled_batch_of_2048() -> None:
    steps_an_epoch = IMAGENET / 2048
    last_of_warmup = int(5 * steps_an_epoch)
    assert learning_rate(PAPER, last_of_warmup - 1, IMAGENET) == pytest.approx(0.128, rel=1e-3)


def test_warm_up_rises_linearly_over_labeled_epochs_to_the_peak() -> None:
    rates = [rate_at_epoch(step / 10) for step in range(50)]
    assert rates == pytest.approx([(step + 1) / 50 for step in range(50)])


def test_the_unlabeled_images_do_not_drive_the_schedule() -> None:
    rates = {learning_rate(config(**SMALL, batch_ratio=ratio), 70, NUM_SMALL) for ratio in (1, 3, 28)}
    assert len(rates) == 1
    assert {total_steps(config(**SMALL, batch_ratio=ratio), NUM_SMALL) for ratio in (1, 28)} == {200}


@pytest.mark.parametrize(
    ("epoch", "steps"), [(5.0, 2), (7.1, 2), (7.2, 3), (9.5, 3), (9.6, 4), (11.9, 4), (12.0, 5), (19.9, 8)]
)
def test_decay_goes_in_steps_counted_from_the_start_of_training_as_in_tensorflow(epoch: float, steps: int) -> None:
    """`exponential_decay(staircase=True)`: the first two steps fall into the warm-up, which hides them."""
    assert rate_at_epoch(epoch) == pytest.approx(0.97**steps, rel=1e-9)


def test_cosine_falls_from_the_peak_after_warm_up_to_zero_after_the_last_step() -> None:
    assert rate_at_epoch(5, kind="cosine") == pytest.approx(1.0)
    assert rate_at_epoch(12.5, kind="cosine") == pytest.approx(0.5)
    assert rate_at_epoch(10, kind="cosine") == pytest.approx(0.75)  # a third of the way: cos 60 degrees = 0.5
    assert rate_at_epoch(15, kind="cosine") == pytest.approx(0.25)
    assert 0 < rate_at_epoch(19.9, kind="cosine") < 2e-4
    assert rate_at_epoch(20, kind="cosine") == pytest.approx(0.0, abs=1e-12)
    assert rate_at_epoch(25, kind="cosine") == pytest.approx(0.0, abs=1e-12)


def test_without_warm_up_the_first_rate_is_the_peak() -> None:
    assert rate_at_epoch(0, warmup_epochs=0) == 1.0
    assert rate_at_epoch(0, kind="cosine", warmup_epochs=0) == 1.0


@given(
    st.floats(0.01, 50), st.floats(0, 60), st.integers(1, 4096), st.integers(1, 10**6), st.integers(0, 10**5),
    st.sampled_from(["exponential", "cosine"]),
)  # fmt: skip
def test_the_rate_is_never_negative_and_never_above_the_peak(
    epochs: float, warmup: float, batch: int, images: int, step: int, kind: str
) -> None:
    settings = config(epochs=epochs, labeled_batch=batch, schedule={"kind": kind, "warmup_epochs": warmup})
    peak = settings.optimizer.lr_per_256 * batch / 256
    assert 0 <= learning_rate(settings, step, images) <= peak * (1 + 1e-12)


@pytest.mark.parametrize(("step", "decay"), [(0, 1 / 10), (1, 2 / 11), (8, 0.5), (89_981, 89_982 / 89_991)])
def test_the_average_warms_up_by_the_number_of_steps(step: int, decay: float) -> None:
    assert ema_decay(config(), step) == pytest.approx(decay, rel=1e-12)


def test_the_average_ends_at_the_decay_that_was_asked() -> None:
    assert ema_decay(config(), 10**6) == 0.9999
    assert ema_decay(config(ema_decay=0.3), 100) == 0.3
    assert ema_decay(config(ema_decay=0.0), 0) == 0.0


@pytest.mark.parametrize(
    ("epochs", "batch", "images", "steps"),
    [(350, 2048, IMAGENET, 218_949), (2, 8, 48, 12), (1, 8, 50, 6), (1, 8, 53, 7), (0.01, 8, 48, 1)],
)
def test_total_steps_are_labeled_epochs_rounded_and_at_least_one(
    epochs: float, batch: int, images: int, steps: int
) -> None:
    assert total_steps(config(epochs=epochs, labeled_batch=batch), images) == steps
