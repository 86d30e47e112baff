"""What every environment promises (`vla_opd.envs.protocol.Env`), asked of each family that ships and of one from outside the package."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
from jaxtyping import Float32

from tests.vla_opd.envs.episode import play, play_afresh
from vla_opd.envs import Env, Observation, Placement, make_env
from vla_opd.experts import make_expert
from vla_opd.params.stages import EnvironmentParams
from vla_opd.simulation.resume import Recorded, Resume


@dataclass(frozen=True)
class Case:
    """A family to hold to the contract: two of its tasks, its cameras, its scripted expert and how long that may take."""

    family: str
    tasks: tuple[str, str]
    cameras: tuple[str, ...]
    expert: str
    horizon: int

    @property
    def params(self) -> EnvironmentParams:
        return EnvironmentParams(
            family=self.family, tasks=self.tasks, cameras=self.cameras, image_size=48
        )


@dataclass(frozen=True)
class Subject:
    """A case and its environment, alive for the whole module: earlier tests are the earlier episodes that must not matter."""

    case: Case
    env: Env

    def placement(self, task: int = 0, index: int = 0) -> Placement:
        return Placement(self.case.tasks[task], "evaluation", index)

    def actions(self, steps: int, seed: int = 0) -> Float32[np.ndarray, "S A"]:
        return (
            np.random.default_rng(seed)
            .uniform(-1, 1, (steps, self.env.action_dim))
            .astype(np.float32)
        )


CASES = [
    pytest.param(
        Case("metaworld", ("window-open-v3", "reach-v3"), ("corner4", "topview"), "metaworld", 150),
        id="metaworld",
    ),
    pytest.param(
        Case(
            "tests.out_of_tree:make",
            ("red", "blue"),
            ("agentview", "mirrored"),
            "tests.out_of_tree:expert",
            60,
        ),
        id="out_of_tree",
    ),
    pytest.param(
        Case("libero", ("libero_object/0", "libero_spatial/0"), ("agentview",), "libero", 300),
        id="libero",
        marks=pytest.mark.simulator,
    ),
]


@pytest.fixture(scope="module", params=CASES)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    env = make_env(request.param.params)
    yield Subject(request.param, env)
    env.close()


def _same(left: Observation, right: Observation) -> bool:
    return (
        np.array_equal(left.frames, right.frames)
        and np.array_equal(left.proprio, right.proprio)
        and left.instruction == right.instruction
    )


def test_reset_shows_what_the_parameters_ask_for(subject: Subject) -> None:
    seen = subject.env.reset(subject.placement())
    assert (seen.frames.shape, seen.frames.dtype) == (
        (len(subject.case.cameras), 48, 48, 3),
        np.uint8,
    )
    assert (seen.proprio.shape, seen.proprio.dtype) == ((subject.env.proprio_dim,), np.float32)
    assert seen.instruction
    assert seen.frames.std() > 5, "a frame without contrast shows nothing"


def test_steps_and_observations_are_counted_from_the_reset(subject: Subject) -> None:
    subject.env.reset(subject.placement())
    first, second = (
        subject.env.advance(subject.actions(steps), observe_every=4) for steps in (7, 3)
    )
    assert (first.steps, len(first.observations)) == (7, 1)  # after step 4
    assert (second.steps, len(second.observations)) == (3, 1)  # after step 8, the chunk's first
    assert not first.success


def test_observing_seldom_shows_the_frames_that_observing_always_shows(subject: Subject) -> None:
    actions = subject.actions(8)
    subject.env.reset(subject.placement())
    always = subject.env.advance(actions, observe_every=1).observations
    subject.env.reset(subject.placement())
    seldom = subject.env.advance(actions, observe_every=4).observations
    assert len(always) == 8
    assert [_same(left, right) for left, right in zip(seldom, always[3::4], strict=True)] == [
        True,
        True,
    ]


def test_observing_nothing_changes_nothing(subject: Subject) -> None:
    actions = subject.actions(6)
    subject.env.reset(subject.placement())
    watched = subject.env.advance(actions, observe_every=1).observations[-1]
    subject.env.reset(subject.placement())
    assert subject.env.advance(actions[:5], observe_every=0).observations == ()
    assert _same(subject.env.advance(actions[5:], observe_every=1).observations[0], watched)


def test_the_recorded_actions_lead_to_the_recorded_state(subject: Subject) -> None:
    actions, placement = subject.actions(8), subject.placement()
    seen = [
        subject.env.reset(placement),
        *subject.env.advance(actions, observe_every=2).observations,
    ]
    play(subject.env, subject.placement(index=3), subject.actions(9, seed=1))
    recorded = Recorded(
        placement,
        False,
        actions,
        np.arange(0, 10, 2, dtype=np.int32),
        np.stack([one.proprio for one in seen]),
    )
    assert all(_same(Resume(recorded, row).observed(subject.env), seen[row]) for row in (4, 0, 2))


def test_an_episode_does_not_depend_on_earlier_ones_nor_on_the_chunks(subject: Subject) -> None:
    actions = subject.actions(12)
    before = play(subject.env, subject.placement(), actions)
    play(subject.env, subject.placement(index=3), subject.actions(9, seed=1))
    play(subject.env, subject.placement(task=1), subject.actions(9, seed=2))
    assert play(subject.env, subject.placement(), actions, chunk=12) == before
    assert play(subject.env, subject.placement(), subject.actions(12, seed=1)) != before


def test_a_fresh_process_sees_the_same_bytes(subject: Subject) -> None:
    actions = subject.actions(12)
    here = play(subject.env, subject.placement(), actions)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert (
            pool.submit(play_afresh, subject.case.params, subject.placement(), actions).result()
            == here
        )


def test_the_first_success_stops_the_chunk(subject: Subject) -> None:
    subject.env.reset(subject.placement())
    expert = make_expert(subject.case.expert, subject.env)
    expert.reset()
    taken: list[np.ndarray] = []
    success = False
    while not success and len(taken) < subject.case.horizon:
        taken.append(expert.act())
        success = subject.env.advance(taken[-1][None], observe_every=0).success
    assert success, "the scripted expert failed"
    subject.env.reset(subject.placement())
    led = subject.env.advance(np.stack([*taken, *taken[:5]]), observe_every=0)
    assert (led.steps, led.success) == (len(taken), True)


def test_placements_differ(subject: Subject) -> None:
    task = subject.case.tasks[0]
    placements = [
        Placement(task, "evaluation", 0),
        Placement(task, "evaluation", 1),
        Placement(task, "training", 0),
        Placement(task, "training", 1),
    ]
    frames = [subject.env.reset(placement).frames for placement in placements]
    assert len({frame.tobytes() for frame in frames}) == len(placements)


def test_mistakes_are_named(subject: Subject) -> None:
    with pytest.raises(ValueError, match=r"environment\.tasks.*juggle"):
        make_env(subject.case.params.model_copy(update={"tasks": ("juggle",)}))
    with pytest.raises(ValueError, match=r"environment\.cameras.*periscope"):
        make_env(subject.case.params.model_copy(update={"cameras": ("periscope",)}))
    with pytest.raises(ValueError, match="juggle"):
        subject.env.reset(Placement("juggle", "evaluation", 0))
    for index in (50, -1):
        with pytest.raises(ValueError, match=str(index)):
            subject.env.reset(subject.placement(index=index))
    subject.env.reset(subject.placement())
    for shape in ((subject.env.action_dim,), (2, subject.env.action_dim + 1)):
        with pytest.raises(ValueError, match="shape"):
            subject.env.advance(np.zeros(shape, np.float32), observe_every=0)


def test_describe_is_text(subject: Subject) -> None:
    facts = subject.env.describe()
    assert facts
    assert all(isinstance(text, str) for pair in facts.items() for text in pair)


def test_closing_twice_is_closing(subject: Subject) -> None:
    env = make_env(subject.case.params)
    env.reset(subject.placement())
    env.close()
    env.close()
    assert subject.env.reset(subject.placement()).frames.any(), (
        "another environment's context went with it"
    )
