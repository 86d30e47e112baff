"""demonstrate: scripted expert -> demonstrations.

A set has the same number of successful demonstrations for every task. Each is a slot with its own seeded placements: the first, and if the expert
fails there the next. So a shard (some slots of one task) depends on nothing but the seed, the set's name and its slots.
"""

from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from vla_opd.artifacts.draft import Draft, draft
from vla_opd.artifacts.manifest import Manifest
from vla_opd.data.trajectory import Episode, shard_name, write_shard
from vla_opd.envs.protocol import Placement
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import track
from vla_opd.params.run import Params
from vla_opd.params.stages import EnvironmentParams
from vla_opd.seeds import derive
from vla_opd.simulation.demonstrate import demonstrate
from vla_opd.simulation.jobs import Job
from vla_opd.simulation.pool import PoolSettings, Tally

SLOTS_PER_SHARD = 10


def run(params: Params, name: str, out: Path, host: Host) -> Manifest:
    """Make the set `demonstrations.<name>`. RuntimeError if the expert fails `demonstrate.attempts` times in one slot."""
    wanted = params.demonstrations[name]
    tasks = wanted.tasks or params.environment.tasks
    environment = params.environment.model_copy(update={"tasks": tasks})
    settings = {
        "seed": params.run.seed,
        "set": name,
        "episodes": wanted.episodes,
        "demonstrate": params.demonstrate.model_dump(),
        "environment": environment.model_dump(),
        "chunk": params.policy.chunk,
    }
    slots = {
        shard_name(number, first): [
            (task, slot) for slot in range(first, min(first + SLOTS_PER_SHARD, wanted.episodes))
        ]
        for number, task in enumerate(tasks)
        for first in range(0, wanted.episodes, SLOTS_PER_SHARD)
    }
    tally = Tally()
    with (
        draft(out, "demonstrations", {}, settings) as work,
        track(host, params.run.name, "demonstrate", name, settings) as log,
    ):
        failures = _fill(params, name, environment, work, slots, host, tally)
        log({"failures": failures, **tally.as_metrics()}, 0)
        return work.publish({"tasks": list(tasks), "episodes": wanted.episodes * len(tasks)})


Slot = tuple[str, int]


def _fill(
    params: Params,
    name: str,
    environment: EnvironmentParams,
    work: Draft,
    slots: dict[str, list[Slot]],
    host: Host,
    tally: Tally,
) -> int:
    """Write the shards that are not there yet, each as soon as all its slots have a success. Returns the number of failed episodes."""
    missing = {shard: slots[shard] for shard in work.missing(slots)}
    done: dict[Slot, Episode] = {}
    total, left = (sum(map(len, shards.values())) for shards in (slots, missing))
    with tqdm(
        total=total, initial=total - left, desc=f"demonstrate {name}", unit="episode", mininterval=5
    ) as bar:
        failures = 0
        for slot, episode in _tries(
            params,
            name,
            environment,
            [slot for members in missing.values() for slot in members],
            host,
            tally,
        ):
            work.remember(tally.environment)
            if not episode.success:
                failures += 1
                continue
            done[slot] = episode
            bar.update()
            for shard in [s for s, members in missing.items() if all(m in done for m in members)]:
                with work.part(shard) as path:
                    write_shard(
                        path, [done.pop(m) for m in missing.pop(shard)], params.policy.chunk
                    )
    return failures


def _tries(
    params: Params,
    name: str,
    environment: EnvironmentParams,
    slots: list[Slot],
    host: Host,
    tally: Tally,
) -> Iterator[tuple[Slot, Episode]]:
    """Episodes until every slot has a success; where the expert fails, the slot's next placement. RuntimeError if it fails too often in one."""
    for attempt in range(params.demonstrate.attempts):
        failed: list[Slot] = []
        for slot, episode in _attempt(params, name, environment, slots, attempt, host, tally):
            failed += [] if episode.success else [slot]
            yield slot, episode
        slots = sorted(failed)
        if not slots:
            return
    raise RuntimeError(
        f"demonstrations.{name}: the expert failed {params.demonstrate.attempts} times at {slots[0]}; expected a success within that many"
    )


def _attempt(
    params: Params,
    name: str,
    environment: EnvironmentParams,
    slots: list[Slot],
    attempt: int,
    host: Host,
    tally: Tally,
) -> Iterator[tuple[Slot, Episode]]:
    jobs = {}
    for task, slot in slots:
        index = derive(params.run.seed, "demonstrate", name, task, slot, attempt)
        jobs[Job(Placement(task, "training", index), slot, derive(index, "noise"))] = (task, slot)
    found = {(job.placement, job.member): slot for job, slot in jobs.items()}
    for episode in demonstrate(
        jobs, environment, params.demonstrate, PoolSettings(host.workers, host.timeout_s), tally
    ):
        yield found[episode.placement, episode.member], episode
