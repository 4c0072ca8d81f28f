"""FGSM and PGD: by hand on a linear network, and against foolbox on a convolutional one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models.attacks import PixelNetwork, attack, fgsm, loss_gradient, pgd

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network(seed: int = 0) -> PixelNetwork:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3, stride=2), nn.SiLU())
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    model[-1].weight.data.mul_(20)
    return PixelNetwork(model, MEAN, STD)


def images(count: int = 6, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 16, 16, generator=generator), torch.randint(0, 5, (count,), generator=generator)


class Linear(nn.Module):
    """Two classes: the first likes bright pixels, the second dark ones."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        total = pixels.sum(dim=(1, 2, 3))
        return torch.stack([total, -total], dim=1)


def test_one_step_against_a_linear_network_by_hand() -> None:
    """To hurt class 0 every pixel gets darker, to hurt class 1 brighter; at 0 and 1 it stops."""
    pixels = torch.tensor([0.5, 0.02, 0.99]).reshape(1, 3, 1, 1).repeat(2, 1, 1, 1) * torch.ones(2, 3, 2, 2) / 4
    (moved,) = fgsm(Linear(), pixels, torch.tensor([0, 1]), [0.1])
    assert torch.allclose(moved[0], (pixels[0] - 0.1).clamp(0, 1))
    assert torch.allclose(moved[1], pixels[1] + 0.1)


def test_epsilon_zero_is_the_image_itself() -> None:
    pixels, labels = images()
    for method in ("fgsm", "pgd"):
        (moved,) = attack(network(), pixels, labels, {"method": method, "steps": 10, "step_share": 0.25}, [0.0])
        assert torch.equal(moved, pixels)


@given(st.floats(0, 0.3), st.sampled_from(["fgsm", "pgd"]), st.integers(0, 20))
def test_no_pixel_goes_further_than_epsilon_or_out_of_range(epsilon: float, method: str, seed: int) -> None:
    pixels, labels = images(2, seed)
    (moved,) = attack(network(), pixels, labels, {"method": method, "steps": 3, "step_share": 0.9}, [epsilon])
    assert (moved - pixels).abs().max() <= epsilon + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1


def test_an_attack_raises_the_loss_and_more_steps_raise_it_more() -> None:
    own, (pixels, labels) = network(), images()
    losses = [
        nn.functional.cross_entropy(own(moved), labels).item()
        for moved in (pixels, *fgsm(own, pixels, labels, [0.03]), pgd(own, pixels, labels, 0.03))
    ]
    assert losses[0] < losses[1] < losses[2]


def test_one_step_of_epsilon_is_fgsm() -> None:
    own, (pixels, labels) = network(), images()
    (single,) = fgsm(own, pixels, labels, [0.05])
    assert torch.allclose(pgd(own, pixels, labels, 0.05, steps=1, step_size=0.05), single, atol=1e-6)


def test_an_images_gradient_does_not_hang_on_its_batch() -> None:
    own, (pixels, labels) = network(), images()
    together = loss_gradient(own, pixels, labels)
    alone = torch.cat([loss_gradient(own, pixels[n : n + 1], labels[n : n + 1]) for n in range(len(pixels))])
    assert torch.allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize("epsilon", [1 / 255, 4 / 255, 16 / 255])
def test_fgsm_is_foolboxs(epsilon: float) -> None:
    foolbox = pytest.importorskip("foolbox")
    own, (pixels, labels) = network(), images()
    model = foolbox.PyTorchModel(own.model, bounds=(0, 1), preprocessing={"mean": MEAN, "std": STD, "axis": -3})
    _, theirs, _ = foolbox.attacks.FGSM()(model, pixels, labels, epsilons=epsilon)
    (ours,) = fgsm(own, pixels, labels, [epsilon])
    assert (ours - theirs).abs().max() < 1e-5
    assert (own(ours) - own(theirs)).abs().max() < 1e-5


@pytest.mark.parametrize("epsilon", [4 / 255, 16 / 255])
def test_ten_steps_of_pgd_are_foolboxs(epsilon: float) -> None:
    foolbox = pytest.importorskip("foolbox")
    own, (pixels, labels) = network(), images()
    model = foolbox.PyTorchModel(own.model, bounds=(0, 1), preprocessing={"mean": MEAN, "std": STD, "axis": -3})
    theirs_attack = foolbox.attacks.LinfPGD(abs_stepsize=epsilon / 4, steps=10, random_start=False)
    _, theirs, _ = theirs_attack(model, pixels, labels, epsilons=epsilon)
    ours = pgd(own, pixels, labels, epsilon, steps=10)
    assert (ours - theirs).abs().max() < 1e-5
    assert (own(ours) - own(theirs)).abs().max() < 1e-5
