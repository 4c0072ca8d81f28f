"""Dropout and stochastic depth for the labeled images of a batch alone (the paper's table 6).

A batch is [labeled; unlabeled], so noise that is off for unlabeled images is noise on the first rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, drop_path
from torch import nn

from models.configs import TrainConfig
from storage.errors import UserError


@dataclass
class LabeledRows:
    """How many rows of the batch at hand are labeled images; the modules below look here."""

    count: int = 0


class LabeledDropPath(nn.Module):
    """Stochastic depth on the first rows: float [n, ...] -> the same shape."""

    def __init__(self, path: DropPath, rows: LabeledRows) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep, self.rows = path.drop_prob, path.scale_by_keep, rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows from the labeled count on pass unchanged."""
        if not self.training or not self.drop_prob:
            return x
        n = self.rows.count
        return torch.cat([drop_path(x[:n], self.drop_prob, True, self.scale_by_keep), x[n:]])


class LabeledDropout(nn.Module):
    """Dropout on the first rows: float [n, ...] -> the same shape."""

    def __init__(self, p: float, rows: LabeledRows) -> None:
        super().__init__()
        self.p, self.rows = p, rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows from the labeled count on pass unchanged."""
        if not self.training or not self.p:
            return x
        n = self.rows.count
        return torch.cat([F.dropout(x[:n], self.p), x[n:]])


def spare_unlabeled(model: nn.Module, config: TrainConfig) -> LabeledRows:
    """Switch off, for the rows behind `count`, what the config says: replaces modules of the network in place.

    Raises UserError on a network whose dropout is neither a module nor timm's `drop_rate` before its classifier.
    """
    rows = LabeledRows()
    if not config.unlabeled_drop_path:
        _replace(model, DropPath, lambda path: LabeledDropPath(path, rows))
    if not config.unlabeled_dropout and config.model.dropout:
        found = _replace(model, nn.Dropout, lambda dropout: LabeledDropout(dropout.p, rows))
        if not found:
            _before_classifier(model, rows)
    return rows


def _replace(model: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> int:
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is kind and getattr(child, "p", True)
    ]
    for parent, name in places:
        setattr(parent, name, make(getattr(parent, name)))
    return len(places)


def _before_classifier(model: nn.Module, rows: LabeledRows) -> None:
    """timm's convolutional networks call F.dropout with `drop_rate` right before the classifier."""
    get: Any = getattr(model, "get_classifier", lambda: None)
    classifier, rate = get(), getattr(model, "drop_rate", 0.0)
    if not isinstance(classifier, nn.Module) or not isinstance(rate, float) or not rate:
        raise UserError(
            "unlabeled_dropout=false: where this network has its dropout is not known; set model.dropout=0 or "
            "unlabeled_dropout=true"
        )
    dropout = LabeledDropout(rate, rows)
    model.drop_rate = 0.0  # type: ignore[assignment]
    classifier.register_forward_pre_hook(lambda module, inputs: (dropout.train(module.training)(inputs[0]),))
