"""A study's table: one row per evaluated episode, and one per iteration.

All results of a study are computed from these rows.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from vla_opd.analysis.finished_run import Evaluation, Iteration, Reinforcement, Run
from vla_opd.artifacts.manifest import Manifest
from vla_opd.data.divergence import DivergenceMeans
from vla_opd.params.stages import INITIAL_STUDENT


class Cost(BaseModel):
    """What all iterations of an arm up to a checkpoint took.

    seconds: how long their stages took on the machine that ran them; None if that is not recorded.
    """

    model_config = ConfigDict(frozen=True)
    iterations: int = 0
    episodes: int = 0
    optimizer_steps: int = 0
    env_steps: int = 0
    teacher_queries: int = 0
    seconds: float | None = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        totals: dict[str, float | None] = {}
        for name in Cost.model_fields:
            amounts = [getattr(self, name), getattr(other, name)]
            totals[name] = _total(amounts)
        return Cost.model_validate(totals)


def _total(amounts: Sequence[float | None]) -> float | None:
    """Return the sum; None if an amount is unknown."""
    total = 0
    for amount in amounts:
        if amount is None:
            return None
        total += amount
    return total


class EpisodeRow(Cost):
    """One episode of an evaluation, with the costs of its checkpoint.

    arm, seed: None for student and teacher, which all members share. Their costs are those of
               making them from scratch; the costs of an arm begin at the student.
    seen:      whether the run trains on the task.
    steps:     the control step of the first success, or the horizon.
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
    """One iteration, with its own costs.

    position: its number in the arm, from 1.
    success:  the success rate of its rollouts, which are sampled and before its update.
    groups, useful_groups: GRPO's groups, and how many of them can be learned from.
    *_before, *_after: `vla_opd.data.divergence.DivergenceMeans` before and after the update, on the
              iteration's states; of the student alone if a scripted expert labelled them.
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
        """The arms in the order of the rows."""
        arms = [row.arm for row in self.episodes if row.arm is not None]
        return tuple(dict.fromkeys(arms))

    def select(self, arm: str, seed: int) -> "Table":
        """Return the rows of one member."""

        def is_of_member(row: EpisodeRow | UpdateRow) -> bool:
            return row.arm == arm and row.seed == seed

        return Table(
            tuple(filter(is_of_member, self.episodes)),
            tuple(filter(is_of_member, self.updates)),
        )

    def with_shared(self, episodes: Iterable[EpisodeRow]) -> "Table":
        """Return the table with episodes that belong to no arm in front."""
        return Table((*episodes, *self.episodes), self.updates)


def concatenate(tables: Iterable[Table]) -> Table:
    """Return all rows of several tables, in order."""
    episodes: list[EpisodeRow] = []
    updates: list[UpdateRow] = []
    for table in tables:
        episodes += table.episodes
        updates += table.updates
    return Table(tuple(episodes), tuple(updates))


# From the artifacts of a run


def member_rows(
    run: Run, arm: str, seed: int, seconds: Mapping[str, float], *, own_student: bool = False
) -> Table:
    """Return the rows of one member.

    seconds:     how long it took to make an artifact, by its digest.
    own_student: whether the member starts from a student of its own, which adds to its costs.
    """
    start = Cost()
    if own_student:
        steps = run.params.finetuned[INITIAL_STUDENT].steps
        start = Cost(
            optimizer_steps=steps,
            seconds=seconds.get(run.checkpoints[INITIAL_STUDENT].digest),
        )
    costs = {INITIAL_STUDENT: start}
    updates: list[UpdateRow] = []
    for position, update in enumerate(run.updates, 1):
        name = update.result.name
        cost = _update_cost(update, seconds)
        costs[name] = costs[run.params.updates[name]] + cost
        metrics = _metrics(update, scripted=run.params.label.expert is not None)
        updates.append(
            UpdateRow(
                **cost.model_dump(),
                **metrics,
                arm=arm,
                seed=seed,
                iteration=name,
                position=position,
                success=update.result.success,
                digest=update.artifacts["checkpoints"].digest,
            )
        )
    episodes: list[EpisodeRow] = []
    for evaluation in run.evaluations.values():
        checkpoint = evaluation.checkpoint
        if checkpoint in run.params.updates or (own_student and checkpoint == INITIAL_STUDENT):
            episodes += _episode_rows(evaluation, costs[checkpoint], arm, seed)
    return Table(tuple(episodes), tuple(updates))


def shared_rows(run: Run, seconds: Mapping[str, float]) -> tuple[EpisodeRow, ...]:
    """Return the episodes of what all members share, with the costs of making it from scratch.

    seconds: as in `member_rows`.
    """
    rows: list[EpisodeRow] = []
    for evaluation in run.evaluations.values():
        cost = cost_from_scratch(run, evaluation.checkpoint, seconds)
        rows += _episode_rows(evaluation, cost, None, None)
    return tuple(rows)


def cost_from_scratch(run: Run, name: str, seconds: Mapping[str, float]) -> Cost:
    """Return what a fine-tuned checkpoint and everything that it came from took.

    Every set of demonstrations counts once. Nothing is known of adopted checkpoints. Control steps
    of an expert are estimated: states of its successes times `demonstrate.observe_every`.
    """
    trained = run.params.trained
    steps = 0
    digests: list[str] = []
    sets = dict[str, Manifest]()  # by demonstrations: the checkpoint that used most of them
    while name in trained:
        settings = trained[name]
        manifest = run.checkpoints[name]
        steps += settings.steps
        digests.append(manifest.digest)
        demonstrations = manifest.parents["demonstrations"]
        largest = sets.get(demonstrations, manifest)
        if manifest.facts["states"] > largest.facts["states"]:
            largest = manifest
        sets[demonstrations] = largest
        name = getattr(settings, "parent", "")
    states = sum(manifest.facts["states"] for manifest in sets.values())
    episodes = sum(manifest.facts["episodes"] for manifest in sets.values())
    return Cost(
        episodes=episodes,
        optimizer_steps=steps,
        env_steps=states * run.params.demonstrate.observe_every,
        seconds=_total([seconds.get(digest) for digest in (*sets, *digests)]),
    )


def _update_cost(update: Iteration | Reinforcement, seconds: Mapping[str, float]) -> Cost:
    queries = 0
    if isinstance(update, Iteration):
        queries = update.result.teacher_queries
    manifests = update.artifacts.values()
    return Cost(
        iterations=1,
        episodes=update.result.episodes,
        optimizer_steps=len(update.steps),
        env_steps=update.result.env_steps,
        teacher_queries=queries,
        seconds=_total([seconds.get(manifest.digest) for manifest in manifests]),
    )


def _metrics(update: Iteration | Reinforcement, *, scripted: bool) -> dict[str, Any]:
    """Return the columns that depend on the kind of iteration.

    scripted: whether an expert labelled. Divergences from its labels are left out, since they
    cannot be compared between arms.
    """
    metrics: dict[str, Any] = {
        "student_entropy_before": update.result.before.student_entropy,
        "student_entropy_after": update.result.after.student_entropy,
    }
    if isinstance(update, Reinforcement):
        metrics["kind"] = "reinforce"
        metrics["groups"] = update.result.groups
        metrics["useful_groups"] = update.result.useful_groups
        return metrics
    metrics["kind"] = "distill"
    metrics["failed_share"] = update.result.failed_share
    metrics["recoverable"] = update.result.recoverable
    if not scripted:
        for name in DivergenceMeans.model_fields:
            metrics[f"{name}_before"] = getattr(update.before, name)
            metrics[f"{name}_after"] = getattr(update.after, name)
    return metrics


def _episode_rows(
    evaluation: Evaluation, cost: Cost, arm: str | None, seed: int | None
) -> Iterator[EpisodeRow]:
    outcomes = [(record, True) for record in evaluation.records]
    outcomes += [(record, False) for record in evaluation.unseen]
    for record, seen in outcomes:
        yield EpisodeRow(
            **cost.model_dump(),
            arm=arm,
            seed=seed,
            evaluation=evaluation.name,
            checkpoint=evaluation.checkpoint,
            horizon=evaluation.facts.horizon,
            task=record.task,
            seen=seen,
            state=record.state,
            success=record.success,
            steps=record.steps,
            digest=evaluation.manifest.digest,
        )


# On disk, as Parquet

TYPES = {str: "VARCHAR", int: "BIGINT", float: "DOUBLE", bool: "BOOLEAN"}


def write(table: Table, folder: Path) -> None:
    """Write `episodes.parquet` and `updates.parquet`."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_rows(table.episodes, EpisodeRow, folder)
    _write_rows(table.updates, UpdateRow, folder)


