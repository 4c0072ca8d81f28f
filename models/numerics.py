"""What can change the bits of a result without changing its meaning; recorded with every part and model. Without torch."""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from models.compute import ComputeConfig

VERSIONED = ("torch", "torchvision", "timm", "numpy", "pillow", "pyarrow", "webdataset", "prefect", "duckdb")


def resolve_device(config: ComputeConfig) -> str:
    """`cpu` or `cuda`. Looks for device files, so that the flow's process need not load torch (1.1 s)."""
    if config.device != "auto":
        return config.device
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    return "cuda" if not hidden and any(Path("/dev").glob("nvidia[0-9]*")) else "cpu"


def chosen_numerics(config: ComputeConfig) -> dict[str, Any]:
    """What is decided once an artifact, before its first part or step, and followed by every resume and rank."""
    device = resolve_device(config)
    return {
        "device": device,
        "dtype": config.dtype,
        "layout": "channels_last",
        "compile": False,
        "batch": config.inference_batch,
    }


def part_numerics(chosen: dict[str, Any]) -> dict[str, Any]:
    """The numerics of an inference part: what was chosen, and the versions that computed it."""
    return {**chosen, "threads": 1, **package_versions(("torch", "timm", "pillow", "pyarrow"))}


def package_versions(names: tuple[str, ...] = VERSIONED) -> dict[str, str]:
    """The installed versions of packages, without importing them."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
