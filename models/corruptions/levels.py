"""How strong each corruption is at each severity: the benchmark's published parameters.

`imagenet`: ImageNet-C, for 224 px; `cifar`: CIFAR-10-C, for 32 px (Hendrycks and Dietterich 2019; the released code's
make_imagenet_c.py and make_cifar_c.py). Lengths are pixels, values are of the range [0, 1], lengths of elastic_transform are
shares of the image's side.
"""

from typing import Any

SMALL_PX = 64
OF_SIDE = 244 / 224  # the released code wrote 244 for 224 in elastic_transform, and ImageNet-C was made with it

Levels = dict[str, tuple[Any, ...]]

IMAGENET: Levels = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation
    "shot_noise": (60, 25, 12, 5, 3),  # photons of a white pixel
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),  # share of the values that become 0 or 1
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),  # radius of the disk, blur of its rim
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),  # blur, reach, rounds
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),  # radius, standard deviation
    "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),  # factors from 1 up to, step
    "snow": (  # mean and deviation of the flakes' field, its zoom, threshold, radius and deviation of the fall, mix
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),  # weight of the image, weight of the ice
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),  # weight, decay of its detail
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to the value of HSV
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # factor
    "elastic_transform": (  # displacement, its blur, shift of the three anchor points
        (2 * OF_SIDE, 0.7 * OF_SIDE, 0.1 * OF_SIDE),
        (2 * OF_SIDE, 0.08 * OF_SIDE, 0.2 * OF_SIDE),
        (0.05 * OF_SIDE, 0.01 * OF_SIDE, 0.02 * OF_SIDE),
        (0.07 * OF_SIDE, 0.01 * OF_SIDE, 0.02 * OF_SIDE),
        (0.12 * OF_SIDE, 0.01 * OF_SIDE, 0.02 * OF_SIDE),
    ),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),  # share of the side that is left
    "jpeg_compression": (25, 18, 15, 10, 7),  # quality
}
CIFAR: Levels = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "elastic_transform": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg_compression": (80, 65, 58, 50, 40),
}
LEVELS: dict[str, Levels] = {"imagenet": IMAGENET, "cifar": CIFAR}
TABLES = tuple(LEVELS)
KIND_NAMES = tuple(IMAGENET)
SEVERITIES = (1, 2, 3, 4, 5)


def table_for(image_size: int) -> str:
    """The levels that fit images of a size: those of CIFAR-10-C up to 64 pixels, else those of ImageNet-C."""
    return "cifar" if image_size <= SMALL_PX else "imagenet"
