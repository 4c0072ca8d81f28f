"""How alike two small gray pictures are, once laid over each other: brightness, contrast and a slight crop do not count.

The one is laid over the other by an affine map, refined from a good guess in Gauss-Newton steps on the pixels' differences,
together with a gain and an offset of the brightness (Lucas and Kanade 1981).
"""

import numpy as np

from storage.phash import SIDE

STEPS = 4
BANDS = 12  # frequencies a side, of 32: above lies mostly what JPEG and resizing change
RIDGE = 1e-3  # of the mean curvature: holds still what the pixels do not determine
NOTHING = 1e-6
LEAST_SCALE, MOST_SCALE = 0.7, 1.1  # of a side: crops of up to a fifth and some play
MOST_TILT = 0.12  # 7 degrees
MOST_OUTSIDE = 3.0  # pixels


def _centers(step: int) -> np.ndarray:
    """Centers of every `step`-th pixel, the picture reaching from -0.5 to 0.5: float32 [points, 3 (one, x, y)]."""
    y, x = np.mgrid[0:SIDE:step, 0:SIDE:step].reshape(2, -1)
    return np.stack([np.ones(len(x)), (x + 0.5) / SIDE - 0.5, (y + 0.5) / SIDE - 0.5], axis=1).astype(np.float32)


def _cosines() -> np.ndarray:
    """The orthonormal DCT-II's lowest rows, float32 [BANDS, SIDE]."""
    frequency, place = np.mgrid[0:BANDS, 0:SIDE]
    rows = np.sqrt(2 / SIDE) * np.cos(np.pi * frequency * (2 * place + 1) / (2 * SIDE))
    rows[0] /= np.sqrt(2)
    return rows.astype(np.float32)


CENTERS, FEW_CENTERS = _centers(1), _centers(2)
COSINES = _cosines()
# Natural pictures lose amplitude as 1 / frequency. Multiplied back, each frequency has its say, not the broad light and dark
# that one sky has in common with the next.
LEVELLING = np.hypot(*np.mgrid[0:BANDS, 0:BANDS]).astype(np.float32)
# An orthonormal base of the quadratic functions of the place, float32 [SIDE * SIDE, 6].
SMOOTH = np.linalg.qr(np.stack([CENTERS[:, 1] ** i * CENTERS[:, 2] ** j for i in range(3) for j in range(3 - i)], 1)).Q


def box_maps(boxes: np.ndarray) -> np.ndarray:
    """The maps that lay a whole picture over boxes [n, 4 (left, top, right, bottom in 0..1)]: float32 [n, 2 (x, y), 3]."""
    left, top, right, bottom = np.asarray(boxes, np.float32).T * SIDE
    zero = np.zeros_like(left)
    x = [(left + right) / 2 - 0.5, right - left, zero]
    y = [(top + bottom) / 2 - 0.5, zero, bottom - top]
    return np.stack([np.stack(x, axis=1), np.stack(y, axis=1)], axis=1)


