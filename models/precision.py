"""The dtype that a network computes in, as its numerics say; and what this machine computes in."""

import os
import shutil
from typing import Any

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(numerics: dict[str, Any], device: str) -> torch.autocast:
    """The context in which a forward pass computes; for float32 it changes nothing."""
    dtype = DTYPES.get(numerics["dtype"])
    return torch.autocast(device.split(":")[0], dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def computes_in_bfloat16(device: str) -> bool:
    """Whether `cpu` or `cuda` here has instructions for bfloat16; without them it is slower than float32."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def has_compiler() -> bool:
    """Whether torch.compile finds the C++ compiler that it needs; says so where not."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        print(f"torch.compile is left out: there is no C++ compiler {compiler!r} on this machine", flush=True)
        return False
    return True
