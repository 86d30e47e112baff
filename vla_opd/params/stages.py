"""The sections of `params.yaml` that belong to one stage each, and those that several stages read."""

from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from vla_opd.params.objective import ClipParams, GroupParams
from vla_opd.params.section import (
    EVALUATION_STATES,
    Fraction,
    Name,
    Names,
    Rates,
    Section,
    is_default,
)
from vla_opd.params.training import TrainedParams, UpdateParams

START = "student"
"""The checkpoint that the run begins with. The arms of a study start from it, and `optimize.anchor` holds on to it."""


def _plain_path(path: str) -> str:
    if path.startswith("~") or "$" in path:
        raise PydanticCustomError(
            "path",
            "expected a plain path: neither ~ nor $VARIABLE is expanded, by DVC or by a stage",
        )
    return path


class RunParams(Section):
    """What the whole run shares.

    name:          the folder under `artifacts/`.
    seed:          the root of the seeds of demonstrations, fine-tuning and evaluation.
    learning_seed: the root of the seeds of the iterations: of their rollouts and their updates. With another one the same students learn from the
                   same teacher again, on other placements and by other draws.
    """

    name: Name
    seed: int = Field(default=0, ge=0)
    learning_seed: int = Field(default=0, ge=0)


class EnvironmentParams(Section):
    """The simulator, and how its pictures are made.

    family:        a key of `vla_opd.envs.ENVS`, or `"package.module:function"`.
    tasks:         the tasks that the student is to learn.
    cameras:       names of the family's cameras, in the order in which the policy sees them.
    image_size:    height and width of a frame in pixels, as rendered.
    settle:        no-op control steps before the first decision (objects start in mid-air).
    stepping:      `exact` is bit-identical to the stock environment; `fast` saves redundant work and is named in every manifest.
    render:        `exact` gives the stock pictures; `fast` gives simpler ones, for policies trained with them.
    wording:       of LIBERO's instructions: `bddl` as in the task's file ("pick the akita black bowl ..."), `benchmark` as in the task's name
                   ("pick up the black bowl ..."), by which the public checkpoints were trained.
    """

    family: str = "libero"
    tasks: Names = Field(min_length=1)
    cameras: Names = Field(default=("agentview",), min_length=1)
    image_size: int = Field(default=128, ge=16, le=1024)
    settle: int = Field(default=10, ge=0)
    stepping: Literal["exact", "fast"] = "fast"
    render: Literal["exact", "fast"] = "fast"
    wording: Literal["bddl", "benchmark"] = Field(default="bddl", exclude_if=is_default("bddl"))


class DemonstrateParams(Section):
    """Scripted demonstrations on seeded placements (never the benchmark's fixed initial states).

    noise:         standard deviation of the Gaussian added to the executed xyz action (the label stays the expert's own action).
    burst:         probability that an episode has bursts: a few random actions in a row, so that recoveries are shown.
    observe_every: a frame is kept every that many control steps.
    """

    expert: str = "libero"
    noise: float = Field(default=0.15, ge=0)
    burst: Fraction = 0.5
    observe_every: int = Field(default=2, ge=1)
    horizon: int = Field(default=300, ge=1)
    attempts: int = Field(
        default=3, ge=1, description="placements tried per demonstration wanted before giving up"
    )


class DemonstrationSet(Section):
    """One set of demonstrations: `episodes` successful ones for each of `tasks` (the run's own tasks if none are named)."""

    tasks: Names | None = None
    episodes: int = Field(ge=1)


class PolicyParams(Section):
    """The architecture of a policy trained from scratch; a policy with a parent has its parent's.

    chunk:   actions predicted at once, and executed open loop.
    bins:    V, tokens per action dimension, over [-1, 1] of the normalised action.
    crop:    height and width of the centre crop that the policy sees, in pixels of the rendered frame.
    proprio: whether the policy sees proprioception (OpenVLA-OFT's LIBERO students do not).
    """

    family: str = "tiny"
    chunk: int = Field(default=8, ge=1)
    bins: int = Field(default=256, ge=2, le=256)
    crop: int = Field(default=96, ge=16)
    proprio: bool = True
    width: int = Field(default=128, ge=16, le=2048)
    layers: int = Field(default=2, ge=1, le=32)
    heads: int = Field(default=4, ge=1, le=64)
    channels: int = Field(default=32, ge=8, le=512, multiple_of=8)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "PolicyParams":
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width is {self.width} and heads is {self.heads}; expected width to be a multiple of 2 * heads (rotary embedding)"
            )
        return self


