"""The loss of a batch of labeled and pseudo-labeled images (paper, section 3.1 and Algorithm 1)."""

import torch
import torch.nn.functional as F

from models.configs import TrainConfig


def soft_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each row against a distribution: logits and target float [n, classes] -> float [n]."""
    return -(target * F.log_softmax(logits, dim=-1)).sum(dim=-1)


def retemper(probabilities: torch.Tensor, temperature: float) -> torch.Tensor:
    """p^(1/T), renormalized: float [n, classes] -> the same shape. T=1 only renormalizes (stored labels are fp16)."""
    powered = probabilities.clamp_min(0) ** (1.0 / temperature)
    return powered / powered.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(powered.dtype).tiny)


def labeled_losses(logits: torch.Tensor, labels: torch.Tensor, config: TrainConfig) -> torch.Tensor:
    """Per-image loss on true labels, smoothed: logits float [n, classes], labels int64 [n] -> float [n]."""
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=config.label_smoothing)


def unlabeled_losses(logits: torch.Tensor, pseudo_labels: torch.Tensor, config: TrainConfig) -> torch.Tensor:
    """Per-image loss on pseudo labels: float [m, classes] twice -> float [m].

    Soft labels are used as they are; hard ones are the argmax, smoothed like true labels (facts: released code).
    """
    if config.pseudo_labels == "hard":
        return labeled_losses(logits, pseudo_labels.argmax(dim=-1), config)
    return soft_cross_entropy(logits, retemper(pseudo_labels, config.temperature))


def combine(labeled: torch.Tensor | None, unlabeled: torch.Tensor | None, config: TrainConfig) -> torch.Tensor:
    """The scalar loss of one replica in the reading that the config names; of one part alone its mean.

    `concatenated`: the mean over all images (section 3.1). `sum_of_means`: Algorithm 1. `ratio_weighted`: the released
    code, labeled mean + batch ratio x unlabeled mean.
    """
    if labeled is None or unlabeled is None:
        only = unlabeled if labeled is None else labeled
        if only is None:
            raise ValueError("a batch without images has no loss")
        return only.mean()
    if config.loss == "concatenated":
        return torch.cat([labeled, unlabeled]).mean()
    weight = 1.0 if config.loss == "sum_of_means" else len(unlabeled) / len(labeled)
    return labeled.mean() + weight * unlabeled.mean()
