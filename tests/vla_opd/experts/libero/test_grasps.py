"""The grasp search on objects whose grasps are known."""

import numpy as np
import pytest

from vla_opd.experts.libero import grasps
from vla_opd.experts.libero.grasps import Boxes, Grasp, GraspTask

NOTHING = np.empty((0, 3))
BASE = np.array([-0.6, 0.0])
ALONG_Y = np.pi / 2  # the closing direction of LIBERO's hand at rest


def turn(yaw: float) -> np.ndarray:
    c = np.cos(yaw)
    s = np.sin(yaw)
    return np.array(
        [
            [c, -s, 0.0],
            [s, c, 0.0],
            [0.0, 0.0, 1.0],
        ]
    )


def box(
    size_mm: tuple[float, float, float], yaw: float = 0.0, at: tuple[float, float] = (0.0, 0.0)
) -> Boxes:
    """Make a box that stands on the floor."""
    half = np.array(size_mm) / 2000
    centre = np.array([*at, half[2]])
    return Boxes(centre[None], turn(yaw)[None], half[None])


def ring(radius: float, height: float, number: int = 24) -> Boxes:
    """Make a wall of upright boxes around the origin, 4 mm thick."""
    yaws = 2 * np.pi * np.arange(number) / number
    centres = np.column_stack(
        [
            radius * np.cos(yaws),
            radius * np.sin(yaws),
            np.full(number, height / 2),
        ]
    )
    half = [0.002, np.pi * radius / number, height / 2]
    halves = np.tile(half, (number, 1))
    rotations = np.stack([turn(yaw) for yaw in yaws])
    return Boxes(centres, rotations, halves)


def find(
    boxes: Boxes,
    obstacles: np.ndarray = NOTHING,
    yaw: float = ALONG_Y,
    avoid: tuple[Grasp, ...] = (),
) -> Grasp | None:
    task = GraspTask(
        target=boxes.surface(grasps.SPACING),
        obstacles=obstacles,
        floor=0.0,
        centre=boxes.centres[:, :2].mean(axis=0),
        base=BASE,
        yaw=yaw,
        avoid=avoid,
    )
    return grasps.find_grasp(task)


def is_turned(grasp: Grasp, yaw: float, tolerance: float = 0.3) -> bool:
    return abs(grasps.yaw_difference(grasp.yaw, yaw)) > tolerance


@pytest.mark.parametrize("yaw", [0.0, np.pi / 6, np.pi / 2, -np.pi / 4])
def test_cuboid_is_grasped_across_its_narrow_side(yaw: float) -> None:
    grasp = find(box((40, 60, 80), yaw))
    assert grasp is not None
    # The narrow side is along the box's first axis.
    assert not is_turned(grasp, yaw, tolerance=0.02)
    assert grasp.width == pytest.approx(0.04, abs=0.002)
    np.testing.assert_allclose(grasp.position[:2], 0, atol=0.004)


def test_tips_stay_above_the_floor_and_the_palm_above_the_object() -> None:
    for height in (20, 80, 140):
        grasp = find(box((40, 50, height)))
        assert grasp is not None
        tip = grasp.position[2] - grasps.SITE_ABOVE_TIP
        assert tip > 0
        assert tip + grasps.PALM_ABOVE_TIP > height / 1000
        assert tip + grasps.PAD_FROM < height / 1000


def test_narrow_gap_beside_a_taller_neighbour_is_found() -> None:
    neighbour = ring(0.0515, 0.05).surface(0.002) + np.array([-0.034, -0.109, 0.0])
    grasp = find(box((81, 43, 18)), neighbour)
    assert grasp is not None
    lowest = grasps.lowest_tip(neighbour, grasp.position[:2], grasp.yaw)
    tip = grasp.position[2] - grasps.SITE_ABOVE_TIP
    assert lowest <= tip + 1e-9


@pytest.mark.parametrize(("height", "overlap"), [(0.012, 0.0045), (0.016, 0.0085), (0.08, 0.016)])
def test_overlap_is_the_height_between_the_pads(height: float, overlap: float) -> None:
    grasp = find(box((40, 60, 1000 * height)))
    assert grasp is not None
    assert grasp.overlap == pytest.approx(overlap, abs=0.0025)


def test_box_wider_than_the_opening_has_no_grasp() -> None:
    assert find(box((85, 85, 40))) is None


def test_narrow_enough_box_needs_no_turn() -> None:
    grasp = find(box((60, 40, 80)))
    assert grasp is not None
    assert grasp.yaw == ALONG_Y


@pytest.mark.parametrize("yaw", [0.0, 0.7, np.pi / 2])
def test_bowl_is_grasped_at_its_wall_along_a_radius(yaw: float) -> None:
    grasp = find(ring(0.055, 0.04), yaw=yaw)
    assert grasp is not None
    planar = grasp.position[:2]
    radius = np.linalg.norm(planar)
    outward = planar / radius
    closing = np.array([np.cos(grasp.yaw), np.sin(grasp.yaw)])
    assert abs(outward @ closing) > np.cos(np.radians(15))
    assert radius == pytest.approx(0.055, abs=0.006)
    assert grasp.width < 0.015