class FinetuneParams(TrainedParams):
    """Supervised training on demonstrations, eq. (1): AdamW, linear warm-up, cosine decay to `final_fraction` of the peak.

    smoothing: standard deviation, in bins, of the Gaussian that the target bin is spread over (0: plain cross-entropy).
    """

    batch_size: int = Field(default=64, ge=1)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_fraction: Fraction = 0.05
    final_fraction: Fraction = 0.0
    smoothing: float = Field(default=1.5, ge=0)
    gradient_clip: float = Field(default=1.0, gt=0)
    save_every: int = Field(default=100, ge=1, description="steps between resumable saves")
    threads: int = Field(
        default=2,
        ge=1,
        description="CPU threads of the optimiser; the last bits of the weights depend on it",
    )


class PretrainedParams(Section):
    """One checkpoint made by `finetune` from nothing: from which demonstrations, how many per task, for how long."""

    demonstrations: Name
    per_task: int | None = Field(
        default=None, ge=1, description="demonstrations per task; all of them if null"
    )
    steps: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    seed: int | None = Field(
        default=None,
        ge=0,
        exclude_if=is_default(None),
        description="of its first weights and its order; run.seed if null",
    )


class FinetunedParams(PretrainedParams):
    """One checkpoint made by `finetune` from another, its parent.

    action_statistics (q01, q99) and the vocabulary come from the parent: a token then means the same action in both.
    """

    parent: Name


class Variant(NamedTuple):
    """Whose action statistics a public checkpoint has, and what share of a picture's area it sees."""

    unnorm_key: str | None
    crop: float


SUITES = {
    "-spatial": "libero_spatial",
    "-object": "libero_object",
    "-goal": "libero_goal",
    "10": "libero_10",
}
KNOWN = {
    f"Haozhan72/Openvla-oft-SFT-libero{suite}-{demonstrations}": Variant(f"{name}_no_noops", 0.9)
    for suite, name in SUITES.items()
    for demonstrations in ("traj1", "trajall")
}
"""Public checkpoints by the names under which they are published: with which statistics and which pictures SimpleVLA-RL's scripts run them."""


class AdoptParams(Section):
    """One checkpoint made of a public one, OpenVLA-OFT with discrete tokens. See docs/policies.md.

    folder:     where its files are: `config.json`, `dataset_statistics.json`, `model*.safetensors`, `tokenizer.json` and so on.
    known:      the name under which it is published, a key of `KNOWN`, which then says the next two. A folder's name says nothing.
    unnorm_key: whose action statistics it has; may be left out where there is only one.
    crop:       share of a picture's area that it sees, from the centre: 1 if it was trained without random crops. No file says it.
    dtype:      in which its weights are stored here and computed with.
    """

    folder: Annotated[str, AfterValidator(_plain_path)] = Field(min_length=1)
    known: str | None = Field(default=None, exclude_if=is_default(None))
    unnorm_key: str | None = None
    crop: float = Field(default=0.9, gt=0, le=1)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    @model_validator(mode="after")
    def _as_its_name_says(self) -> "AdoptParams":
        if self.known is not None and self.known not in KNOWN:
            raise ValueError(
                f"known is {self.known!r}; expected one of {sorted(KNOWN)}, or unnorm_key and crop in its place"
            )
        for field, (said, known) in {
            "unnorm_key": (self.unnorm_key, self.variant.unnorm_key),
            "crop": (self.crop, self.variant.crop),
        }.items():
            if field in self.model_fields_set and said not in (None, known):
                raise ValueError(
                    f"{field} is {said!r}; expected {known!r}, by which {self.known} was trained, or nothing"
                )
        return self

    @property
    def variant(self) -> Variant:
        """By the name, if there is one, and as it is said otherwise."""
        return Variant(self.unnorm_key, self.crop) if self.known is None else KNOWN[self.known]


class SampleParams(Section):
    """Student rollouts, eq. (3): `prompts` placements per task and iteration, G = `group` episodes from each.

    visited_by:      who acts. `teacher` is the control of on-policy learning: as many episodes and updates, but the states that the teacher visits.
    observe_every:   states are kept every that many control steps; below the chunk length the states inside a chunk are labelled too.
    inference_batch: rows of every forward pass (padded), so that a sampled token never depends on who else was ready.
    """

    prompts: int = Field(default=1, ge=1)
    group: int = Field(default=6, ge=1)
    temperature: float = Field(default=0.6, gt=0)
    horizon: int = Field(default=150, ge=1)
    observe_every: int = Field(default=2, ge=1)
    inference_batch: int = Field(default=1, ge=1)
    visited_by: Literal["student", "teacher"] = "student"
    protocol: Literal["held-out", "benchmark"] = Field(
        default="held-out",
        description="benchmark trains on the evaluation's own initial states: leakage, for comparison only",
    )