def align(fixed: np.ndarray, moving: np.ndarray, maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`moving` as it looks when laid over `fixed`, both uint8 [n, SIDE, SIDE], refined from the maps [n, 2, 3].

    Returns it, float32 [n, SIDE, SIDE], with brightness and contrast as they were, and the maps.
    """
    target = fixed[:, ::2, ::2].reshape(len(fixed), len(FEW_CENTERS)).astype(np.float32)
    target -= target.mean(axis=1, keepdims=True)
    moving = moving.astype(np.float32)
    down, across = np.gradient(moving, axis=(1, 2))
    layers = np.stack([moving, across, down], axis=-1)
    for _ in range(STEPS):
        seen, x, y = _sample(layers, maps, FEW_CENTERS)
        seen = seen - seen.mean(axis=1, keepdims=True)
        gain = ((seen * target).sum(1) / ((seen * seen).sum(1) + NOTHING))[:, None]
        slopes = [(gain * slope)[..., None] * FEW_CENTERS for slope in (x, y)]
        jacobian = np.concatenate([*slopes, seen[..., None], np.ones_like(seen)[..., None]], axis=2)
        turned = np.swapaxes(jacobian, 1, 2)
        normal = turned @ jacobian
        hold = RIDGE * np.trace(normal, axis1=1, axis2=2) / 8 + NOTHING
        normal += hold[:, None, None] * np.eye(8, dtype=np.float32)
        change = np.linalg.solve(normal, turned @ (target - gain * seen)[..., None])
        maps = maps + change[:, :6, 0].reshape(-1, 2, 3)
    return look(moving, maps), maps


def look(pictures: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Pictures [n, SIDE, SIDE] seen through the maps [n, 2, 3]: float32 [n, SIDE, SIDE]."""
    return _sample(pictures.astype(np.float32)[..., None], maps, CENTERS).reshape(-1, SIDE, SIDE)


def plausible(maps: np.ndarray) -> np.ndarray:
    """Whether maps [n, 2, 3] are a crop, perhaps a little turned, bool [n]: others can turn any bird into any airplane."""
    scale, tilt = maps[:, [0, 1], [1, 2]] / SIDE, maps[:, [0, 1], [2, 1]] / SIDE
    middle = maps[:, :, 0] + 0.5
    reach = SIDE / 2 - np.abs(middle - SIDE / 2) - scale * SIDE / 2  # pixels inside the picture; negative: outside
    fits = (scale > LEAST_SCALE) & (scale < MOST_SCALE) & (np.abs(tilt) < MOST_TILT) & (reach > -MOST_OUTSIDE)
    return np.asarray(fits.all(axis=1))


def likeness(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Correlation of pictures [n, SIDE, SIDE] with their counterparts, float32 [n], -1 to 1; 1 is the same.

    The lower one of two: of the pixels, and of the frequencies below BANDS, each weighted alike.
    """
    pixels = [picture.reshape(-1, SIDE * SIDE).astype(np.float32) for picture in (ones, others)]
    pixels = [picture - picture.mean(axis=1, keepdims=True) for picture in pixels]
    levelled = [(_bands(picture) * LEVELLING).reshape(-1, BANDS * BANDS) for picture in (ones, others)]
    return np.minimum(_cosine(*pixels), _cosine(*levelled))


def detail(pictures: np.ndarray) -> np.ndarray:
    """What makes pictures [n, SIDE, SIDE] recognizable: their root mean square deviation from a smooth shading.

    In gray levels, float32 [n]: 0 for a blank picture and for light that changes as a quadratic function of the place.
    """
    pixels = pictures.reshape(-1, SIDE * SIDE).astype(np.float32)
    return np.sqrt(((pixels - pixels @ SMOOTH @ SMOOTH.T) ** 2).mean(axis=1))


def _bands(pictures: np.ndarray) -> np.ndarray:
    return COSINES @ pictures.astype(np.float32) @ COSINES.T


def _cosine(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    return (ones * others).sum(1) / np.sqrt((ones * ones).sum(1) * (others * others).sum(1) + NOTHING)


def _sample(layers: np.ndarray, maps: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Layers [n, SIDE, SIDE, c] at the mapped centers, bilinear, edges repeated: float32 [c, n, points]."""
    x, y = np.clip(np.moveaxis(maps @ centers.T, 1, 0), 0, SIDE - 1)
    column, row = np.minimum(x.astype(np.intp), SIDE - 2), np.minimum(y.astype(np.intp), SIDE - 2)
    right, below = (x - column)[..., None], (y - row)[..., None]
    corner = (np.arange(len(layers))[:, None] * SIDE + row) * SIDE + column
    flat = layers.reshape(-1, layers.shape[-1])
    at = [flat.take(corner + step, axis=0) for step in (0, 1, SIDE, SIDE + 1)]
    above, under = at[0] + right * (at[1] - at[0]), at[2] + right * (at[3] - at[2])
    return np.moveaxis(above + below * (under - above), -1, 0)
