"""The weights that a training starts from: chance, another model artifact, or pretrained ones; and which stay fixed."""

import math
from typing import Any

import safetensors.torch
from timm.models._manipulate import group_with_matcher
from torch import nn

from models.configs import ModelConfig
from models.pretrained import Pretrained
from storage.errors import UserError


def load_pretrained(model: nn.Module, pretrained: Pretrained, config: ModelConfig, as_it_is: bool) -> None:
    """Load pretrained weights into a fresh network, in place.

    A classifier of another number of classes keeps its random weights, which `as_it_is` refuses. Raises UserError where
    the weights are of another network, or normalized differently (`as_it_is`).
    """
    told = f"pretrained={pretrained.source}"
    if pretrained.architecture != config.name.split(".")[0]:
        raise UserError(
            f"{told} is a {pretrained.architecture}, model.name is {config.name}; set model.name={pretrained.architecture}"
        )
    state = safetensors.torch.load_file(pretrained.weights)
    own = model.state_dict()
    classifier = {name for name in own if name.startswith(_classifier_name(model))}
    others = sorted(n for n in classifier if n in state and state[n].shape != own[n].shape)
    if others:
        if as_it_is:
            raise UserError(
                f"{told} tells {pretrained.num_classes} classes apart, the data set has {len(own[others[0]])}; set epochs "
                "to train a classifier for them, or take weights for these classes"
            )
        state = {name: tensor for name, tensor in state.items() if name not in classifier}
    else:
        classifier = set()
    if as_it_is:
        _check_normalization(told, pretrained.config.get("pretrained_cfg", {}), config)
    _load(model, state, classifier, told)


def load_model_state(model: nn.Module, state: dict[str, Any], what: str) -> None:
    """Load the weights of a model artifact into a fresh network, in place. Raises UserError where it is another network."""
    _load(model, state, set(), what)


def freeze_shallow(model: nn.Module, share: float) -> list[nn.Module]:
    """Fix the first `share` of the layers, counted as timm groups them from the input on, in [0, 1).

    Their parameters get no gradient. Returns their modules, which are to be kept in evaluation mode, so that batch norm
    keeps its statistics and dropout is off. Raises UserError on a network whose layers timm cannot order.
    """
    if not share:
        return []
    try:
        matcher = model.group_matcher(coarse=True)  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise UserError("frozen_layers: timm does not know the order of this network's layers; set it to 0") from error
    layer_of: dict[str, int] = group_with_matcher(model.named_parameters(), matcher, reverse=True)
    depth = max(layer_of.values()) + 1
    fixed = {name for name, layer in layer_of.items() if layer < math.floor(share * depth)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in fixed)
    return [
        module
        for module in model.modules()
        if (own := list(module.parameters())) and not any(parameter.requires_grad for parameter in own)
    ]


def _load(model: nn.Module, state: dict[str, Any], may_miss: set[str], what: str) -> None:
    own = model.state_dict()
    wrong = [n for n, t in state.items() if n not in own or own[n].shape != t.shape]
    wrong += [n for n in own if n not in state and n not in may_miss and not n.endswith("num_batches_tracked")]
    if wrong:
        raise UserError(
            f"{what}: its weights are of another network, {len(wrong)} tensors differ (the first: {wrong[0]}); use the "
            "same model.name and model.args"
        )
    model.load_state_dict(state, strict=False)


def _classifier_name(model: nn.Module) -> str:
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    name = cfg.get("classifier") if isinstance(cfg, dict) else getattr(cfg, "classifier", None)
    return f"{name[0] if isinstance(name, (tuple, list)) else name or 'classifier'}."


def _check_normalization(told: str, cfg: dict[str, Any], config: ModelConfig) -> None:
    for name in ("mean", "std"):
        theirs, ours = cfg.get(name), getattr(config, name)
        if theirs and any(abs(a - b) > 1e-3 for a, b in zip(theirs, ours, strict=True)):
            raise UserError(
                f"{told} was trained with model.{name}={list(theirs)}, here it is {list(ours)}; set it to that"
            )
