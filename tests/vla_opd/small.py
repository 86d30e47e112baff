"""The smallest of everything: a policy built in milliseconds, observations, random episodes."""

import numpy as np

from vla_opd.data.action_space import ActionSpace
from vla_opd.data.trajectory import Episode, Observations
from vla_opd.envs.protocol import Placement
from vla_opd.params.stages import EnvironmentParams, PolicyParams
from vla_opd.policies.checkpoint import CheckpointFacts

CHUNK, DIMS, BINS = 2, 3, 8
TOKENS = CHUNK * DIMS
SPACE = ActionSpace(
    q01=(-0.5, -1.0, 0.0),
    q99=(0.5, 2.0, 0.0),
    normalised=(True, True, False),
    chunk=CHUNK,
    bins=BINS,
)
ENVIRONMENT = EnvironmentParams(
    family="metaworld", tasks=("reach-v3",), cameras=("front", "side"), image_size=20
)
SHAPE = PolicyParams(chunk=CHUNK, bins=BINS, crop=16, width=16, layers=1, heads=2, channels=8)
FACTS = CheckpointFacts(
    policy=SHAPE,
    action_space=SPACE,
    environment=ENVIRONMENT,
    vocabulary=("cube", "pick", "red"),
    proprio_mean=(0.1, 0.2),
    proprio_std=(1.0, 2.0),
    instruction_length=4,
)


def observations(rows: int, seed: int = 0, instruction: str = "pick the red cube") -> Observations:
    """Random pictures and proprioception that suit `FACTS`."""
    random = np.random.default_rng(seed)
    frames = random.integers(0, 256, (rows, 2, 20, 20, 3), dtype=np.uint8)
    return Observations(
        frames, random.normal(size=(rows, 2)).astype(np.float32), (instruction,) * rows
    )


def episode(
    seed: int = 0,
    *,
    steps: int = 5,
    every: int = 1,
    member: int = 0,
    clean: tuple[bool, ...] | None = None,
    task: str = "reach-v3",
) -> Episode:
    """An episode of L = `steps` random control steps, a state kept at every `every`-th of them."""
    random = np.random.default_rng(seed)
    step = np.arange(0, steps, every, dtype=np.int32)
    decisions = -(-steps // CHUNK)
    return Episode(
        placement=Placement(task, "training", seed),
        member=member,
        instruction=f"solve {task}",
        success=bool(random.integers(2)),
        steps=steps,
        frames=random.integers(0, 256, (len(step), 1, 6, 6, 3), dtype=np.uint8),
        proprio=random.normal(size=(len(step), 2)).astype(np.float32),
        step=step,
        actions=random.normal(size=(steps, DIMS)).astype(np.float32),
        clean=np.array(clean if clean is not None else random.random(steps) < 0.8),
        tokens=random.integers(0, BINS, (decisions, TOKENS)).astype(np.int16),
        log_probs=random.normal(size=(decisions, TOKENS)).astype(np.float32),
    )
