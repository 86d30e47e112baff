"""demonstrate: scripted expert -> demonstrations.

A set has the same number of successful demonstrations for every task. Each is a slot with its own
seeded placements: the first and, if the expert fails there, the next. So a shard (some slots of one
task) depends on nothing but the seed, the set's name and its slots.
"""

from pathlib import Path

from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Manifest
from vla_opd.data.trajectory import shard_name
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import track
from vla_opd.params.stages import DemonstrateParams, DemonstrationSet, EnvironmentParams
from vla_opd.simulation.demonstrator import Demonstrator, Slot
from vla_opd.simulation.pool import PoolSettings, SimulationStats

SLOTS_PER_SHARD = 10


def run(
    *,
    run: str,
    seed: int,
    settings: DemonstrateParams,
    environment: EnvironmentParams,
    name: str,
    wanted: DemonstrationSet,
    chunk: int,
    out: Path,
    host: Host,
) -> Manifest:
    """Make a set of demonstrations. RuntimeError if the expert fails `attempts` times in one slot.

    chunk: the policy's chunk length, by which shards mark valid tokens.
    """
    tasks = wanted.tasks or environment.tasks
    environment = environment.model_copy(update={"tasks": tasks})
    recorded = {
        "seed": seed,
        "set": name,
        "episodes": wanted.episodes,
        "demonstrate": settings.model_dump(),
        "environment": environment.model_dump(),
        "chunk": chunk,
    }
    shards = plan_shards(tasks, wanted.episodes)
    stats = SimulationStats()
    pool = PoolSettings(host.workers, host.timeout_s)
    demonstrator = Demonstrator(settings, environment, seed, name, pool, stats)
    with (
        draft(out, "demonstrations", {}, recorded) as work,
        track(host, run, "demonstrate", name, recorded) as log,
    ):
        failures = demonstrator.write_missing(work, shards, chunk)
        log({"failures": failures, **stats.as_metrics()}, 0)
        return work.publish({"tasks": list(tasks), "episodes": wanted.episodes * len(tasks)})


def plan_shards(tasks: tuple[str, ...], episodes: int) -> dict[str, list[Slot]]:
    """Return the slots of every shard."""
    shards: dict[str, list[Slot]] = {}
    for number, task in enumerate(tasks):
        for first in range(0, episodes, SLOTS_PER_SHARD):
            slots = range(first, min(first + SLOTS_PER_SHARD, episodes))
            shards[shard_name(number, first)] = [(task, slot) for slot in slots]
    return shards
