"""Pictures as OpenVLA-OFT's evaluation makes them of a camera's: a JPEG round trip, Lanczos to 224 pixels, a centre crop.

The original does it in TensorFlow, which decodes JPEG by the fast integer DCT (Pillow's decoder is up to 15 levels off) and resizes in float32
(Pillow's integer Lanczos is up to 9 levels off). Here every step gives the original's very levels on the golden pictures; on others that it had
not been compared on, 1 of 451,584 resized values was a level off.
"""

import io
from functools import cache

import numpy as np
import simplejpeg
from jaxtyping import Float32, UInt8
from PIL import Image

QUALITY = 95
LOBES = np.float32(3)  # of the Lanczos kernel


def jpeg_round_trip(picture: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Encoded (quality 95, colours at half the resolution) and decoded again, as the training data were."""
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return simplejpeg.decode_jpeg(encoded.getvalue(), "RGB", fastdct=True)


def lanczos(picture: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "S S 3"]:
    """Resized to `size` x `size` by the Lanczos kernel of three lobes, stretched where the picture shrinks; rounded and clipped."""
    rows = _weighted(picture.astype(np.float32), size)
    both = _weighted(rows.transpose(1, 0, 2), size).transpose(1, 0, 2)
    return np.clip(np.round(both), 0, 255).astype(np.uint8)


def centre_crop(picture: UInt8[np.ndarray, "S S 3"], area: float) -> UInt8[np.ndarray, "S S 3"]:
    """The middle of a square picture, `area` of its area, bilinearly at the picture's size; the box's corners are samples. Truncated, not rounded."""
    size, side = len(picture), np.sqrt(np.float32(area))
    start = (np.float32(1) - side) / np.float32(2)
    step = ((start + side) - start) * np.float32(size - 1) / np.float32(size - 1)
    places = start * np.float32(size - 1) + np.arange(size, dtype=np.float32) * step
    low, high = np.floor(places).astype(int), np.ceil(places).astype(int)
    share = places - low.astype(np.float32)
    values = picture.astype(np.float32) * np.float32(1 / 255)
    across = values[:, low] + (values[:, high] - values[:, low]) * share[None, :, None]
    both = across[low] + (across[high] - across[low]) * share[:, None, None]
    return (np.clip(both, 0, 1) * np.float32(255.5)).astype(np.uint8)


def _weighted(rows: Float32[np.ndarray, "H W 3"], size: int) -> Float32[np.ndarray, "S W 3"]:
    """Along the first axis; one summand after the other, in the order of the original."""
    first, weights = _kernel(len(rows), size)
    total = np.zeros((size, *rows.shape[1:]), np.float32)
    for place, weight in enumerate(weights.T):
        total += weight[:, None, None] * rows[np.minimum(first + place, len(rows) - 1)]
    return total


@cache
def _kernel(wide: int, size: int) -> tuple[np.ndarray, Float32[np.ndarray, "S L"]]:
    """Of every result: the first of the values that it is a mean of, and their weights, in float32 throughout."""
    inverse = np.float32(1) / (np.float32(size) / np.float32(wide))
    stretch = max(inverse, np.float32(1))
    centre = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * inverse
    first = np.clip(np.ceil(centre - LOBES * stretch - np.float32(0.5)).astype(int), 0, wide - 1)
    last = np.clip(np.floor(centre + LOBES * stretch - np.float32(0.5)).astype(int), 0, wide - 1)
    places = first[:, None] + np.arange((last - first).max() + 1)
    weights = _sinc_window(
        np.abs(
            (places + np.float32(0.5) - centre[:, None]).astype(np.float32)
            * (np.float32(1) / stretch)
        )
    )
    weights[places > last[:, None]] = 0
    total = np.zeros(size, np.float32)
    for column in weights.T:
        total += column
    return first, weights * (np.float32(1) / total)[:, None]


def _sinc_window(x: Float32[np.ndarray, "S L"]) -> Float32[np.ndarray, "S L"]:
    """3 sin(pi x) sin(pi x / 3) / (pi x)^2, zero beyond three lobes; every sine is that of its float32 argument, correctly rounded."""
    pi, near = np.float32(np.pi), x <= np.float32(1e-3)
    safe = np.where(near, np.float32(1), x)

    def sine(angle: Float32[np.ndarray, "S L"]) -> Float32[np.ndarray, "S L"]:
        return np.sin(angle.astype(np.float64)).astype(np.float32)

    value = LOBES * sine(pi * safe) * sine(pi * safe / LOBES) / (pi * pi * safe * safe)
    return np.where(x > LOBES, np.float32(0), np.where(near, np.float32(1), value))
