"""How far each perturbation of a sequence goes from frame to frame: the benchmark's published parameters."""

from typing import Any

# by table: levels and number of frames; what is not commented is the same word as in the function below
LEVELS: dict[str, dict[str, Any]] = {
    "imagenet": {
        "gaussian_noise": (0.03, 31),
        "shot_noise": (300, 31),
        "motion_blur": (10, 3.0, 4, 31),  # radius, deviation, degrees a frame
        "zoom_blur": (0.004, 31),
        "snow": (3, 14, 4.0, 31),  # zoom of the flakes, radius, deviation
        "brightness": (0.02, 31),
        "translate": (-20, 41),  # the first frame's shift in pixels
        "rotate": (1.0, 31),
        "tilt": (1.0, 31),
        "scale": (0.4, 0.025, 31),  # the first frame's factor, more a frame
    },
    "cifar": {
        "gaussian_noise": (0.02, 31),
        "shot_noise": (700, 31),
        "motion_blur": (6, 1.8, 9, 21),
        "zoom_blur": (0.004, 31),
        "snow": (2, 10, 2.0, 31),
        "brightness": (0.015, 31),
        "translate": (-7, 16),
        "rotate": (1.0, 31),
        "tilt": (0.75, 31),
        "scale": (0.7, 0.02, 31),
    },
}
SEQUENCES = tuple(LEVELS["imagenet"])


def num_frames(kind: str, table: str) -> int:
    """How many frames a sequence has."""
    return int(LEVELS[table][kind][-1])
