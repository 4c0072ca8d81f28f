"""A picture of every RandAugment operation at every magnitude of the recipes, on a drawn scene: docs/randaugment.png.

python -m benchmarks.noise_sheet [FILE]

Columns: magnitudes; the value of the level table stands below each tile. Signs are drawn, so geometry may go either way.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from models.configs import RELEASED_OPS, NoiseConfig
from models.noise import (
    OPS,
    cutout_half_side,
    enhance_factor,
    posterize_bits,
    rotate_degrees,
    shear_factor,
    solarize_addition,
    solarize_threshold,
    translate_pixels,
)

MAGNITUDES = (0, 5, 9, 15, 18, 27)
SIDE, GAP, LEFT, TOP, LABEL = 96, 6, 96, 22, 14
NOISE = NoiseConfig(translate_px=100 * SIDE / 224, cutout_px=40 * SIDE / 224)  # the defaults are for 224 pixels


def scene(side: int = SIDE) -> Image.Image:
    """A drawn picture with a sky, a sun, a house and grain: smooth and sharp parts, bright and dark, no symmetry."""
    rows = np.linspace(0, 1, side)[:, None]
    columns = np.linspace(0, 1, side)[None, :]
    sky = np.stack(
        [90 + 80 * rows + 0 * columns, 140 + 60 * rows + 20 * columns, 230 - 60 * rows + 0 * columns], axis=-1
    )
    image = Image.fromarray(sky.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    s = side / 96
    draw.ellipse([62 * s, 8 * s, 84 * s, 30 * s], fill=(255, 214, 80))
    draw.rectangle([0, 70 * s, side, side], fill=(70, 120, 60))
    draw.rectangle([18 * s, 44 * s, 54 * s, 76 * s], fill=(190, 170, 150))
    draw.polygon([(12 * s, 44 * s), (36 * s, 22 * s), (60 * s, 44 * s)], fill=(150, 50, 40))
    draw.rectangle([24 * s, 52 * s, 32 * s, 62 * s], fill=(40, 60, 90))
    draw.rectangle([42 * s, 56 * s, 50 * s, 76 * s], fill=(80, 50, 30))
    for x in range(0, side, 6):
        draw.line([(x, 84 * s), (x + 3 * s, 78 * s)], fill=(40, 80, 40))
    grain = np.random.default_rng(0).normal(0, 4, (side, side, 3))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def argument(name: str, magnitude: float) -> str:
    """What the level table gives the operation."""
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return f"x{enhance_factor(magnitude):.2f}"
    return {
        "Rotate": f"{rotate_degrees(magnitude):.0f} deg",
        "Posterize": f"{posterize_bits(magnitude)} bits",
        "Solarize": f">= {solarize_threshold(magnitude)}",
        "ShearX": f"{shear_factor(magnitude):.2f}",
        "ShearY": f"{shear_factor(magnitude):.2f}",
        "TranslateX": f"{translate_pixels(magnitude, 100):.0f}/224 px",
        "TranslateY": f"{translate_pixels(magnitude, 100):.0f}/224 px",
        "SolarizeAdd": f"+{solarize_addition(magnitude)}",
        "Cutout": f"{cutout_half_side(magnitude, 40)}/224 px",
    }.get(name, "")


def sheet() -> Image.Image:
    """All operations, a row each."""
    step = SIDE + GAP
    page = Image.new("RGB", (LEFT + len(MAGNITUDES) * step, TOP + len(RELEASED_OPS) * (step + LABEL)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    for column, magnitude in enumerate(MAGNITUDES):
        draw.text((LEFT + column * step, 4), f"magnitude {magnitude}", fill="black", font=font)
    image = scene()
    for row, name in enumerate(RELEASED_OPS):
        y = TOP + row * (step + LABEL)
        draw.text((4, y + SIDE // 2), name, fill="black", font=font)
        for column, magnitude in enumerate(MAGNITUDES):
            x = LEFT + column * step
            page.paste(OPS[name](image, magnitude, NOISE, np.random.default_rng(3)), (x, y))
            draw.text((x, y + SIDE + 1), argument(name, magnitude), fill="gray", font=font)
    return page


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/randaugment.png")
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet().quantize(160).save(target, optimize=True)
    print(target)
