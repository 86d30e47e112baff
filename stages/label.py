"""label: teacher, trajectories -> logits, eq. (4): the teacher is asked at every kept state of the rollouts; or, for DAgger, the scripted expert."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from tqdm import tqdm

from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Manifest, open_artifact
from vla_opd.data.action_space import ActionSpace
from vla_opd.data.labels import Cost, Labels, normalised, read_outcome, spread, write_shard
from vla_opd.data.trajectory import in_batches, read_shard, read_states, shards
from vla_opd.experts import EXPERTS
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import track
from vla_opd.params.run import Params
from vla_opd.params.stages import EnvironmentParams, LabelParams
from vla_opd.plugins import named_function
from vla_opd.policies.checkpoint import open_checkpoint, require_environment
from vla_opd.policies.load import Policy, load_policy
from vla_opd.simulation.resume import Recorded, ask, take_over
from vla_opd.simulation.rollout import Job, PoolSettings, RolloutSettings, Tally, threads

Result = TypeVar("Result")


def run(
    params: Params, teacher: Path, trajectories: Path, out: Path, host: Host
) -> Manifest | None:
    """Store log p_T over all V bins, shard by shard. The store names the trajectories and the teacher's action space by digest.

    None once a share of the shards is made.
    """
    source, checkpoint = open_artifact(trajectories, "trajectories"), open_checkpoint(teacher)
    environment = EnvironmentParams.model_validate(source.params["environment"])
    require_environment(checkpoint.facts, environment, str(teacher))
    space = checkpoint.facts.action_space
    label = params.label
    if source.facts["action_space"] != space.digest and not label.transfer:
        raise ValueError(
            f"{trajectories}: the student's action space is {source.facts['action_space'][:12]}; expected the teacher's, {space.digest[:12]} "
            "(or label.transfer true)"
        )
    if label.expert is not None:
        named_function(label.expert, EXPERTS, "label.expert")
    settings = {"label": label.model_dump(), "device": host.device}
    parents = {"teacher": checkpoint.digest, "trajectories": source.digest}
    with (
        draft(out, "logits", parents, settings, host.share) as work,
        track(host, params.run.name, "label", out.name, settings) as log,
    ):
        torch.set_num_threads(label.threads)
        simulation = _Simulation(
            environment,
            source.params["sample"]["horizon"],
            PoolSettings(host.workers, host.timeout_s),
            Tally(),
        )
        asked = _Asked(label, load_policy(checkpoint, host.device), space, trajectories, simulation)
        names = [shard.name for shard in shards(trajectories)]
        missing = work.missing(names)
        found, wanted = asked.about(missing), len(host.share.of(names))
        for name, labels in tqdm(
            found,
            initial=wanted - len(missing),
            total=wanted,
            desc="label",
            unit="shard",
            mininterval=5,
        ):
            if simulation.tally.environment:
                work.remember(simulation.tally.environment)
            with work.part(name) as path:
                write_shard(path, labels)
            simulation.tally.states += len(labels.log_probs)
        if not host.share.whole:
            log(simulation.tally.as_metrics(), 0)
            return None
        facts = _facts([work.folder / name for name in names], int(source.facts["states"]))
        log({**facts, **simulation.tally.as_metrics()}, 0)
        return work.publish(
            {**facts, "action_space": space.model_dump(), "environment": environment.model_dump()}
        )


def _facts(paths: Sequence[Path], states: int) -> dict[str, float]:
    """What the labels cost, and from what share of the states the teacher still succeeds, if that was tried."""
    costs, recoverable = zip(*map(read_outcome, paths), strict=True)
    facts: dict[str, float] = {
        "teacher_queries": states + sum(one.decisions for one in costs),
        "env_steps": sum(one.env_steps for one in costs),
    }
    tried = [one for one in recoverable if one is not None]
    return facts | ({"recoverable": float(np.concatenate(tried).mean())} if tried else {})


@dataclass(frozen=True)
class _Simulation:
    """How the simulators are set up, where any are needed."""

    environment: EnvironmentParams
    horizon: int
    pool: PoolSettings
    tally: Tally


@dataclass(frozen=True)
class _Asked:
    """Whoever labels, and the rollouts that are labelled."""

    label: LabelParams
    teacher: Policy
    space: ActionSpace
    trajectories: Path
    simulation: _Simulation

    def about(self, names: Sequence[str]) -> Iterator[tuple[str, Labels]]:
        """The labels of some shards, as they are known."""
        if self.label.expert is not None:
            return self._by_expert(names, self.label.expert)
        if self.label.recover_every is not None:
            return self._recovered(names, self.label.recover_every)
        return ((name, Labels(self._log_probs(name))) for name in names)

    def _log_probs(self, name: str) -> Float[np.ndarray, "N K V"]:
        """The teacher's, of a shard. FloatingPointError at the first state whose label is not finite."""
        states, dtype = read_states([self.trajectories / name]), self.label.dtype
        if states.mask.shape[1] != self.space.tokens:
            raise ValueError(
                f"{self.trajectories / name}: has {states.mask.shape[1]} tokens a state; expected the teacher's {self.space.tokens}"
            )
        observations = states.observations
        batches = in_batches(np.arange(len(observations)), self.label.batch_size)
        with torch.inference_mode(), threads(self.label.threads):
            under_way = (
                normalised(self.teacher.logits(observations.at(rows)), dtype) for rows in batches
            )
            labels = np.concatenate([log_probs() for log_probs in _one_behind(under_way)])
        spoilt = np.flatnonzero(~np.isfinite(labels).all((1, 2)))
        if len(spoilt):
            raise FloatingPointError(
                f"the teacher's log-probabilities of {len(spoilt)} states of {name} are not finite in {dtype}, the first of them state "
                f"{spoilt[0]}; expected finite numbers (nothing of this shard is kept)"
            )
        return labels

    def _recovered(self, names: Sequence[str], every: int) -> Iterator[tuple[str, Labels]]:
        """The teacher's labels, and from which states it still succeeds, greedily."""
        recorded, its = self._recorded(names), self.simulation
        found = take_over(
            self.teacher,
            _all(recorded),
            its.environment,
            RolloutSettings(its.horizon, None),
            every,
            its.pool,
            its.tally,
        )
        for name, ones in _by_shard(recorded, found):
            cost = Cost(sum(one.env_steps for one in ones), sum(one.decisions for one in ones))
            yield (
                name,
                Labels(
                    self._log_probs(name),
                    np.concatenate([one.recoverable for one in ones]),
                    cost=cost,
                ),
            )

    def _by_expert(self, names: Sequence[str], expert: str) -> Iterator[tuple[str, Labels]]:
        """The expert's actions, as distributions around their bins."""
        recorded, its, space = self._recorded(names), self.simulation, self.space
        found = ask(_all(recorded), its.environment, expert, space.chunk, its.pool, its.tally)
        for name, ones in _by_shard(recorded, found):
            labels = spread(
                self.teacher.encode(np.concatenate([one.actions for one in ones])),
                space.bins,
                self.label.smoothing,
                self.label.dtype,
            )
            executed = np.concatenate([one.executed for one in ones])
            yield name, Labels(labels, given=executed, cost=Cost(env_steps=int(executed.sum())))

    def _recorded(self, names: Sequence[str]) -> dict[str, dict[Job, Recorded]]:
        """What leads to the states of some shards again."""
        return {
            name: {
                Job(e.placement, e.member, 0): Recorded(
                    e.placement, e.success, e.actions, e.step, e.proprio
                )
                for e in read_shard(path)
            }
            for name, path in ((name, self.trajectories / name) for name in names)
        }


def _one_behind(ones: Iterable[Result]) -> Iterator[Result]:
    """Each once the next has been asked for: a GPU computes that while the host has to do with this."""
    before = deque[Result]()
    for one in ones:
        before.append(one)
        if len(before) > 1:
            yield before.popleft()
    yield from before


def _all(recorded: Mapping[str, Mapping[Job, Recorded]]) -> dict[Job, Recorded]:
    return {job: one for episodes in recorded.values() for job, one in episodes.items()}


def _by_shard(
    recorded: Mapping[str, Mapping[Job, Recorded]], found: Iterable[tuple[Job, Result]]
) -> Iterator[tuple[str, list[Result]]]:
    """What was found of the episodes of each shard, in their order, as soon as it is all there."""
    home = {job: name for name, episodes in recorded.items() for job in episodes}
    arrived: dict[str, dict[Job, Result]] = {name: {} for name in recorded}
    for job, result in found:
        name = home[job]
        arrived[name][job] = result
        if len(arrived[name]) == len(recorded[name]):
            there = arrived.pop(name)
            yield name, [there[one] for one in recorded[name]]
