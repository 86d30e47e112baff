"""The grasp search on objects whose grasps are known."""

import numpy as np
import pytest

from vla_opd.experts.libero import grasps
from vla_opd.experts.libero.grasps import Boxes, Grasp, Task

NOTHING = np.empty((0, 3))
BASE = np.array([-0.6, 0.0])
ALONG_Y = np.pi / 2  # the closing direction of LIBERO's hand at rest


def turn(yaw: float) -> np.ndarray:
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def box(
    size_mm: tuple[float, float, float], yaw: float = 0.0, at: tuple[float, float] = (0.0, 0.0)
) -> Boxes:
    """A box that stands on the floor."""
    half = np.array(size_mm) / 2000
    return Boxes(np.array([[*at, half[2]]]), turn(yaw)[None], half[None])


def ring(radius: float, height: float, number: int = 24) -> Boxes:
    """A wall of upright boxes around the origin, 4 mm thick."""
    yaws = 2 * np.pi * np.arange(number) / number
    centres = np.column_stack(
        [radius * np.cos(yaws), radius * np.sin(yaws), np.full(number, height / 2)]
    )
    halves = np.tile([0.002, np.pi * radius / number, height / 2], (number, 1))
    return Boxes(centres, np.stack([turn(yaw) for yaw in yaws]), halves)


def grasp(
    boxes: Boxes,
    obstacles: np.ndarray = NOTHING,
    yaw: float = ALONG_Y,
    avoid: tuple[Grasp, ...] = (),
) -> Grasp | None:
    centre = boxes.centres[:, :2].mean(axis=0)
    return grasps.best(
        Task(boxes.surface(grasps.SPACING), obstacles, 0.0, centre, BASE, yaw, avoid)
    )


@pytest.mark.parametrize("yaw", [0.0, np.pi / 6, np.pi / 2, -np.pi / 4])
def test_cuboid_is_grasped_across_its_narrow_side(yaw: float) -> None:
    found = grasp(box((40, 60, 80), yaw))
    assert found is not None
    assert abs(grasps.angle(found.yaw, yaw)) < 0.02  # the narrow side is along the box's first axis
    assert found.width == pytest.approx(0.04, abs=0.002)
    np.testing.assert_allclose(found.position[:2], 0, atol=0.004)


def test_tips_stay_above_the_floor_and_the_palm_above_the_object() -> None:
    for height in (20, 80, 140):
        found = grasp(box((40, 50, height)))
        assert found is not None
        tip = found.position[2] - grasps.SITE_ABOVE_TIP
        assert tip > 0
        assert tip + grasps.PALM_ABOVE_TIP > height / 1000
        assert tip + grasps.PAD_FROM < height / 1000


def test_narrow_gap_beside_a_taller_neighbour_is_found() -> None:
    neighbour = ring(0.0515, 0.05).surface(0.002) + np.array([-0.034, -0.109, 0.0])
    found = grasp(box((81, 43, 18)), neighbour)
    assert found is not None
    assert (
        grasps.lowest_tip(neighbour, found.position[:2], found.yaw)
        <= found.position[2] - grasps.SITE_ABOVE_TIP + 1e-9
    )


@pytest.mark.parametrize(("height", "overlap"), [(0.012, 0.0045), (0.016, 0.0085), (0.08, 0.016)])
def test_overlap_is_the_height_between_the_pads(height: float, overlap: float) -> None:
    found = grasp(box((40, 60, 1000 * height)))
    assert found is not None
    assert found.overlap == pytest.approx(overlap, abs=0.0025)


def test_box_wider_than_the_opening_has_no_grasp() -> None:
    assert grasp(box((85, 85, 40))) is None


def test_narrow_enough_box_needs_no_turn() -> None:
    found = grasp(box((60, 40, 80)))
    assert found is not None
    assert found.yaw == ALONG_Y


@pytest.mark.parametrize("yaw", [0.0, 0.7, np.pi / 2])
def test_bowl_is_grasped_at_its_wall_along_a_radius(yaw: float) -> None:
    found = grasp(ring(0.055, 0.04), yaw=yaw)
    assert found is not None
    outward = found.position[:2] / np.linalg.norm(found.position[:2])
    closing = np.array([np.cos(found.yaw), np.sin(found.yaw)])
    assert abs(outward @ closing) > np.cos(np.radians(15))
    assert np.linalg.norm(found.position[:2]) == pytest.approx(0.055, abs=0.006)
    assert found.width < 0.015


