"""Greedy rollouts from an evaluation's initial states, with a journal to resume from."""

import sys
from collections.abc import Generator, Sequence
from contextlib import closing

from vla_opd.artifacts.draft import Draft
from vla_opd.artifacts.progress import ProgressBar
from vla_opd.data.records import Record, State, new_journal, read_journals
from vla_opd.data.trajectory import Episode
from vla_opd.envs.protocol import Placement
from vla_opd.machine.host import Host
from vla_opd.params.stages import EnvironmentParams, EvaluateParams
from vla_opd.policies.policy import Policy
from vla_opd.seeds import derive
from vla_opd.simulation.rollout import Job, PoolSettings, RolloutSettings, SimulationStats, rollout


def play_states(
    states: Sequence[State],
    policy: Policy,
    settings: EvaluateParams,
    environment: EnvironmentParams,
    work: Draft,
    host: Host,
    stats: SimulationStats,
) -> Generator[Record]:
    """Play one episode from each initial state, and yield its record as soon as it ends.

    Records in the draft's journals, of a killed run or of other shares, come first and are not
    played again. Close the generator to stop early.
    """
    journaled = read_journals(work.scratch)
    reused = [journaled[state] for state in states if state in journaled]
    if reused:
        print(
            f"{work.target.name}: reusing {len(reused)} of {len(states)} episodes", file=sys.stderr
        )
    yield from reused
    jobs = [_job(state) for state in states if state not in journaled]
    greedy = RolloutSettings(settings.horizon, None, None, settings.inference_batch)
    pool = PoolSettings(host.workers, host.timeout_s)
    episodes = rollout(policy, jobs, environment, greedy, pool, stats)
    progress = ProgressBar(
        episodes,
        "evaluate",
        scratch=work.scratch,
        total=len(states),
        initial=len(reused),
        unit="episode",
    )
    with new_journal(work.scratch).open("a") as journal, closing(episodes):
        for episode in progress:
            work.record_made_with(stats.environment)
            record = _record(episode)
            journal.write(record.to_line())
            journal.flush()
            yield record


def _job(state: State) -> Job:
    task, number = state
    return Job(Placement(task, "evaluation", number), 0, derive(task, number))


def _record(episode: Episode) -> Record:
    return Record(
        task=episode.placement.task,
        instruction=episode.instruction,
        state=episode.placement.index,
        success=episode.success,
        steps=episode.steps,
    )
