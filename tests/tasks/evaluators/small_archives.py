"""Published benchmarks in small: the same layout of folders, files of real digits."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.models.artifacts import CLASSES
from tests.real_images import encoded

SIDE = 24  # what the model of these tests takes


def digit(number: int, label: int, side: int = SIDE) -> Image.Image:
    """The number-th handwritten digit of a class, as an RGB picture."""
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    row = np.flatnonzero(targets == label)[number]
    picture = Image.fromarray((pixels[row].reshape(8, 8) * 15.9).astype(np.uint8))
    return picture.resize((side, side), Image.Resampling.BICUBIC).convert("RGB")


def write_imagenet_a(root: Path, classes: Sequence[str] = CLASSES, images: int = 3) -> Path:
    """CLASS/IMAGE, and the README that lies beside them."""
    root.mkdir(parents=True)
    (root / "README.txt").write_text("as published")
    for name in classes:
        for number in range(images):
            write(root / name / f"0.{number:06d}_digit _ digit_0.8{number}.jpg", digit(number, CLASSES.index(name), 40))
    return root


def write_imagenet_c(root: Path, kinds: dict[str, str], severities: Sequence[int] = (1, 2, 3, 4, 5)) -> Path:
    """GROUP/KIND/SEVERITY/CLASS/IMAGE.JPEG, two a class; severity s makes the image s x 40 brighter."""
    for kind, group in kinds.items():
        for severity in severities:
            for label, name in enumerate(CLASSES):
                for number in range(2):
                    pixels = np.asarray(digit(number, label)).astype(int) + 40 * severity
                    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                    file = f"ILSVRC2012_val_{number * 10 + label:08d}.JPEG"
                    write(root / group / kind / str(severity) / name / file, image)
    return root


def write_imagenet_p(root: Path, kinds: Sequence[str], frames: int = 5) -> Path:
    """KIND/CLASS/VIDEO.mp4, one a class, H.264: a digit that moves to the right, or flickers where the kind is a noise."""
    for kind in kinds:
        for label, name in enumerate(CLASSES):
            rng = np.random.default_rng(label)
            first = np.asarray(digit(label, label)).astype(int)
            moved = [np.roll(first, step, axis=1) for step in range(frames)]
            if "noise" in kind:
                moved = [first + (step > 0) * rng.integers(-60, 60, first.shape) for step in range(frames)]
            target = root / kind / name / f"ILSVRC2012_val_{label:08d}.mp4"
            write_video(target, [frame.clip(0, 255).astype(np.uint8) for frame in moved])
    return root


def write_video(path: Path, frames: Sequence[np.ndarray]) -> None:
    """One frame a second, as the benchmark's."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "10"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(image, "JPEG", quality=95))
