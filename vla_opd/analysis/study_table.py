"""A study's table: a row for every episode that a checkpoint was scored on, and one for every iteration.

Everything else that is said of a study is computed from these rows.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from vla_opd.analysis.finished_run import Evaluation, Iteration, Reinforcement, Run
from vla_opd.artifacts.manifest import Manifest
from vla_opd.data.divergence import Means
from vla_opd.params.stages import START


class Cost(BaseModel):
    """What it took to come so far: all iterations of the arm up to here.

    seconds: of the stages that made them, on the machine that ran them; None if that isn't known.
    """

    model_config = ConfigDict(frozen=True)
    iterations: int = 0
    episodes: int = 0
    optimizer_steps: int = 0
    env_steps: int = 0
    teacher_queries: int = 0
    seconds: float | None = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            iterations=self.iterations + other.iterations,
            episodes=self.episodes + other.episodes,
            optimizer_steps=self.optimizer_steps + other.optimizer_steps,
            env_steps=self.env_steps + other.env_steps,
            teacher_queries=self.teacher_queries + other.teacher_queries,
            seconds=None
            if self.seconds is None or other.seconds is None
            else self.seconds + other.seconds,
        )


class EpisodeRow(Cost):
    """One episode of one evaluation; the costs are those of its checkpoint. arm and seed are None for what all members share: student and teacher,
    whose costs are those of making them from nothing; an arm's begin at the student.

    seen:  whether the task is one that the run trains on.
    steps: the control step of the first success, or the horizon.
    """

    arm: str | None
    seed: int | None
    evaluation: str
    checkpoint: str
    horizon: int
    task: str
    seen: bool
    state: int
    success: bool
    steps: int
    digest: str


class UpdateRow(Cost):
    """One iteration; the costs are its own. position: it is the arm's so manieth, from 1.

    success: of its rollouts, sampled and before its update. Of `groups`, `useful_groups` are those that GRPO learns from.
    `*_before` and `*_after`: what `vla_opd.data.divergence.Means` says of the student before and after the update, on the iteration's states; where a
    scripted expert labelled, of the student alone.
    """

    arm: str
    seed: int
    iteration: str
    kind: Literal["distill", "reinforce"]
    position: int
    success: float
    failed_share: float | None = None
    recoverable: float | None = None
    groups: int | None = None
    useful_groups: int | None = None
    reverse_kl_before: float | None = None
    reverse_kl_after: float | None = None
    forward_kl_before: float | None = None
    forward_kl_after: float | None = None
    student_entropy_before: float
    student_entropy_after: float
    teacher_entropy_before: float | None = None
    teacher_entropy_after: float | None = None
    teacher_rank_before: float | None = None
    teacher_rank_after: float | None = None
    top_overlap_before: float | None = None
    top_overlap_after: float | None = None
    digest: str


Row = TypeVar("Row", EpisodeRow, UpdateRow)
FILES: Mapping[type[BaseModel], str] = {
    EpisodeRow: "episodes.parquet",
    UpdateRow: "updates.parquet",
}


@dataclass(frozen=True)
class Table:
    """The rows of a study, or of one member of it."""

    episodes: tuple[EpisodeRow, ...]
    updates: tuple[UpdateRow, ...]

    @property
    def arms(self) -> tuple[str, ...]:
        """In the order of the rows."""
        return tuple(dict.fromkeys(row.arm for row in self.episodes if row.arm is not None))

    def of(self, arm: str, seed: int) -> "Table":
        """The rows of one member."""
        episodes = tuple(row for row in self.episodes if (row.arm, row.seed) == (arm, seed))
        return Table(
            episodes, tuple(row for row in self.updates if (row.arm, row.seed) == (arm, seed))
        )

    def with_shared(self, episodes: Iterable[EpisodeRow]) -> "Table":
        """With episodes that belong to no arm before all others."""
        return Table((*episodes, *self.episodes), self.updates)


def member_rows(
    run: Run, arm: str, seed: int, seconds: Mapping[str, float], *, own_student: bool = False
) -> Table:
    """The rows of one member.

    seconds:     by the digest of the artifact whose making took them.
    own_student: it starts from a student that the others don't have, whose making belongs to its cost.
    """
    made = run.checkpoints[START].digest
    start = (
        Cost(optimizer_steps=run.params.finetuned[START].steps, seconds=seconds.get(made))
        if own_student
        else Cost()
    )
    updates, behind = list[UpdateRow](), {START: start}
    for position, one in enumerate(run.updates, 1):
        its = Cost(
            iterations=1,
            episodes=one.result.episodes,
            optimizer_steps=len(one.steps),
            env_steps=one.result.env_steps,
            teacher_queries=one.result.teacher_queries if isinstance(one, Iteration) else 0,
            seconds=_took(one, seconds),
        )
        behind[one.result.name] = behind[run.params.updates[one.result.name]] + its
        updates.append(
            _update(one, its, arm, seed, position, of_teacher=run.params.label.expert is None)
        )
    own = [
        one
        for one in run.evaluations.values()
        if one.checkpoint in run.params.updates or (own_student and one.checkpoint == START)
    ]
    rows = [row for one in own for row in _episodes(one, behind[one.checkpoint], arm, seed)]
    return Table(tuple(rows), tuple(updates))


def shared_rows(run: Run, seconds: Mapping[str, float]) -> tuple[EpisodeRow, ...]:
    """The episodes of what all members share, with what it took to make each from nothing. seconds: as in `member_rows`."""
    return tuple(
        row
        for one in run.evaluations.values()
        for row in _episodes(one, made_from_nothing(run, one.checkpoint, seconds), None, None)
    )


def made_from_nothing(run: Run, name: str, seconds: Mapping[str, float]) -> Cost:
    """What a checkpoint took that no iteration makes, and all that it comes from: each set of demonstrations once. Nothing is known of adopted ones.

    An expert's control steps are counted by the states that were kept, `demonstrate.observe_every` apart, of its successes.
    """
    steps, digests, sets, trained = 0, list[str](), dict[str, Manifest](), run.params.trained
    while (its := trained.get(name)) is not None:
        made = run.checkpoints[name]
        steps, digests = steps + its.steps, [*digests, made.digest]
        known = sets.setdefault(made.parents["demonstrations"], made)
        sets[made.parents["demonstrations"]] = max(known, made, key=lambda one: one.facts["states"])
        name = getattr(its, "parent", "")
    took = [seconds.get(digest) for digest in (*sets, *digests)]
    return Cost(
        episodes=sum(one.facts["episodes"] for one in sets.values()),
        optimizer_steps=steps,
        env_steps=sum(one.facts["states"] for one in sets.values())
        * run.params.demonstrate.observe_every,
        seconds=_all(took),
    )


def _took(one: Iteration | Reinforcement, seconds: Mapping[str, float]) -> float | None:
    return _all([seconds.get(manifest.digest) for manifest in one.made.values()])


def _all(seconds: Sequence[float | None]) -> float | None:
    """Their sum; None if one of them isn't known."""
    return None if None in seconds else sum(value for value in seconds if value is not None)


