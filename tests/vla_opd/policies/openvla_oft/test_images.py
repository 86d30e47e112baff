"""Pictures: against the original's, which TensorFlow made, and against what they are by definition."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vla_opd.policies.openvla_oft.images import centre_crop, jpeg_round_trip, lanczos

GOLDEN = Path(__file__).parents[3] / "data/openvla_oft/inputs.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as archive:
        return dict(archive)


def test_every_level_of_every_step_is_the_originals(golden: dict[str, np.ndarray]) -> None:
    for row in range(3):
        np.testing.assert_array_equal(
            jpeg_round_trip(golden["rot180"][row]), golden["jpeg_decoded"][row]
        )
        np.testing.assert_array_equal(
            lanczos(golden["jpeg_decoded"][row], 224), golden["resized224"][row]
        )
        np.testing.assert_array_equal(
            centre_crop(golden["resized224"][row], 0.9), golden["center_cropped"][row]
        )


def test_the_golden_pictures_tell_other_pipelines_apart(golden: dict[str, np.ndarray]) -> None:
    decoded, resized = golden["jpeg_decoded"][0], golden["resized224"][0]
    assert (golden["rot180"][0] != decoded).mean() > 0.5
    assert (
        np.asarray(Image.fromarray(decoded).resize((224, 224), Image.Resampling.LANCZOS)) != resized
    ).mean() > 0.01
    assert (centre_crop(resized, 0.81) != golden["center_cropped"][0]).mean() > 0.5


@pytest.mark.parametrize("size", [64, 100, 200])
def test_a_flat_picture_stays_flat_at_every_size(size: int) -> None:
    flat = np.full((100, 100, 3), 77, np.uint8)
    assert np.array_equal(lanczos(flat, size), np.full((size, size, 3), 77))
    assert np.array_equal(centre_crop(flat, 0.9), flat)


@pytest.mark.parametrize("size", [48, 160])
def test_lanczos_is_that_of_another_library_to_a_level(size: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    channels = [
        Image.fromarray(picture[..., c].astype(np.float32)).resize(
            (size, size), Image.Resampling.LANCZOS
        )
        for c in range(3)
    ]
    theirs = np.clip(np.round(np.stack([np.asarray(one) for one in channels], axis=-1)), 0, 255)
    assert np.abs(lanczos(picture, size) - theirs).max() <= 1


def test_all_of_the_area_is_the_picture_itself() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    assert np.array_equal(centre_crop(picture, 1.0), picture)
