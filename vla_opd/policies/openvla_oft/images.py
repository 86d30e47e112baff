"""Image preprocessing of OpenVLA-OFT's evaluation: JPEG round trip, resize to 224, center crop.

The original uses TensorFlow, which decodes JPEG with the fast integer DCT (Pillow's decoder differs
by up to 15 levels) and resizes in float32 (Pillow's integer Lanczos differs by up to 9 levels).
Here every step reproduces the original's bytes on the golden images. On images outside that set,
1 of 451,584 resized values differed by one level.
"""

import io
from functools import cache

import numpy as np
import simplejpeg
from jaxtyping import Float32, Int, UInt8
from PIL import Image

QUALITY = 95
LOBES = np.float32(3)  # of the Lanczos kernel
ONE = np.float32(1)
HALF = np.float32(0.5)
PI = np.float32(np.pi)


def jpeg_round_trip(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Encode (quality 95, 4:2:0) and decode, as was done to the training data."""
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return simplejpeg.decode_jpeg(encoded.getvalue(), "RGB", fastdct=True)


def lanczos(image: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "S S 3"]:
    """Resize to `size` x `size` with an antialiased three-lobed Lanczos kernel.

    The result is rounded and clipped.
    """
    values = image.astype(np.float32)
    rows = _resample(values, size)
    columns = _resample(_swap_axes(rows), size)
    levels = np.round(_swap_axes(columns))
    return np.clip(levels, 0, 255).astype(np.uint8)


def center_crop(image: UInt8[np.ndarray, "S S 3"], area: float) -> UInt8[np.ndarray, "S S 3"]:
    """Crop the central `area` (a fraction) of a square image and resize it bilinearly to S x S.

    The corners of the crop are sampled (align_corners). The result is truncated, not rounded.
    """
    size = len(image)
    last = np.float32(size - 1)
    side = np.sqrt(np.float32(area))
    start = (ONE - side) / np.float32(2)
    end = start + side
    step = (end - start) * last / last
    indices = np.arange(size, dtype=np.float32)
    positions = start * last + indices * step

    values = image.astype(np.float32) * np.float32(1 / 255)
    columns = _interpolate(_swap_axes(values), positions)
    cropped = _interpolate(_swap_axes(columns), positions)
    levels = np.clip(cropped, 0, 1) * np.float32(255.5)
    return levels.astype(np.uint8)


def _swap_axes(rows: Float32[np.ndarray, "H W 3"]) -> Float32[np.ndarray, "W H 3"]:
    return rows.transpose(1, 0, 2)


def _interpolate(
    rows: Float32[np.ndarray, "H W 3"], positions: Float32[np.ndarray, " S"]
) -> Float32[np.ndarray, "S W 3"]:
    """Interpolate linearly between rows."""
    low = np.floor(positions)
    high = np.ceil(positions)
    lower = rows[low.astype(int)]
    upper = rows[high.astype(int)]
    weights = positions - low
    return lower + (upper - lower) * weights[:, None, None]


def _resample(rows: Float32[np.ndarray, "H W 3"], size: int) -> Float32[np.ndarray, "S W 3"]:
    """Resample the first axis, adding weighted rows in the original's order."""
    first, weights = _kernel(len(rows), size)
    last = len(rows) - 1
    total = np.zeros((size, *rows.shape[1:]), np.float32)
    for offset, column in enumerate(weights.T):
        sources = np.minimum(first + offset, last)
        total += column[:, None, None] * rows[sources]
    return total


@cache
def _kernel(length: int, size: int) -> tuple[Int[np.ndarray, " S"], Float32[np.ndarray, "S L"]]:
    """Return the first of the L rows that each resampled row averages, and their weights.

    All of it is in float32, operation by operation as in the original.
    """
    scale = ONE / (np.float32(size) / np.float32(length))
    stretch = max(scale, ONE)
    reach = LOBES * stretch
    indices = np.arange(size, dtype=np.float32)
    centers = (indices + HALF) * scale
    start = np.ceil(centers - reach - HALF)
    end = np.floor(centers + reach - HALF)
    first = np.clip(start.astype(int), 0, length - 1)
    last = np.clip(end.astype(int), 0, length - 1)

    longest = (last - first).max() + 1
    rows = first[:, None] + np.arange(longest)
    distances = rows + HALF - centers[:, None]
    distances = distances.astype(np.float32) * (ONE / stretch)
    weights = _lanczos_window(np.abs(distances))
    weights[rows > last[:, None]] = 0

    total = np.zeros(size, np.float32)
    for column in weights.T:
        total += column
    inverse = ONE / total
    return first, weights * inverse[:, None]


def _lanczos_window(x: Float32[np.ndarray, "S L"]) -> Float32[np.ndarray, "S L"]:
    """Return 3 sin(pi x) sin(pi x / 3) / (pi x)^2, zero beyond three lobes."""
    is_center = x <= np.float32(1e-3)
    is_outside = x > LOBES
    safe = np.where(is_center, ONE, x)
    angle = PI * safe
    numerator = LOBES * _sine(angle) * _sine(angle / LOBES)
    denominator = PI * PI * safe * safe
    window = numerator / denominator
    window[is_center] = 1
    window[is_outside] = 0
    return window


def _sine(angle: Float32[np.ndarray, "S L"]) -> Float32[np.ndarray, "S L"]:
    """Return the sine, rounded correctly to float32."""
    sine = np.sin(angle.astype(np.float64))
    return sine.astype(np.float32)
