"""What the corruptions are made of: kernels, shifts, warps and random fields, on float32 [h, w, channels] images.

Where many pixels move alike, a whole axis is gathered at once, and blurs as wide as the image are products with a matrix:
one core makes an ImageNet-C image in milliseconds, where a loop over pixels or taps takes tenths of a second.
"""

import math
from functools import lru_cache

import numpy as np
from scipy import fft, ndimage

MOST_TAPS = 49  # kernels with more are applied by Fourier transforms
DISK_PX = 8  # disks up to this radius lie on a grid of this half-side
BLUR_REACH = 4.0  # of a blur, in standard deviations
ELASTIC_REACH = 3.0
ICE_COLOR = np.array([0.89, 1.02, 1.09], np.float32)  # bluish
ICE_CONTRAST, ICE_BRIGHTNESS = 0.13, (0.48, 0.81)  # standard deviation within a pane; means of panes


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian blur of each channel; the border's pixels go on beyond it."""
    return ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest", truncate=BLUR_REACH)


@lru_cache(maxsize=16)
def disk(radius: float, rim: float) -> np.ndarray:
    """A disk's kernel, its rim softened by a Gaussian of deviation `rim` over 3 x 3 (5 x 5 past radius 8).

    It sums to 1, but for the largest ones, whose rim meets the border of the grid (1.01 at radius 10): as the benchmark's.
    """
    half = DISK_PX if radius <= DISK_PX else math.floor(radius)
    taps = 1 if radius <= DISK_PX else 2
    place = np.arange(-half, half + 1)
    kernel = (place[:, None] ** 2 + place**2 <= radius**2).astype(np.float64)
    kernel /= kernel.sum()
    soft = np.exp(-0.5 * (np.arange(-taps, taps + 1) / rim) ** 2)
    for axis in (0, 1):
        kernel = ndimage.correlate1d(kernel, soft / soft.sum(), axis=axis, mode="mirror")
    kernel = kernel.astype(np.float32)
    used = np.flatnonzero(kernel.max(axis=0) > 1e-8)
    return kernel[used[0] : used[-1] + 1, used[0] : used[-1] + 1]


def convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Each channel under a symmetric kernel of odd sides; the image is mirrored at its border, whose pixels stand once."""
    if kernel.size <= MOST_TAPS or min(image.shape[:2]) <= kernel.shape[0]:
        return ndimage.correlate(image, kernel[..., None], mode="mirror")
    half = kernel.shape[0] // 2
    padded = np.pad(image, ((half, half), (half, half), (0, 0)), mode="reflect")
    shape = [fft.next_fast_len(side, real=True) for side in padded.shape[:2]]
    spectrum = fft.rfft2(padded, shape, axes=(0, 1)) * fft.rfft2(kernel, shape)[..., None]
    made = fft.irfft2(spectrum, shape, axes=(0, 1))
    return made[2 * half : 2 * half + image.shape[0], 2 * half : 2 * half + image.shape[1]]


def motion_blur(image: np.ndarray, radius: int, sigma: float, angle: float) -> np.ndarray:
    """Half a Gaussian along `angle` in degrees, 2 x radius + 1 taps at whole pixels (ImageMagick's, as the benchmark)."""
    width = 2 * radius + 1
    weights = np.exp(-0.5 * (np.arange(width) / sigma) ** 2).astype(np.float32)
    weights /= weights.sum()
    down, right = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    places = [(math.ceil(i * down - 0.5), math.ceil(i * right - 0.5)) for i in range(width)]
    padded = np.pad(image, ((width, width), (width, width), (0, 0)), mode="edge")
    height, breadth = image.shape[:2]
    made = np.zeros(image.shape, np.float32)
    for weight, (dy, dx) in zip(weights, places, strict=True):
        made += weight * padded[width + dy : width + dy + height, width + dx : width + dx + breadth]
    return made


def zoom_center(image: np.ndarray, factor: float) -> np.ndarray:
    """The square center of a square image, enlarged to its size: bilinear, corners on corners (scipy's `zoom`)."""
    side = image.shape[0]
    kept = math.ceil(side / factor)
    large = round(kept * factor)
    first, trim = (side - kept) // 2, (large - side) // 2
    at = first + (np.arange(side) + trim) * ((kept - 1) / max(1, large - 1))
    low = np.minimum(at.astype(np.int64), side - 1)
    high, share = np.minimum(low + 1, side - 1), (at - low).astype(np.float32)
    rows = image[low] + (image[high] - image[low]) * share[:, None, None]
    columns = rows[:, low]
    return columns + (rows[:, high] - columns) * share[:, None]


def shuffle_near(pixels: np.ndarray, reach: int, rounds: int, rng: np.random.Generator) -> np.ndarray:
    """Each pixel but those at the border takes the color of one at most `reach` away, row by row from the bottom right.

    A pixel may take what another one took before it, as in the benchmark (whose exchange of two pixels is in fact a copy:
    the second assignment reads what the first one wrote).
    """
    side = pixels.shape[0]
    inner = np.arange(side - reach, reach, -1)
    target = (inner[:, None] * side + inner).ravel()
    origin = list(range(side * side))
    for _ in range(rounds):
        dx, dy = rng.integers(-reach, reach, (2, len(target)))
        for here, there in zip(target.tolist(), (target + dy * side + dx).tolist(), strict=True):
            origin[here] = origin[there]
    return pixels.reshape(side * side, -1)[origin].reshape(pixels.shape)


def plasma(side: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """A cloudy random field of the diamond-square method, float32 [side, side], within [0, 1].

    Made on a square of the next power of two, which goes on at its other end; each halving of the scale divides the
    randomness by `decay`.
    """
    size = 1 << (side - 1).bit_length()
    field, step, wobble = np.zeros((size, size)), size, 100.0
    while step >= 2:
        half = step // 2
        corners = field[::step, ::step]
        square = corners + np.roll(corners, -1, axis=0)
        square = square + np.roll(square, -1, axis=1)
        middle = square / 4 + _wobble(square.shape, wobble, rng)
        field[half::step, half::step] = middle
        right = middle + np.roll(middle, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
        field[::step, half::step] = right / 4 + _wobble(right.shape, wobble, rng)
        below = middle + np.roll(middle, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
        field[half::step, ::step] = below / 4 + _wobble(below.shape, wobble, rng)
        step, wobble = half, wobble / decay
    field -= field.min()
    return (field / field.max())[:side, :side].astype(np.float32)


def ice(side: int, rng: np.random.Generator) -> np.ndarray:
    """A frosted pane, float32 [side, side, 3]: bright needles (ridges of two cloudy fields) in a bluish haze.

    Stands for the five photographs that the benchmark crops, which are not ours to ship: mean color, contrast and how much
    panes differ in brightness are theirs.
    """
    needles = sum((1 - np.abs(2 * plasma(side, decay, rng) - 1)) ** 6 for decay in (1.6, 1.9))
    field = plasma(side, 2.2, rng) + 0.4 * needles
    field = (field - field.mean()) * (ICE_CONTRAST / max(float(field.std()), 1e-6))
    pane = rng.uniform(*ICE_BRIGHTNESS) + field
    return (pane[..., None] * ICE_COLOR).clip(0, 1).astype(np.float32)


def elastic(image: np.ndarray, alpha: float, sigma: float, shift: float, rng: np.random.Generator) -> np.ndarray:
    """A random affine warp of a square image, then displacements of `alpha` times a field blurred by `sigma`; in pixels.

    The affine map takes three anchor points around the center to places up to `shift` away on either axis.
    """
    side = image.shape[0]
    center, reach = side // 2, side // 3
    anchors = np.array([[reach, reach], [reach, -reach], [-reach, -reach]], np.float64) + center  # (x, y)
    moved = anchors + rng.uniform(-shift, shift, anchors.shape)
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), anchors)  # [3, 2]: (x, y, 1) -> where it came from
    rows, columns = np.mgrid[0:side, 0:side].astype(np.float64)
    x, y = (columns * back[0, k] + rows * back[1, k] + back[2, k] for k in (0, 1))
    image = _sample(image, y, x, repeat_border=False)
    right, down = rng.uniform(-1, 1, (2, side, side))
    if alpha:
        smooth = _blur_matrix(side, sigma)
        rows = rows + alpha * (smooth @ down @ smooth.T)
        columns = columns + alpha * (smooth @ right @ smooth.T)
    return _sample(image, rows, columns, repeat_border=True)


@lru_cache(maxsize=16)
def _blur_matrix(side: int, sigma: float) -> np.ndarray:
    """The blur of one axis as a matrix [side, side]: mirrored at the border, whose pixels stand twice."""
    return ndimage.gaussian_filter1d(np.eye(side), sigma, axis=0, mode="reflect", truncate=ELASTIC_REACH)


def _sample(image: np.ndarray, rows: np.ndarray, columns: np.ndarray, repeat_border: bool) -> np.ndarray:
    """The image at places between its pixels, bilinear; mirrored at the border, whose pixels stand twice or once."""
    side = image.shape[0]
    above, left = np.floor(rows).astype(np.int32), np.floor(columns).astype(np.int32)
    down, right = (np.subtract(a, b, dtype=np.float32)[..., None] for a, b in ((rows, above), (columns, left)))
    top, bottom = (_mirrored(place, side, repeat_border) * side for place in (above, above + 1))
    west, east = (_mirrored(place, side, repeat_border) for place in (left, left + 1))
    flat = np.ascontiguousarray(image).reshape(side * side, -1)
    upper, lower = flat.take(top + west, axis=0), flat.take(bottom + west, axis=0)
    upper += (flat.take(top + east, axis=0) - upper) * right
    lower += (flat.take(bottom + east, axis=0) - lower) * right
    upper += (lower - upper) * down
    return upper


def _mirrored(place: np.ndarray, side: int, repeat_border: bool) -> np.ndarray:
    """Places beyond the border folded back into [0, side)."""
    low, high = int(place.min()), int(place.max())
    period = 2 * side if repeat_border else max(1, 2 * side - 2)
    folded = np.arange(low, high + 1) % period
    table = np.where(folded < side, folded, (period - 1 if repeat_border else period) - folded).astype(np.int32)
    return table.take(place - low)


def _wobble(shape: tuple[int, ...], wobble: float, rng: np.random.Generator) -> np.ndarray:
    return wobble * rng.uniform(-wobble, wobble, shape)
