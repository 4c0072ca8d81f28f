"""Networks for small images that timm does not have, registered under names of our own.

Import this module, and timm builds and reloads them like its own: `timm.create_model("efficientnet_b0_svhn")`,
`timm.create_model("local-dir:FOLDER", pretrained=True)`. It needs timm and torch alone, so that others can copy it.
"""

from typing import Any

import timm
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models import EfficientNet, ResNetV2, build_model_with_cfg, register_model
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


class SmallImageResNet(ResNetV2):
    """timm's pre-activation ResNet for images of 32 px: the stem is one 3 x 3 convolution, without pooling.

    `stem_stride` is 1; with 2 the whole network works on a quarter of the pixels, for a processor without a GPU.
    """

    def __init__(self, stem_stride: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        conv: Any = self.stem.conv
        stem = nn.Conv2d(conv.in_channels, conv.out_channels, 3, stem_stride, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as timm starts the others
        self.stem = nn.Sequential()
        self.stem.add_module("conv", stem)
        for place, info in enumerate(self.feature_info):
            info["reduction"] = stem_stride * 2 ** max(0, place - 1)


@register_model
def wide_resnet28_2(pretrained: bool = False, **kwargs: Any) -> SmallImageResNet:
    """WRN-28-2 for 32 x 32 pixels: pre-activation, three stages of four basic blocks, 32/64/128 channels, 1.5 M weights.

    The network that self-training on CIFAR-10 and SVHN is usually compared with. `layers` (blocks a stage), `channels`,
    `stem_chs` and `stem_stride` make smaller and larger ones. No pretrained weights, as above.
    """
    blocks = {"basic": True, "bottle_ratio": 1.0, "conv_layer": create_conv2d, "norm_layer": BatchNormAct2d}
    settings: dict[str, Any] = {"layers": [4, 4, 4], "channels": [32, 64, 128], "stem_chs": 16, **blocks, **kwargs}
    features = {"flatten_sequential": True, "out_indices": tuple(range(1 + len(settings["layers"])))}
    made: SmallImageResNet = build_model_with_cfg(
        SmallImageResNet, "resnetv2_18", pretrained, feature_cfg=features, **settings
    )
    return made