class LabelParams(Section):
    """Teacher log-probabilities, eq. (4), of all V bins at every kept state, stored as float16 or float32.

    expert:        is asked in the teacher's place, as `demonstrate.expert` is: DAgger's oracle. It acts for a chunk from every kept state, in a
                   simulator that is led there again; its bins are spread by a Gaussian of standard deviation `smoothing`, in bins.
    recover_every: in episodes that failed, the teacher takes over at every so manieth decision, for `sample.horizon` control steps: whether it still
                   succeeds is stored beside the labels.
    transfer:      the teacher's action statistics may be others than the student's: `optimize` shares out its probabilities over the student's bins
                   by the overlap of their intervals (vla_opd/learning/bin_transfer.py). Otherwise such a teacher is refused.
    """

    teacher: Name = "teacher"
    expert: str | None = None
    smoothing: float = Field(default=1.5, ge=0.01)
    recover_every: int | None = Field(default=None, ge=1)
    transfer: bool = False
    batch_size: int = Field(default=64, ge=1)
    dtype: Literal["float16", "float32"] = "float16"
    threads: int = Field(
        default=2, ge=1, description="CPU threads; the last bits of a logit depend on it"
    )

    @property
    def simulates(self) -> bool:
        """Whether simulators are needed to label."""
        return self.expert is not None or self.recover_every is not None


class ExploreParams(GroupParams):
    """Student rollouts for GRPO: like `sample`, hotter and in larger groups, of which only the decisions are kept.

    prompts, group: placements per task, and G episodes from each.
    rounds: as long as fewer than `prompts` groups a task, over all tasks together, are ones to learn from, more placements are tried, in at most so
            many rounds (dynamic sampling).
    """

    prompts: int = Field(default=1, ge=1)
    group: int = Field(default=8, ge=2)
    temperature: float = Field(default=1.6, gt=0)
    horizon: int = Field(default=150, ge=1)
    inference_batch: int = Field(default=1, ge=1)
    rounds: int = Field(default=1, ge=1)


class ReinforceParams(UpdateParams, ClipParams):
    """Eq. (2), GRPO: the student's update towards its own successes, without a teacher. Its budget and its schedule are its own."""

    steps: int = Field(default=20, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)


class EvaluateParams(Section):
    """Greedy rollouts from the benchmark's fixed initial states `first_state ... first_state + episodes - 1` of every task.

    unseen: tasks that the run doesn't train on, scored besides and apart: what the student could do before, and may forget.
    decide: stop as soon as the episodes decide between two success rates, at `confidence`; tasks then take turns, state by state. That takes about
            half of the episodes, but the success of those is no fair estimate of the rate, and no pair for another evaluation's.
    """

    unseen: Names | None = None
    decide: Rates | None = None
    episodes: int = Field(default=10, ge=1)
    first_state: int = Field(default=0, ge=0)
    horizon: int = Field(default=280, ge=1)
    inference_batch: int = Field(default=1, ge=1)
    confidence: float = Field(default=0.95, gt=0, lt=1)
    allow_mismatch: bool = Field(
        default=False,
        description="evaluate under another stepping, render or camera setting than trained with",
    )

    @model_validator(mode="after")
    def _decides_one_thing(self) -> "EvaluateParams":
        if self.decide is not None and (self.unseen or self.confidence <= 0.5):
            raise ValueError(
                f"decide is set, unseen is {self.unseen} and confidence is {self.confidence}; expected no unseen tasks, and a confidence above 0.5"
            )
        return self

    @model_validator(mode="after")
    def _states_exist(self) -> "EvaluateParams":
        if self.first_state + self.episodes > EVALUATION_STATES:
            raise ValueError(
                f"first_state is {self.first_state} and episodes is {self.episodes}; expected first_state + episodes to be at most "
                f"{EVALUATION_STATES}: a task has the initial states 0 ... {EVALUATION_STATES - 1}"
            )
        return self


class ReportParams(Section):
    """The HTML page. `start`, `final` and `teacher` name the evaluations that the summary compares."""

    start: Name = "start"
    final: Name = "final"
    teacher: Name = "teacher"
