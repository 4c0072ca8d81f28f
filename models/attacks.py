"""Adversarial images: FGSM and PGD in the maximum norm, on pixels in [0, 1], against the un-noised network.

Goodfellow et al. 2015 and Madry et al. 2018. Held against foolbox on the same network by tests/models/test_attacks.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

STEP_SHARE = 2.5  # of epsilon that all steps of PGD go together: Madry et al. 2018, section 5 (2.5 epsilon / steps)

Network = Callable[[torch.Tensor], torch.Tensor]


class PixelNetwork(nn.Module):
    """A network of pixels in [0, 1], float32 [n, 3, h, w]: normalizes them by channel, then runs `model`. For gradients."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [n, 3, h, w] in [0, 1] -> logits [n, classes]."""
        logits: torch.Tensor = self.model((images - self.mean) / self.std)
        return logits


def loss_gradient(network: Network, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The gradient of each image's cross-entropy by its pixels, of the shape of `images`."""
    with torch.enable_grad():
        pixels = images.detach().clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(cross_entropy(network(pixels), labels, reduction="sum"), pixels)
    return gradient


def fgsm(network: Network, images: torch.Tensor, labels: torch.Tensor, epsilons: Sequence[float]) -> list[torch.Tensor]:
    """One signed gradient step of each size, cut off at [0, 1]; one gradient serves them all.

    images: float32 [n, 3, h, w] in [0, 1]; labels: int64 [n], the true classes.
    """
    direction = loss_gradient(network, images, labels).sign()
    return [(images + epsilon * direction).clamp(0, 1) for epsilon in epsilons]


def pgd(
    network: Network,
    images: torch.Tensor,
    labels: torch.Tensor,
    epsilon: float,
    steps: int = 10,
    step_size: float | None = None,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Signed gradient steps, each time back to within `epsilon` of the image and to [0, 1].

    `step_size`: None: 2.5 epsilon / steps. `start`: offsets in [-1, 1], in units of epsilon, of the first point; None: the
    image itself.
    """
    step_size = STEP_SHARE * epsilon / steps if step_size is None else step_size
    moved = images if start is None else (images + epsilon * start).clamp(0, 1)
    for _ in range(steps):
        moved = moved + step_size * loss_gradient(network, moved, labels).sign()
        moved = torch.minimum(torch.maximum(moved, images - epsilon), images + epsilon).clamp(0, 1)
    return moved


def attack(
    network: Network, images: torch.Tensor, labels: torch.Tensor, settings: dict[str, Any], epsilons: Sequence[float]
) -> list[torch.Tensor]:
    """The images attacked with each epsilon, by `settings`: method (fgsm, pgd), steps and step_size of pgd."""
    if settings["method"] == "fgsm":
        return fgsm(network, images, labels, epsilons)
    return [
        pgd(network, images, labels, epsilon, settings["steps"], settings["step_share"] * epsilon)
        for epsilon in epsilons
    ]
