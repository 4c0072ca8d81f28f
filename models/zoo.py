"""Networks: any timm model by name, built as the paper sets it, saved so that others load it with timm alone."""

import difflib
import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.layers import DropPath
from torch import nn

from models import variants  # noqa: F401  (registers our networks)
from models.configs import ModelConfig
from models.worker import Worker
from storage.artifacts import Manifest
from storage.errors import StoreError, UserError
from storage.objects import Store

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
NEAR_NAMES = 5
RELOAD_TOLERANCE = 0.0  # the reloaded network must give the very same logits


def build(config: ModelConfig, num_classes: int, bn_momentum: float = 0.01) -> nn.Module:
    """A fresh network from torch's current seed, with `num_classes` outputs, on the CPU.

    Stochastic depth is scaled so that the last block gets exactly `drop_path` (timm's own rule gives EfficientNet-B0's
    last block 0.1875 where 0.2 is asked). Raises UserError on a name, argument or class count that does not fit.
    """
    wanted = config.args.get("num_classes", num_classes)
    if wanted != num_classes:
        raise UserError(
            f"model.args.num_classes: {config.name} is set to {wanted} classes, the data set has {num_classes}; "
            "remove the argument, the class count comes from the data"
        )
    arguments = {k: v for k, v in config.args.items() if k != "num_classes"}
    if config.drop_path:
        arguments["drop_path_rate"] = config.drop_path
    try:
        model = timm.create_model(
            config.name, pretrained=False, num_classes=num_classes, drop_rate=config.dropout, **arguments
        )
    except (RuntimeError, TypeError, ValueError, AssertionError, KeyError) as error:
        known = timm.is_model(config.name.split(".")[0])
        near = [] if known else difflib.get_close_matches(config.name.split(".")[0], timm.list_models(), NEAR_NAMES)
        hint = f"; near names: {', '.join(near)}" if near else ""
        raise UserError(f"model.name={config.name}: timm cannot build it with {arguments} ({error}){hint}") from error
    _scale_drop_path(model, config.drop_path)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = bn_momentum
    return model


def save(model: nn.Module, config: ModelConfig, class_names: list[str], folder: Path) -> None:
    """Write `model.safetensors` and timm's `config.json` into `folder`, reload them with timm and compare.

    Raises StoreError where the reloaded network does not give the same logits (a network that was changed after
    timm built it reloads silently as the plain one).
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(weights, str(folder / WEIGHTS_FILE))
    described: dict[str, Any] = {
        "architecture": config.name.split(".")[0],
        "num_classes": len(class_names),
        "label_names": class_names,
        "model_args": {k: v for k, v in config.args.items() if k != "num_classes"},
        "pretrained_cfg": {
            "tag": "noisy_student",
            "input_size": [3, config.image_size, config.image_size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": config.crop_pct,
            "crop_mode": "center",
            "mean": list(config.mean),
            "std": list(config.std),
            "num_classes": len(class_names),
            "custom_load": False,
        },
    }
    (folder / CONFIG_FILE).write_text(json.dumps(described, indent=1))
    reloaded = load_folder(folder)
    probe = torch.linspace(-2, 2, 2 * 3 * config.image_size**2).reshape(2, 3, config.image_size, config.image_size)
    original = model.to("cpu").to(memory_format=torch.contiguous_format).eval()
    with torch.inference_mode():
        difference = (reloaded(probe) - original(probe)).abs().max().item()
    if not difference <= RELOAD_TOLERANCE:
        raise StoreError(f"{config.name} reloads from its own files as another network (logits differ by {difference})")


def load_folder(folder: Path) -> nn.Module:
    """The network in a folder of `save`, through `timm.create_model("local-dir:...")`, in evaluation mode."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def materialize(store: Store, model: Manifest, folder: Path) -> None:
    """Lay the files of a model artifact into `folder` under the names that timm expects. Checks each sha256."""
    names = (WEIGHTS_FILE, CONFIG_FILE)
    with store.local_copies([model.file(name) for name in names]) as copies:
        for name, copy in zip(names, copies, strict=True):
            shutil.copyfile(copy, folder / name)


def inspect_models(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Worker function: build each network of `spec["models"]` (name -> ModelConfig) and count its parameters.

    So that a wrong name, argument or image size is known before anything expensive starts. Raises UserError naming the
    field.
    """
    counts = {}
    for field, raw in spec["models"].items():
        config = ModelConfig.model_validate(raw)
        try:
            with torch.device("meta"):
                model = build(config, spec["num_classes"])
                logits = model.eval()(torch.zeros(1, 3, config.image_size, config.image_size))
        except UserError as error:
            raise UserError(f"{field.removesuffix('.model')}.{error}") from None  # it names model.name, model.args
        except Exception as error:  # any network may fail in its own way
            raise UserError(
                f"{field}: {config.name} with {config.args} cannot take an image of {config.image_size} x "
                f"{config.image_size} pixels ({error}); change its args or image_size"
            ) from error
        if logits.shape != (1, spec["num_classes"]):
            raise UserError(f"{field}: {config.name} gives {tuple(logits.shape)} for one image, no vector of classes")
        counts[field] = sum(parameter.numel() for parameter in model.parameters())
    return {"num_parameters": counts}


def _scale_drop_path(model: nn.Module, last_block: float) -> None:
    paths = [module for module in model.modules() if isinstance(module, DropPath)]
    largest = max((float(path.drop_prob or 0.0) for path in paths), default=0.0)
    if last_block and not largest:
        raise UserError(f"model.drop_path={last_block}: this network has no stochastic depth; set it to 0")
    for path in paths:
        if largest:
            path.drop_prob = last_block * (float(path.drop_prob or 0.0) / largest)  # the last block's is exact