def read(folder: Path) -> Table:
    """Read a table. ValueError if a file is missing, or is not a study's."""
    return Table(_read_rows(EpisodeRow, folder), _read_rows(UpdateRow, folder))


def _write_rows(rows: Iterable[BaseModel], kind: type[BaseModel], folder: Path) -> None:
    import duckdb  # slow to import

    columns: dict[str, str] = {}
    for name, field in kind.model_fields.items():
        columns[name] = _column_type(field.annotation)
    target = folder / FILES[kind]
    with (
        TemporaryDirectory(dir=folder, prefix=".tmp-rows-") as temporary,
        duckdb.connect(":memory:") as database,
    ):
        source = Path(temporary) / "rows.jsonl"
        with source.open("w") as stream:
            stream.writelines(json.dumps(row.model_dump()) + "\n" for row in rows)
        relation = database.read_json(
            str(source),
            columns=columns,
            format="newline_delimited",
        )
        relation.write_parquet(str(target), compression="zstd")


def _column_type(annotation: Any) -> str:
    options = (annotation, *getattr(annotation, "__args__", ()))
    for kind, column_type in TYPES.items():
        if kind in options:
            return column_type
    return "VARCHAR"


def _read_rows(kind: type[Row], folder: Path) -> tuple[Row, ...]:
    import duckdb  # slow to import

    path = folder / FILES[kind]
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; expected a study's table (opd study NAME makes it)"
        )
    with duckdb.connect(":memory:") as database:
        relation = database.read_parquet(str(path))
        names = relation.columns
        rows = [dict(zip(names, values, strict=True)) for values in relation.fetchall()]
    return tuple(kind.model_validate(row) for row in rows)