def test_neighbour_is_not_touched() -> None:
    """Two walls leave room for the fingers along x only."""
    walls = Boxes(
        np.array([[0, 0.035, 0.05], [0, -0.035, 0.05]]),
        np.stack([np.eye(3)] * 2),
        np.array([[0.1, 0.004, 0.05]] * 2),
    )
    alone, hemmed = grasp(box((40, 40, 60))), grasp(box((40, 40, 60)), walls.roof(0.004))
    assert alone is not None
    assert alone.yaw == ALONG_Y
    if hemmed is not None:  # the palm is wider than the gap: only a grasp above the walls would do
        tip = hemmed.position[2] - grasps.SITE_ABOVE_TIP
        assert tip >= grasps.lowest_tip(walls.roof(0.004), hemmed.position[:2], hemmed.yaw) - 0.004
    low = Boxes(walls.centres * [1, 1, 0.5], walls.rotations, walls.halves * [1, 1, 0.5])
    under_palm = grasp(box((40, 40, 60)), low.roof(0.004))
    assert under_palm is not None
    assert abs(grasps.angle(under_palm.yaw, 0.0)) < 0.3


def test_failed_grasp_is_not_proposed_again() -> None:
    first = grasp(ring(0.055, 0.04))
    assert first is not None
    second = grasp(ring(0.055, 0.04), avoid=(first,))
    assert second is not None
    assert (
        np.linalg.norm(first.position[:2] - second.position[:2]) > 0.012
        or abs(grasps.angle(first.yaw, second.yaw)) > 0.3
    )


def test_search_is_deterministic_and_steady() -> None:
    """The same scene gives the same grasp; a scene moved by a millimetre gives nearly the same."""
    one, two = grasp(ring(0.055, 0.04)), grasp(ring(0.055, 0.04))
    assert one is not None
    assert two is not None
    np.testing.assert_array_equal(one.position, two.position)
    for shift in ((0.001, 0.0), (0.0, -0.001), (0.003, 0.002)):
        moved = ring(0.055, 0.04)
        there = grasp(Boxes(moved.centres + np.array([*shift, 0.0]), moved.rotations, moved.halves))
        assert there is not None
        assert np.linalg.norm(there.position[:2] - shift - one.position[:2]) < 0.008


def test_gable_is_not_grasped_where_it_narrows_upward() -> None:
    """Two planes that lean together: pads that meet them only with their lower edges would squeeze the object out."""
    lean = np.radians(35)
    c, s = np.cos(lean), np.sin(lean)
    planes = [np.array([[1, 0, 0], [0, c, sign * s], [0, -sign * s, c]]) for sign in (1, -1)]
    roof = Boxes(
        np.array([[0, 0.016, 0.02], [0, -0.016, 0.02]]),
        np.stack([planes[1], planes[0]]),
        np.array([[0.05, 0.001, 0.02]] * 2),
    )
    found = grasp(roof)
    assert found is None or abs(grasps.angle(found.yaw, ALONG_Y)) > 0.3


def test_lowest_tip() -> None:
    post = box((10, 10, 50), at=(0.047, 0.0)).roof(0.004)
    assert grasps.lowest_tip(post, np.zeros(2), 0.0) == pytest.approx(0.05 + grasps.CLEARANCE)
    assert grasps.lowest_tip(post, np.zeros(2), np.pi / 2) == -np.inf
    beam = box((10, 10, 50), at=(0.08, 0.0)).roof(0.004)
    assert grasps.lowest_tip(beam, np.zeros(2), 0.0) == pytest.approx(
        0.05 - grasps.PALM_ABOVE_TIP + grasps.CLEARANCE
    )


def test_angle_knows_that_half_a_turn_is_nothing() -> None:
    assert grasps.angle(np.pi + 0.1, 0.0) == pytest.approx(0.1)
    assert grasps.angle(0.0, 0.2) == pytest.approx(-0.2)


def test_skyline_keeps_the_highest_point_of_every_cell() -> None:
    points = np.array([[0.001, 0.001, 1.0], [0.002, 0.003, 3.0], [0.011, 0.001, 2.0]])
    kept = grasps.skyline(points, 0.01)
    np.testing.assert_allclose(kept, [[0.005, 0.005, 3.0], [0.015, 0.005, 2.0]])


def test_surface_points_lie_on_the_faces() -> None:
    points = box((20, 30, 40), yaw=0.3).surface(0.005) @ turn(0.3) - [0, 0, 0.02]
    outermost = np.abs(points) / [0.01, 0.015, 0.02]
    np.testing.assert_allclose(outermost.max(axis=1), 1.0)
    assert set(np.round(box((20, 30, 40)).roof(0.005)[:, 2], 6)) == {0.04}