def test_neighbour_is_not_touched() -> None:
    """Two walls leave room for the fingers along x only."""
    walls = Boxes(
        centres=np.array([[0, 0.035, 0.05], [0, -0.035, 0.05]]),
        rotations=np.stack([np.eye(3)] * 2),
        halves=np.array([[0.1, 0.004, 0.05]] * 2),
    )
    alone = find(box((40, 40, 60)))
    assert alone is not None
    assert alone.yaw == ALONG_Y
    roof = walls.roof(0.004)
    hemmed = find(box((40, 40, 60)), roof)
    if hemmed is not None:  # the palm is wider than the gap: the grasp has to be above the walls
        tip = hemmed.position[2] - grasps.SITE_ABOVE_TIP
        lowest = grasps.lowest_tip(roof, hemmed.position[:2], hemmed.yaw)
        assert tip >= lowest - 0.004
    low = Boxes(walls.centres * [1, 1, 0.5], walls.rotations, walls.halves * [1, 1, 0.5])
    under_palm = find(box((40, 40, 60)), low.roof(0.004))
    assert under_palm is not None
    assert not is_turned(under_palm, 0.0)


def test_failed_grasp_is_not_proposed_again() -> None:
    first = find(ring(0.055, 0.04))
    assert first is not None
    second = find(ring(0.055, 0.04), avoid=(first,))
    assert second is not None
    distance = np.linalg.norm(first.position[:2] - second.position[:2])
    assert distance > 0.012 or is_turned(first, second.yaw)


def test_search_is_deterministic_and_steady() -> None:
    """The same scene gives the same grasp; a scene moved by a millimetre gives nearly the same."""
    first = find(ring(0.055, 0.04))
    second = find(ring(0.055, 0.04))
    assert first is not None
    assert second is not None
    np.testing.assert_array_equal(first.position, second.position)
    for shift in ((0.001, 0.0), (0.0, -0.001), (0.003, 0.002)):
        bowl = ring(0.055, 0.04)
        centres = bowl.centres + np.array([*shift, 0.0])
        moved = find(Boxes(centres, bowl.rotations, bowl.halves))
        assert moved is not None
        offset = moved.position[:2] - shift - first.position[:2]
        assert np.linalg.norm(offset) < 0.008


def test_gable_is_not_grasped_where_it_narrows_upward() -> None:
    """Two planes lean together: pads that meet only their lower edges squeeze the object out."""
    lean = np.radians(35)
    c = np.cos(lean)
    s = np.sin(lean)
    roof = Boxes(
        centres=np.array([[0, 0.016, 0.02], [0, -0.016, 0.02]]),
        rotations=np.array(
            [
                [[1, 0, 0], [0, c, -s], [0, s, c]],
                [[1, 0, 0], [0, c, s], [0, -s, c]],
            ]
        ),
        halves=np.array([[0.05, 0.001, 0.02]] * 2),
    )
    grasp = find(roof)
    assert grasp is None or is_turned(grasp, ALONG_Y)


def test_lowest_tip() -> None:
    origin = np.zeros(2)
    post = box((10, 10, 50), at=(0.047, 0.0)).roof(0.004)
    below_finger = grasps.lowest_tip(post, origin, 0.0)
    beside_hand = grasps.lowest_tip(post, origin, np.pi / 2)
    assert below_finger == pytest.approx(0.05 + grasps.CLEARANCE)
    assert beside_hand == -np.inf
    beam = box((10, 10, 50), at=(0.08, 0.0)).roof(0.004)
    below_palm = grasps.lowest_tip(beam, origin, 0.0)
    assert below_palm == pytest.approx(0.05 - grasps.PALM_ABOVE_TIP + grasps.CLEARANCE)


def test_yaw_difference_ignores_half_turns() -> None:
    assert grasps.yaw_difference(np.pi + 0.1, 0.0) == pytest.approx(0.1)
    assert grasps.yaw_difference(0.0, 0.2) == pytest.approx(-0.2)


def test_skyline_keeps_the_highest_point_of_every_cell() -> None:
    points = np.array([[0.001, 0.001, 1.0], [0.002, 0.003, 3.0], [0.011, 0.001, 2.0]])
    kept = grasps.skyline(points, 0.01)
    np.testing.assert_allclose(kept, [[0.005, 0.005, 3.0], [0.015, 0.005, 2.0]])


def test_surface_points_lie_on_the_faces() -> None:
    points = box((20, 30, 40), yaw=0.3).surface(0.005) @ turn(0.3) - [0, 0, 0.02]
    outermost = np.abs(points) / [0.01, 0.015, 0.02]
    np.testing.assert_allclose(outermost.max(axis=1), 1.0)
    roof = box((20, 30, 40)).roof(0.005)
    assert set(np.round(roof[:, 2], 6)) == {0.04}
