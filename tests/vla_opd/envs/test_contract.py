"""The contract of `vla_opd.envs.protocol.Env`.

Tested for each family that ships and for one from outside the package.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
from jaxtyping import Float32

from tests.vla_opd.envs.episode import play, play_in_new_env
from vla_opd.envs import Env, Observation, Placement, make_env
from vla_opd.experts import make_expert
from vla_opd.params.stages import EnvironmentParams
from vla_opd.simulation.resume import EpisodeRecord, Resume


@dataclass(frozen=True)
class Case:
    """A family, two of its tasks, its cameras, its scripted expert, and the expert's horizon."""

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
    """A case and its environment, alive for the whole module.

    Earlier tests are earlier episodes, which must not matter.
    """

    case: Case
    env: Env

    def placement(self, task: int = 0, index: int = 0) -> Placement:
        return Placement(self.case.tasks[task], "evaluation", index)

    def actions(self, steps: int, seed: int = 0) -> Float32[np.ndarray, "S A"]:
        generator = np.random.default_rng(seed)
        actions = generator.uniform(-1, 1, (steps, self.env.action_dim))
        return actions.astype(np.float32)


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


def _is_same(first: Observation, second: Observation) -> bool:
    return (
        np.array_equal(first.frames, second.frames)
        and np.array_equal(first.proprio, second.proprio)
        and first.instruction == second.instruction
    )


def test_reset_observes_as_the_parameters_ask(subject: Subject) -> None:
    observation = subject.env.reset(subject.placement())
    frames = observation.frames
    proprio = observation.proprio
    assert frames.shape == (len(subject.case.cameras), 48, 48, 3)
    assert frames.dtype == np.uint8
    assert proprio.shape == (subject.env.proprio_dim,)
    assert proprio.dtype == np.float32
    assert observation.instruction
    assert frames.std() > 5, "the frames have no contrast"


def test_steps_and_observations_are_counted_from_the_reset(subject: Subject) -> None:
    subject.env.reset(subject.placement())
    first = subject.env.advance(subject.actions(7), observe_every=4)
    second = subject.env.advance(subject.actions(3), observe_every=4)
    assert first.steps == 7
    assert len(first.observations) == 1  # after step 4
    assert second.steps == 3
    assert len(second.observations) == 1  # after step 8, the first of this chunk
    assert not first.success


def test_rare_observations_equal_those_of_every_step(subject: Subject) -> None:
    actions = subject.actions(8)
    subject.env.reset(subject.placement())
    always = subject.env.advance(actions, observe_every=1).observations
    subject.env.reset(subject.placement())
    rarely = subject.env.advance(actions, observe_every=4).observations
    assert len(always) == 8
    assert len(rarely) == 2
    assert _is_same(rarely[0], always[3])
    assert _is_same(rarely[1], always[7])


def test_observing_nothing_changes_nothing(subject: Subject) -> None:
    actions = subject.actions(6)
    subject.env.reset(subject.placement())
    watched = subject.env.advance(actions, observe_every=1).observations[-1]
    subject.env.reset(subject.placement())
    assert subject.env.advance(actions[:5], observe_every=0).observations == ()
    unwatched = subject.env.advance(actions[5:], observe_every=1).observations[0]
    assert _is_same(unwatched, watched)


def test_the_recorded_actions_lead_to_the_recorded_state(subject: Subject) -> None:
    actions = subject.actions(8)
    placement = subject.placement()
    observations = [subject.env.reset(placement)]
    observations += subject.env.advance(actions, observe_every=2).observations
    play(subject.env, subject.placement(index=3), subject.actions(9, seed=1))
    recorded = EpisodeRecord(
        placement=placement,
        success=False,
        actions=actions,
        step=np.arange(0, 10, 2, dtype=np.int32),
        proprio=np.stack([observation.proprio for observation in observations]),
    )
    for row in (4, 0, 2):
        restored = Resume(recorded, row).restore(subject.env)
        assert _is_same(restored, observations[row])


def test_an_episode_does_not_depend_on_earlier_ones_nor_on_the_chunks(subject: Subject) -> None:
    actions = subject.actions(12)
    before = play(subject.env, subject.placement(), actions)
    play(subject.env, subject.placement(index=3), subject.actions(9, seed=1))
    play(subject.env, subject.placement(task=1), subject.actions(9, seed=2))
    assert play(subject.env, subject.placement(), actions, chunk=12) == before
    assert play(subject.env, subject.placement(), subject.actions(12, seed=1)) != before


def test_a_fresh_process_sees_the_same_bytes(subject: Subject) -> None:
    actions = subject.actions(12)
    placement = subject.placement()
    digest = play(subject.env, placement, actions)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        future = pool.submit(play_in_new_env, subject.case.params, placement, actions)
        assert future.result() == digest


def test_the_first_success_stops_the_chunk(subject: Subject) -> None:
    subject.env.reset(subject.placement())
    expert = make_expert(subject.case.expert, subject.env)
    expert.reset()
    actions: list[np.ndarray] = []
    success = False
    while not success and len(actions) < subject.case.horizon:
        action = expert.act()
        actions.append(action)
        success = subject.env.advance(action[None], observe_every=0).success
    assert success, "the scripted expert failed"
    subject.env.reset(subject.placement())
    chunk = np.stack([*actions, *actions[:5]])
    advance = subject.env.advance(chunk, observe_every=0)
    assert advance.steps == len(actions)
    assert advance.success


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
    env = subject.env
    params = subject.case.params
    with pytest.raises(ValueError, match=r"environment\.tasks.*juggle"):
        make_env(params.model_copy(update={"tasks": ("juggle",)}))
    with pytest.raises(ValueError, match=r"environment\.cameras.*periscope"):
        make_env(params.model_copy(update={"cameras": ("periscope",)}))
    with pytest.raises(ValueError, match="juggle"):
        env.reset(Placement("juggle", "evaluation", 0))
    for index in (50, -1):
        with pytest.raises(ValueError, match=str(index)):
            env.reset(subject.placement(index=index))
    env.reset(subject.placement())
    for shape in ((env.action_dim,), (2, env.action_dim + 1)):
        with pytest.raises(ValueError, match="shape"):
            env.advance(np.zeros(shape, np.float32), observe_every=0)


def test_describe_is_text(subject: Subject) -> None:
    facts = subject.env.describe()
    assert facts
    assert all(isinstance(text, str) for text in (*facts.keys(), *facts.values()))


def test_closing_twice_is_allowed(subject: Subject) -> None:
    env = make_env(subject.case.params)
    env.reset(subject.placement())
    env.close()
    env.close()
    frames = subject.env.reset(subject.placement()).frames
    assert frames.any(), "this also freed the context of another environment"
