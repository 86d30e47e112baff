"""Sets of demonstrations: successful episodes of a scripted expert, a slot at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from vla_opd.artifacts.draft import Draft
from vla_opd.artifacts.progress import ProgressBar
from vla_opd.data.trajectory import Episode, write_shard
from vla_opd.envs.protocol import Placement
from vla_opd.params.stages import DemonstrateParams, EnvironmentParams
from vla_opd.seeds import derive
from vla_opd.simulation.demonstrate import demonstrate
from vla_opd.simulation.jobs import Job
from vla_opd.simulation.pool import PoolSettings, SimulationStats

Slot = tuple[str, int]  # a task, and the number of one of its demonstrations


@dataclass(frozen=True)
class Demonstrator:
    """Makes the set with a name. seed: of all placements and noise."""

    settings: DemonstrateParams
    environment: EnvironmentParams
    seed: int
    name: str
    pool: PoolSettings
    stats: SimulationStats

    def write_missing(self, work: Draft, shards: Mapping[str, list[Slot]], chunk: int) -> int:
        """Write the missing shards, each once all its slots succeeded. Returns failed episodes."""
        missing = {shard: shards[shard] for shard in work.missing(shards)}
        slots = list(chain.from_iterable(missing.values()))
        total = sum(map(len, shards.values()))
        successes: dict[Slot, Episode] = {}
        failures = 0
        progress = ProgressBar(
            None,
            f"demonstrate {self.name}",
            scratch=work.scratch,
            total=total,
            initial=total - len(slots),
            unit="episode",
        )
        with progress:
            for slot, episode in self._until_successful(slots):
                work.record_made_with(self.stats.environment)
                if not episode.success:
                    failures += 1
                    continue
                successes[slot] = episode
                progress.update()
                for shard in _complete(missing, successes):
                    episodes = [successes.pop(member) for member in missing.pop(shard)]
                    with work.part(shard) as path:
                        write_shard(path, episodes, chunk)
        return failures

    def _until_successful(self, slots: list[Slot]) -> Iterator[tuple[Slot, Episode]]:
        """Yield episodes until every slot has a success; after a failure, at the next placement.

        RuntimeError after `attempts` failures in one slot.
        """
        attempts = self.settings.attempts
        for attempt in range(attempts):
            failed: list[Slot] = []
            for slot, episode in self._attempt(slots, attempt):
                if not episode.success:
                    failed.append(slot)
                yield slot, episode
            slots = sorted(failed)
            if not slots:
                return
        raise RuntimeError(
            f"demonstrations.{self.name}: the expert failed {attempts} times at {slots[0]}; "
            "expected a success within that many attempts"
        )

    def _attempt(self, slots: list[Slot], attempt: int) -> Iterator[tuple[Slot, Episode]]:
        """Yield an episode per slot, whose number is the episode's member."""
        jobs: list[Job] = []
        for task, number in slots:
            index = derive(self.seed, "demonstrate", self.name, task, number, attempt)
            job = Job(
                placement=Placement(task, "training", index),
                member=number,
                seed=derive(index, "noise"),
            )
            jobs.append(job)
        episodes = demonstrate(
            jobs,
            self.environment,
            self.settings,
            self.pool,
            self.stats,
        )
        for episode in episodes:
            task = episode.placement.task
            yield (task, episode.member), episode


def _complete(missing: Mapping[str, list[Slot]], successes: Mapping[Slot, Episode]) -> list[str]:
    return [shard for shard, slots in missing.items() if successes.keys() >= set(slots)]