def _update(
    one: Iteration | Reinforcement,
    its: Cost,
    arm: str,
    seed: int,
    position: int,
    *,
    of_teacher: bool,
) -> UpdateRow:
    """of_teacher: the labels were the teacher's, so that distances to them can be compared between arms."""
    result = one.result
    more: dict[str, Any] = {
        "student_entropy_before": result.before.student_entropy,
        "student_entropy_after": result.after.student_entropy,
    }
    if isinstance(one, Iteration):
        for when, means in (("before", one.before), ("after", one.after)) if of_teacher else ():
            more |= {f"{name}_{when}": getattr(means, name) for name in Means.model_fields}
        more |= {"failed_share": one.result.failed_share, "recoverable": one.result.recoverable}
    else:
        more |= {"groups": one.result.groups, "useful_groups": one.result.useful_groups}
    return UpdateRow(
        **its.model_dump(),
        **more,
        arm=arm,
        seed=seed,
        iteration=result.name,
        kind="distill" if isinstance(one, Iteration) else "reinforce",
        position=position,
        success=result.success,
        digest=one.made["checkpoints"].digest,
    )


def _episodes(
    one: Evaluation, cost: Cost, arm: str | None, seed: int | None
) -> Iterator[EpisodeRow]:
    for record, seen in [
        *((record, True) for record in one.records),
        *((record, False) for record in one.unseen),
    ]:
        yield EpisodeRow(
            **cost.model_dump(),
            arm=arm,
            seed=seed,
            evaluation=one.name,
            checkpoint=one.checkpoint,
            horizon=one.facts.horizon,
            task=record.task,
            seen=seen,
            state=record.state,
            success=record.success,
            steps=record.steps,
            digest=one.manifest.digest,
        )


def joined(tables: Iterable[Table]) -> Table:
    """All rows of several tables, in order."""
    every = list(tables)
    return Table(
        tuple(chain.from_iterable(t.episodes for t in every)),
        tuple(chain.from_iterable(t.updates for t in every)),
    )


# On disk, as Parquet.

TYPES = {str: "VARCHAR", int: "BIGINT", float: "DOUBLE", bool: "BOOLEAN"}


def write(table: Table, folder: Path) -> None:
    """`episodes.parquet` and `updates.parquet`."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(table.episodes, EpisodeRow, folder)
    _write(table.updates, UpdateRow, folder)


def read(folder: Path) -> Table:
    """ValueError if the files are not there, or not a study's."""
    return Table(_read(EpisodeRow, folder), _read(UpdateRow, folder))


def _write(rows: Iterable[BaseModel], kind: type[BaseModel], folder: Path) -> None:
    import duckdb  # the command `opd` can do without

    columns = {name: _type(info.annotation) for name, info in kind.model_fields.items()}
    with (
        TemporaryDirectory(dir=folder, prefix=".tmp-rows-") as temporary,
        duckdb.connect(":memory:") as base,
    ):
        lines = Path(temporary) / "rows.jsonl"
        lines.write_text("".join(json.dumps(row.model_dump()) + "\n" for row in rows))
        source = base.read_json(str(lines), columns=columns, format="newline_delimited")
        source.write_parquet(str(folder / FILES[kind]), compression="zstd")


def _type(annotation: Any) -> str:
    named = [
        kind for kind in TYPES if kind is annotation or kind in getattr(annotation, "__args__", ())
    ]
    return TYPES[named[0]] if named else "VARCHAR"


def _read(kind: type[Row], folder: Path) -> tuple[Row, ...]:
    import duckdb  # as above

    path = folder / FILES[kind]
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; expected a study's table (opd study NAME makes it)"
        )
    with duckdb.connect(":memory:") as base:
        found = base.read_parquet(str(path))
        names = found.columns
        return tuple(
            kind.model_validate(dict(zip(names, row, strict=True))) for row in found.fetchall()
        )
