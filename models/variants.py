"""Networks of the paper that timm does not have, registered under names of our own.

Import this module, and timm builds and reloads them like its own: `timm.create_model("efficientnet_b0_svhn")`,
`timm.create_model("local-dir:FOLDER", pretrained=True)`. It needs timm alone, so that others can copy it.
"""

from typing import Any

import timm
from timm.models import EfficientNet, register_model

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
