"""Images: equal to those of the original's TensorFlow, and what they should be by definition."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vla_opd.policies.openvla_oft.images import center_crop, jpeg_round_trip, lanczos

GOLDEN = Path(__file__).parents[3] / "data/openvla_oft/inputs.npz"
LANCZOS = Image.Resampling.LANCZOS


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as archive:
        return dict(archive)


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)


@pytest.mark.parametrize("row", range(3))
def test_every_step_gives_the_originals_bytes(golden: dict[str, np.ndarray], row: int) -> None:
    decoded = jpeg_round_trip(golden["rot180"][row])
    np.testing.assert_array_equal(decoded, golden["jpeg_decoded"][row])
    resized = lanczos(decoded, 224)
    np.testing.assert_array_equal(resized, golden["resized224"][row])
    cropped = center_crop(resized, 0.9)
    np.testing.assert_array_equal(cropped, golden["center_cropped"][row])


def test_the_golden_images_distinguish_other_pipelines(golden: dict[str, np.ndarray]) -> None:
    decoded = golden["jpeg_decoded"][0]
    resized = golden["resized224"][0]
    assert (golden["rot180"][0] != decoded).mean() > 0.5
    by_pillow = np.asarray(Image.fromarray(decoded).resize((224, 224), LANCZOS))
    assert (by_pillow != resized).mean() > 0.01
    assert (center_crop(resized, 0.81) != golden["center_cropped"][0]).mean() > 0.5


@pytest.mark.parametrize("size", [64, 100, 200])
def test_a_uniform_image_stays_uniform(size: int) -> None:
    uniform = np.full((100, 100, 3), 77, np.uint8)
    np.testing.assert_array_equal(lanczos(uniform, size), np.full((size, size, 3), 77))
    np.testing.assert_array_equal(center_crop(uniform, 0.9), uniform)


@pytest.mark.parametrize("size", [48, 160])
def test_lanczos_agrees_with_pillow_within_one_level(noise: np.ndarray, size: int) -> None:
    resized = lanczos(noise, size)
    for channel in range(3):
        image = Image.fromarray(noise[..., channel].astype(np.float32))
        expected = np.clip(np.round(np.asarray(image.resize((size, size), LANCZOS))), 0, 255)
        assert np.abs(resized[..., channel] - expected).max() <= 1


def test_a_crop_of_the_whole_area_is_the_image_itself(noise: np.ndarray) -> None:
    np.testing.assert_array_equal(center_crop(noise, 1.0), noise)
