"""A trained network as labeling uses it: uint8 pixels in, logits out; in float32 or bfloat16, eager or compiled."""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from models import bfloat16
from models.configs import TrainConfig
from models.noise import noised_view
from models.precision import autocast
from models.zoo import build, load_folder, materialize
from storage.artifacts import Manifest
from storage.errors import UserError
from storage.objects import Store


class Classifier:
    """The un-noised network of a model artifact, on its device.

    `image_size`, `crop_pct`: its clean view.
    """

    def __init__(self, store: Store, manifest: Manifest, numerics: dict[str, Any], device: str) -> None:
        model = load_model(store, manifest)
        shape: Any = model.pretrained_cfg
        self.image_size, self.crop_pct = int(shape["input_size"][-1]), float(shape["crop_pct"])
        self._numerics, self._device = numerics, device
        if numerics["dtype"] == "bfloat16":
            bfloat16.prepare(model, self.image_size)
        module = _OfPixels(model, shape["mean"], shape["std"]).eval().to(device)
        if numerics["layout"] == "channels_last":
            module = module.to(memory_format=torch.channels_last)
        self._forward = self._compiled(module) if numerics["compile"] else module

    @torch.inference_mode()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, size, size, 3] anywhere -> float32 [n, classes] on the device; not waited for there."""
        images = images.to(self._device, non_blocking=True)
        with autocast(self._numerics, self._device):
            return self._forward(images).float()

    def _compiled(self, module: nn.Module) -> nn.Module:
        """Compiled for batches of the constant size, weights frozen into the code. Raises UserError where that fails."""
        from torch._inductor import config as inductor

        images = torch.zeros(self._numerics["batch"], self.image_size, self.image_size, 3, dtype=torch.uint8)
        compiled = torch.compile(module, dynamic=False)
        started = time.perf_counter()
        try:
            # a pool of compiling processes would outlive a child that is killed
            with (
                torch.inference_mode(),
                autocast(self._numerics, self._device),
                inductor.patch(freezing=True, compile_threads=1),
            ):
                compiled(images.to(self._device))
        except Exception as error:  # the compiler's errors are of many kinds
            raise UserError(
                f"the network cannot be compiled ({str(error).strip().splitlines()[0]}); set compute.compile=never"
            ) from error
        print(f"compiled in {time.perf_counter() - started:.1f} s", flush=True)
        return compiled  # type: ignore[return-value]


class NoisedClassifier:
    """The network of a model artifact with the noise of its training on: input noise, dropout, stochastic depth.

    Batch norm keeps its statistics. An image is predicted alone, its noise seeded by its key: batches decide nothing.
    """

    def __init__(self, store: Store, manifest: Manifest, numerics: dict[str, Any], device: str) -> None:
        self._config = TrainConfig.model_validate(manifest.config)
        self._numerics, self._device = numerics, device
        own = self._config.model
        model = build(own, len(manifest.metrics["class_names"]))
        model.load_state_dict(load_model(store, manifest).state_dict())
        self._forward = _OfPixels(model, own.mean, own.std).train().to(device)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.eval()

    @torch.inference_mode()
    def logits(self, image: Image.Image, seed: int) -> torch.Tensor:
        """float32 [1, classes] of an RGB picture of any size, noised by `seed` (63 bits)."""
        torch.manual_seed(seed)
        view = noised_view(image, self._config.noise, self._config.model.image_size, np.random.default_rng(seed))
        with autocast(self._numerics, self._device):
            return self._forward(torch.from_numpy(view)[None].to(self._device)).float()


class _OfPixels(nn.Module):
    """A network of uint8 pixels [n, size, size, 3]: normalizes them by channel, then runs `model`."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, model: nn.Module, mean: Any, std: Any) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]))
        self.register_buffer("shift", torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(torch.addcmul(self.shift, images.to(torch.float32), self.scale).permute(0, 3, 1, 2))


def load_model(store: Store, manifest: Manifest) -> nn.Module:
    """The network of a model artifact, in evaluation mode, on the CPU."""
    with tempfile.TemporaryDirectory(prefix="nst-model-") as folder:
        materialize(store, manifest, Path(folder))
        return load_folder(Path(folder))
