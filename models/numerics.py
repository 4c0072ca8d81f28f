"""What can change the bits of a result without changing its meaning; recorded with every part and model. Without torch."""

import os
from pathlib import Path
from typing import Any

from models.compute import ComputeConfig
from models.versions import package_versions

DEFAULT_BATCH = {"cpu": 16, "cuda": 256}
# (seconds to set up, seconds for 10^9 multiply-adds on one core while the other one works too): EfficientNet-Lite0
# (0.4 x 10^9) at 224 px, batch 16, between what an AMD EPYC with avx512_bf16 and an Intel Xeon with AMX took (eager bfloat16:
# 0.027 and 0.038, compiled: 0.017 and 0.014); compiling takes 8 to 12 s there, in every process
COST = {
    ("float32", False): (0.0, 0.070),
    ("float32", True): (12.0, 0.055),
    ("bfloat16", False): (2.0, 0.032),
    ("bfloat16", True): (12.0, 0.015),
}
GPU_SPEEDUP = 500.0
SHARED_BY = 4  # processes among which a job is taken to be divided: the choice must not hang on how many there are


def resolve_device(config: ComputeConfig) -> str:
    """`cpu` or `cuda`. Looks for device files, so that the flow's process need not load torch (1.1 s)."""
    if config.device != "auto":
        return config.device
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    return "cuda" if not hidden and any(Path("/dev").glob("nvidia[0-9]*")) else "cpu"


def chosen_numerics(config: ComputeConfig, dtype: str = "float32", compiled: bool = False) -> dict[str, Any]:
    """What is decided once an artifact, before its first part or step, and followed by every resume and rank.

    `dtype` and `compiled` are what `auto` becomes.
    """
    device = resolve_device(config)
    return {
        "device": device,
        "dtype": dtype if config.dtype == "auto" else config.dtype,
        "layout": "channels_last",
        "compile": compiled if config.compile == "auto" else config.compile == "always",
        "batch": config.inference_batch or DEFAULT_BATCH[device],
    }


def asked_otherwise(config: ComputeConfig, agreed: dict[str, Any]) -> dict[str, Any]:
    """Where `config` forbids numerics that were agreed on before: the settings that would allow them, by name.

    What is `auto` allows anything, but for a GPU where this machine has none.
    """
    asked = {name: getattr(config, name) for name in ("device", "dtype", "compile", "inference_batch")}
    if config.device == "auto" and resolve_device(config) == "cpu":
        asked["device"] = "cpu"
    then = {"device": agreed["device"], "dtype": agreed["dtype"], "inference_batch": agreed["batch"]}
    then["compile"] = "always" if agreed["compile"] else "never"
    return {f"compute.{name}": then[name] for name in asked if asked[name] not in ("auto", 0, then[name])}


def labeling_choices(config: ComputeConfig, bfloat16: bool, compiler: bool) -> list[dict[str, Any]]:
    """The numerics among which the cheapest for a job is taken, given what the hardware and the machine offer."""
    dtypes = ("float32", "bfloat16") if bfloat16 else ("float32",)
    ways = [(dtype, compiled) for dtype in dtypes for compiled in ((False, True) if compiler else (False,))]
    choices = [chosen_numerics(config, dtype, compiled) for dtype, compiled in ways]
    return [choice for number, choice in enumerate(choices) if choice not in choices[:number]]


def training_choices(config: ComputeConfig, bfloat16: bool, compiler: bool) -> list[dict[str, Any]]:
    """The numerics among which the fastest for a training is taken: the default first, those that compile last.

    What the config says stands; what it leaves open is tried, bfloat16 and the compiler only where there are any.
    """
    dtypes = ["float32", *(["bfloat16"] if bfloat16 else [])] if config.train_dtype == "auto" else [config.train_dtype]
    layouts = ["channels_last", "contiguous"] if config.train_layout == "auto" else [config.train_layout]
    ways = {"auto": [False, True] if compiler else [False], "always": [True], "never": [False]}[config.train_compile]
    device = resolve_device(config)
    found = [
        {"device": device, "dtype": dtype, "layout": layout, "compile": compiled, "batch": DEFAULT_BATCH[device]}
        for compiled in ways
        for layout in layouts
        for dtype in dtypes
    ]
    # where both layouts are open, only eager float32 is tried in the other one: each further candidate costs minutes
    both = len(layouts) > 1
    return [
        c
        for c in found
        if not both or c["layout"] == layouts[0] or (c["dtype"] == dtypes[0] and c["compile"] == ways[0])
    ]


def labeling_seconds(numerics: dict[str, Any], images: int, macs: int) -> float:
    """About how long a job of so many images, of so many multiply-adds each, takes: to compare numerics, no promise.

    As if `SHARED_BY` processes did it, each paying for its own set-up.
    """
    setup, per_gmac = COST[numerics["dtype"], numerics["compile"]]
    return setup + per_gmac / (GPU_SPEEDUP if numerics["device"] == "cuda" else 1.0) * images / SHARED_BY * macs / 1e9


def part_numerics(chosen: dict[str, Any]) -> dict[str, Any]:
    """The numerics of an inference part: what was chosen, and the versions that computed it."""
    return {**chosen, "threads": 1, **package_versions(("torch", "torchvision", "timm", "pillow", "pyarrow"))}
