"""Networks for small images that timm does not have, registered under names of our own.

Import this module, and timm builds and reloads them like its own: `timm.create_model("efficientnet_b0_svhn")`,
`timm.create_model("local-dir:FOLDER", pretrained=True)`. It needs timm and torch alone, so that others can copy it.
"""

from typing import Any

import timm
from timm.models import EfficientNet, ResNetV2, register_model
from torch import nn

STRIDE_ONE_STAGES = (1, 2)


@register_model
def efficientnet_b0_svhn(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """EfficientNet-B0 for 32 x 32 pixels: strides of the second and third block set to 1, the last map is 4 x 4 (SVHN).

    TensorFlow's padding and batch-norm epsilon, as the paper's. There are no pretrained weights; the flag is timm's way
    to call it, and means weights that the caller names.
    """
    model: Any = timm.create_model("tf_efficientnet_b0", pretrained=pretrained, **kwargs)
    for stage in STRIDE_ONE_STAGES:
        model.blocks[stage][0].conv_dw.stride = (1, 1)
        for info in model.feature_info[stage:]:
            info["reduction"] //= 2
    made: EfficientNet = model
    return made


@register_model
def wide_resnet28_2(pretrained: bool = False, **kwargs: Any) -> ResNetV2:
    """WRN-28-2 for 32 x 32 pixels: pre-activation, three stages of four basic blocks, 32/64/128 channels, 1.5 M weights.

    The network that self-training on CIFAR-10 and SVHN is usually compared with. `layers` (blocks a stage), `channels` and
    `stem_chs` make smaller and larger ones. No pretrained weights, as above.
    """
    settings = {"layers": [4, 4, 4], "channels": [32, 64, 128], "stem_chs": 16, **kwargs}
    model: Any = timm.create_model("resnetv2_18", pretrained=pretrained, **settings)
    conv = model.stem.conv
    stem = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as timm starts the others
    model.stem = nn.Sequential()
    model.stem.add_module("conv", stem)
    for info, reduction in zip(model.feature_info, (1, 1, 2, 4, 8), strict=False):
        info["reduction"] = reduction
    made: ResNetV2 = model
    return made
