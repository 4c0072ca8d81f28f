"""The three readings of the loss on cases worked out by hand."""

import math

import pytest
import torch

from models.configs import TrainConfig
from models.losses import combine, labeled_losses, retemper, unlabeled_losses

LOG = math.log
READINGS = ("concatenated", "sum_of_means", "ratio_weighted")

# Two classes; logits (0, ln 3) are the probabilities (1/4, 3/4).
LOGITS = torch.tensor([[0.0, LOG(3)], [0.0, 0.0], [LOG(3), 0.0], [0.0, LOG(3)], [0.0, 0.0], [0.0, LOG(3)]])
LABELED, UNLABELED = LOGITS[:2], LOGITS[2:]  # 2 labeled, 4 unlabeled: ratio 2
LABELS = torch.tensor([1, 0])
SOFT = torch.tensor([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1], [0.0, 1.0]])
LABELED_BY_HAND = [LOG(4 / 3), LOG(2)]
SOFT_BY_HAND = [
    0.5 * LOG(4 / 3) + 0.5 * LOG(4),
    0.2 * LOG(4) + 0.8 * LOG(4 / 3),
    LOG(2),
    LOG(4 / 3),
]


def config(**settings: object) -> TrainConfig:
    return TrainConfig.model_validate({"model": {"name": "any"}, "label_smoothing": 0.0, **settings})


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_the_losses_of_single_images_are_cross_entropies() -> None:
    assert labeled_losses(LABELED, LABELS, config()).tolist() == pytest.approx(LABELED_BY_HAND)
    assert unlabeled_losses(UNLABELED, SOFT, config()).tolist() == pytest.approx(SOFT_BY_HAND)


@pytest.mark.parametrize(
    ("reading", "by_hand"),
    [
        ("concatenated", mean(LABELED_BY_HAND + SOFT_BY_HAND)),
        ("sum_of_means", mean(LABELED_BY_HAND) + mean(SOFT_BY_HAND)),
        ("ratio_weighted", mean(LABELED_BY_HAND) + 2 * mean(SOFT_BY_HAND)),
    ],
)
def test_the_three_readings_differ_as_paper_algorithm_and_code_do(reading: str, by_hand: float) -> None:
    settings = config(loss=reading)
    labeled, unlabeled = labeled_losses(LABELED, LABELS, settings), unlabeled_losses(UNLABELED, SOFT, settings)
    assert combine(labeled, unlabeled, settings).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("reading", READINGS)
def test_without_unlabeled_images_every_reading_is_the_labeled_mean(reading: str) -> None:
    settings = config(loss=reading)
    assert combine(labeled_losses(LABELED, LABELS, settings), None, settings).item() == pytest.approx(
        mean(LABELED_BY_HAND)
    )


def gradient(reading: str) -> torch.Tensor:
    settings, logits = config(loss=reading), LOGITS.clone().requires_grad_(True)
    labeled, unlabeled = labeled_losses(logits[:2], LABELS, settings), unlabeled_losses(logits[2:], SOFT, settings)
    combine(labeled, unlabeled, settings).backward()
    assert logits.grad is not None
    return logits.grad


def test_the_released_codes_gradient_is_one_plus_ratio_times_that_of_section_3_1() -> None:
    assert torch.allclose(gradient("ratio_weighted"), (1 + 2) * gradient("concatenated"), rtol=1e-6)
    unscaled = gradient("sum_of_means") / gradient("concatenated")
    assert unscaled[0].tolist() == pytest.approx([3, 3])  # labeled: 1/2 against 1/6
    assert unscaled[3].tolist() == pytest.approx([1.5, 1.5])  # unlabeled: 1/4 against 1/6


def test_hard_labels_are_smoothed_and_soft_ones_are_not() -> None:
    smooth = 0.1  # over two classes: 0.95 and 0.05
    soft = unlabeled_losses(UNLABELED, SOFT, config(label_smoothing=smooth))
    assert soft.tolist() == pytest.approx(SOFT_BY_HAND)
    hard = unlabeled_losses(UNLABELED[1:2], SOFT[1:2], config(label_smoothing=smooth, pseudo_labels="hard"))
    assert hard.item() == pytest.approx(0.95 * LOG(4 / 3) + 0.05 * LOG(4))
    labeled = labeled_losses(LABELED[:1], LABELS[:1], config(label_smoothing=smooth))
    assert labeled.item() == pytest.approx(0.95 * LOG(4 / 3) + 0.05 * LOG(4))


def test_hard_labels_are_the_most_probable_class() -> None:
    hard = unlabeled_losses(UNLABELED[1:], SOFT[1:], config(pseudo_labels="hard"))
    assert hard.tolist() == pytest.approx([LOG(4 / 3), LOG(2), LOG(4 / 3)])


@pytest.mark.parametrize(("temperature", "by_hand"), [(0.5, [0.1, 0.9]), (1.0, [0.25, 0.75]), (2.0, [1, math.sqrt(3)])])
def test_temperature_raises_probabilities_to_its_inverse(temperature: float, by_hand: list[float]) -> None:
    found = retemper(torch.tensor([[0.25, 0.75]]), temperature)
    assert found[0].tolist() == pytest.approx([value / sum(by_hand) for value in by_hand])


def test_temperature_changes_the_soft_loss_and_not_the_hard_one() -> None:
    cold = [config(temperature=0.5, pseudo_labels=kind) for kind in ("soft", "hard")]
    soft = unlabeled_losses(UNLABELED[:1], torch.tensor([[0.25, 0.75]]), cold[0])
    assert soft.item() == pytest.approx(0.1 * LOG(4 / 3) + 0.9 * LOG(4))
    hard = unlabeled_losses(UNLABELED[:1], torch.tensor([[0.25, 0.75]]), cold[1])
    assert hard.item() == pytest.approx(LOG(4))


def test_labels_stored_in_half_precision_are_renormalized() -> None:
    stored = torch.full((1, 3), 1 / 3).half().float()
    assert stored.sum().item() != 1.0
    assert retemper(stored, 1.0).sum().item() == pytest.approx(1.0, abs=1e-7)


def test_a_probability_of_zero_has_a_finite_gradient_at_any_temperature() -> None:
    logits = torch.zeros(1, 2, requires_grad=True)
    unlabeled_losses(logits, torch.tensor([[0.0, 1.0]]), config(temperature=3.0)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist()[0] == pytest.approx([0.5, -0.5])
