"""`params.yaml` as frozen models: one class per section. Parsed once, never edited afterwards.

Overrides are `section.key=value` on the same schema (`load("params.yaml", ["optimize.learning_rate=1e-4"])`); there is no second schema.
"""

import importlib
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

START = "student"
"""The checkpoint that the run begins with. The arms of a study start from it, and `optimize.anchor` holds on to it."""

EVALUATION_STATES = 50
"""Fixed initial states of a task, numbered from 0: both families have so many, and others are to have them too."""


SHORTER = reprlib.Repr()  # a few lines of YAML can name billions of values
SHORTER.maxstring = SHORTER.maxother = 200
SHORTER.maxlevel = 2


def _once_each(names: tuple[Any, ...]) -> tuple[Any, ...]:
    again = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if again:
        raise PydanticCustomError("duplicate", "expected each name once; {again} come again", {"again": str(again)})
    return names


def _is(default: Any) -> Callable[[Any], bool]:
    """Of a setting that came later: it is in no manifest as long as it is as if there were none, and digests stay as they were."""
    return lambda value: value == default


def _rising(rates: tuple[float, float]) -> tuple[float, float]:
    low, high = rates
    if not 0 < low < high < 1:
        raise PydanticCustomError("rates", "expected two success rates between 0 and 1, the lower one first")
    return rates


def _without_dots(name: str) -> str:
    """Of a name by which dvc.yaml finds its entry: at a dot it would look one level down."""
    if re.fullmatch(r"[A-Za-z0-9_-]+", name) is None:
        raise PydanticCustomError("name", "expected letters, digits, _ and - only: dvc.yaml can't name one with a dot")
    return name


def _plain_path(path: str) -> str:
    if path.startswith("~") or "$" in path:
        raise PydanticCustomError("path", "expected a plain path: neither ~ nor $VARIABLE is expanded, by DVC or by a stage")
    return path


Function = TypeVar("Function", bound=Callable[..., Any])
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9]"), AfterValidator(_without_dots)]
Rates = Annotated[tuple[float, float], AfterValidator(_rising)]
Names = Annotated[tuple[str, ...], AfterValidator(_once_each)]


class Section(BaseModel):
    """A section of `params.yaml`: immutable; an unknown key is an error, and so is a number that is infinite, NaN, or really a boolean."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:  # to Python, and so to pydantic, true is 1
            raise PydanticCustomError("boolean", "expected a number, not true or false")
        return value


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
    wording: Literal["bddl", "benchmark"] = Field(default="bddl", exclude_if=_is("bddl"))


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
    attempts: int = Field(default=3, ge=1, description="placements tried per demonstration wanted before giving up")


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
            raise ValueError(f"width is {self.width} and heads is {self.heads}; expected width to be a multiple of 2 * heads (rotary embedding)")
        return self


class Lora(NamedTuple):
    """A low-rank adapter: W x becomes W x + (alpha / rank) B A x."""

    rank: int
    alpha: int


class TrainedParams(Section):
    """What of a policy is trained, and how its gradient is computed.

    lora_rank, lora_alpha:  of an adapter on every linear layer but the head; all weights are trained if the rank is null. A checkpoint that has an
                            adapter goes on with it; with null it is merged first. OpenVLA-OFT's recipe has 32 and 16. `pretrained` checkpoints,
                            of which there are no weights yet, have none.
    gradient_checkpointing: transformer blocks are computed again for the gradient, which takes less memory, and a third more time.
    """

    lora_rank: int | None = Field(default=None, ge=1, exclude_if=_is(None))
    lora_alpha: int = Field(default=16, ge=1, exclude_if=_is(16))
    gradient_checkpointing: bool = Field(default=False, exclude_if=_is(False))

    @property
    def lora(self) -> Lora | None:
        """The adapter, if one is to be trained."""
        return None if self.lora_rank is None else Lora(self.lora_rank, self.lora_alpha)


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
    threads: int = Field(default=2, ge=1, description="CPU threads of the optimiser; the last bits of the weights depend on it")


class PretrainedParams(Section):
    """One checkpoint made by `finetune` from nothing: from which demonstrations, how many per task, for how long."""

    demonstrations: Name
    per_task: int | None = Field(default=None, ge=1, description="demonstrations per task; all of them if null")
    steps: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    seed: int | None = Field(default=None, ge=0, exclude_if=_is(None), description="of its first weights and its order; run.seed if null")


class FinetunedParams(PretrainedParams):
    """One checkpoint made by `finetune` from another, its parent.

    action_statistics (q01, q99) and the vocabulary come from the parent: a token then means the same action in both.
    """

    parent: Name


class Variant(NamedTuple):
    """Whose action statistics a public checkpoint has, and what share of a picture's area it sees."""

    unnorm_key: str | None
    crop: float


SUITES = {"-spatial": "libero_spatial", "-object": "libero_object", "-goal": "libero_goal", "10": "libero_10"}
KNOWN = {
    f"Haozhan72/Openvla-oft-SFT-libero{suite}-{demonstrations}": Variant(f"{name}_no_noops", 0.9)
    for suite, name in SUITES.items()
    for demonstrations in ("traj1", "trajall")
}
"""Public checkpoints by the names under which they are published: with which statistics and which pictures SimpleVLA-RL's scripts run them."""


class AdoptParams(Section):
    """One checkpoint made of a public one, OpenVLA-OFT with discrete tokens. See docs/openvla-oft.md.

    folder:     where its files are: `config.json`, `dataset_statistics.json`, `model*.safetensors`, `tokenizer.json` and so on.
    known:      the name under which it is published, a key of `KNOWN`, which then says the next two. A folder's name says nothing.
    unnorm_key: whose action statistics it has; may be left out where there is only one.
    crop:       share of a picture's area that it sees, from the centre: 1 if it was trained without random crops. No file says it.
    dtype:      in which its weights are stored here and computed with.
    """

    folder: Annotated[str, AfterValidator(_plain_path)] = Field(min_length=1)
    known: str | None = Field(default=None, exclude_if=_is(None))
    unnorm_key: str | None = None
    crop: float = Field(default=0.9, gt=0, le=1)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    @model_validator(mode="after")
    def _as_its_name_says(self) -> "AdoptParams":
        if self.known is not None and self.known not in KNOWN:
            raise ValueError(f"known is {self.known!r}; expected one of {sorted(KNOWN)}, or unnorm_key and crop in its place")
        for field, (said, known) in {"unnorm_key": (self.unnorm_key, self.variant.unnorm_key), "crop": (self.crop, self.variant.crop)}.items():
            if field in self.model_fields_set and said not in (None, known):
                raise ValueError(f"{field} is {said!r}; expected {known!r}, by which {self.known} was trained, or nothing")
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
        default="held-out", description="benchmark trains on the evaluation's own initial states: leakage, for comparison only"
    )


class LabelParams(Section):
    """Teacher log-probabilities, eq. (4), of all V bins at every kept state, stored as float16 or float32.

    expert:        is asked in the teacher's place, as `demonstrate.expert` is: DAgger's oracle. It acts for a chunk from every kept state, in a
                   simulator that is led there again; its bins are spread by a Gaussian of standard deviation `smoothing`, in bins.
    recover_every: in episodes that failed, the teacher takes over at every so manieth decision, for `sample.horizon` control steps: whether it still
                   succeeds is stored beside the labels.
    transfer:      the teacher's action statistics may be others than the student's: `optimize` shares out its probabilities over the student's bins
                   by the overlap of their intervals (vla_opd/transfer.py). Otherwise such a teacher is refused.
    """

    teacher: Name = "teacher"
    expert: str | None = None
    smoothing: float = Field(default=1.5, ge=0.01)
    recover_every: int | None = Field(default=None, ge=1)
    transfer: bool = False
    batch_size: int = Field(default=64, ge=1)
    dtype: Literal["float16", "float32"] = "float16"
    threads: int = Field(default=2, ge=1, description="CPU threads; the last bits of a logit depend on it")

    @property
    def simulates(self) -> bool:
        """Whether simulators are needed to label."""
        return self.expert is not None or self.recover_every is not None


class GroupParams(Section):
    """Which groups GRPO learns from: those whose mean success is within keep_low ... keep_high. Of a single outcome there is nothing to prefer."""

    keep_low: Fraction = 0.1
    keep_high: Fraction = 0.9

    @model_validator(mode="after")
    def _some_are_kept(self) -> "GroupParams":
        if self.keep_low > self.keep_high:
            raise ValueError(f"keep_low is {self.keep_low} and keep_high is {self.keep_high}; expected keep_low to be at most keep_high")
        return self

    def keeps(self, success: float) -> bool:
        """Whether a group of that mean success is one to learn from."""
        return self.keep_low <= success <= self.keep_high


class ClipParams(Section):
    """GRPO's ratio is clipped to [1 - clip_low, 1 + clip_high]."""

    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.28, gt=0)


class UpdateParams(TrainedParams):
    """A fixed budget of AdamW steps per iteration, with a schedule over `schedule_iterations` of them; later ones stay at its end."""

    steps: int = Field(default=80, ge=1)
    batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=1.5e-3, gt=0)
    schedule_iterations: int = Field(default=10, ge=1)
    final_fraction: Fraction = 0.1
    warmup_fraction: Fraction = 0.02
    weight_decay: float = Field(default=0.0, ge=0)
    gradient_clip: float = Field(default=1.0, gt=0)
    save_every: int = Field(default=20, ge=1)
    threads: int = Field(default=2, ge=1)


class OptimizeParams(UpdateParams, GroupParams, ClipParams):
    """Eq. (5): the student's update towards the teacher.

    objective:   a key of `vla_opd.objectives.OBJECTIVES` or `ON_DECISIONS`, or `"package.module:function"` of a `TokenBatch`.
    temperature: both student and teacher are scored at it, the teacher at `teacher_temperature` if that is set.
    confidence:  tokens are weighted by (1 - H(p_T) / log V) to this power.
    anchor:      weight of KL(p_S || p_0) at the same states, p_0 the checkpoint `student` that the run began with, whatever the objective.
    beta:        of `jsd`. distill: weight of the reverse KL in `mixed`.
    recoverable: only states from which the teacher still succeeds are learnt from (`label.recover_every`).
    states:      only so many of the states are learnt from, drawn at random: as many in every arm, however long its episodes are. An iteration
                 that has some, but fewer, fails.
    earlier:     states and labels of so many iterations before this one are learnt from too, all of them alike: DAgger's aggregation. What is
                 measured before and after is measured on this iteration's states.
    clamp, centre: the reward of the sampled forms is cut to [-clamp, clamp]; its mean under the student is taken off.
    ratio, reward, discount: of `reverse_kl_rollout`: an importance ratio in place of the log-probability; the student in r as it is now, or as the
                 rollout recorded it; the discount of the rewards of later decisions.
    """

    objective: str = "reverse_kl"
    temperature: float = Field(default=1.0, gt=0)
    teacher_temperature: float | None = Field(default=None, gt=0)
    confidence: float = Field(default=0.0, ge=0)
    anchor: float = Field(default=0.0, ge=0)
    beta: float = Field(default=0.5, gt=0, lt=1)
    distill: float = Field(default=1.0, ge=0)
    clamp: float | None = Field(default=None, gt=0)
    centre: bool = False
    ratio: bool = False
    reward: Literal["fresh", "rollout"] = "fresh"
    discount: Fraction = 0.0
    recoverable: bool = False
    states: int | None = Field(default=None, ge=1)
    earlier: int = Field(default=0, ge=0)


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
    allow_mismatch: bool = Field(default=False, description="evaluate under another stepping, render or camera setting than trained with")

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


LEARNING = ("sample", "label", "optimize", "explore", "reinforce")
OWN = f"finetuned.{START}"
"""The sections in which the arms of a study may differ; in how the student is fine-tuned too, but then not all of them have one start."""


class ArmParams(Section):
    """One way to learn: so many iterations with the teacher, then so many of GRPO.

    after:    the arm that it goes on from, with the same seed and the same settings; if none is named, it starts from the run's student.
    switch:   from where on: from the checkpoint of that arm's first iteration whose rollouts had at least this success, not from its last one.
    settings: `section.key: value`, in which the arm differs from the run. Some of `finetuned.student` give it a student of its own; without
              iterations, it is that student, made once with every seed: offline fine-tuning, for example on all demonstrations
              (`finetuned.student.per_task: null`).
    """

    after: Name | None = None
    switch: Fraction | None = None
    distill: int = Field(default=0, ge=0)
    reinforce: int = Field(default=0, ge=0)
    settings: Mapping[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _learns(self) -> "ArmParams":
        if other := [dotted for dotted in self.settings if dotted.rpartition(".")[0] not in (*LEARNING, OWN)]:
            raise ValueError(f"settings has {other[0]!r}; expected section.key with one of the sections {[*LEARNING, OWN]}")
        if self.switch is not None and self.after is None:
            raise ValueError(f"switch is {self.switch} and after is null; expected the arm after which it switches")
        if not self.distill + self.reinforce and not self.own_student:
            raise ValueError(f"distill and reinforce are 0; expected at least one iteration of either kind, or settings of {OWN}")
        return self

    @property
    def sections(self) -> tuple[str, ...]:
        """What its iterations read."""
        return (*LEARNING[:3],) * bool(self.distill) + (*LEARNING[3:],) * bool(self.reinforce)

    @property
    def own_student(self) -> bool:
        """Whether it starts from another student than the run's."""
        return any(dotted.startswith(OWN) for dotted in self.settings)


class StudyParams(Section):
    """Arms x seeds: every arm learns once with every seed, from the run's own student and teacher, and is scored on the same initial states.

    seeds:         values of `run.learning_seed`; of `finetuned.student.seed`, for arms without iterations and those after them.
    every:         checkpoints are scored after every that many iterations, and at the end.
    keep_rollouts: keep what the iterations saw, and the labels. By default they go once a member is done; its checkpoints name their digests, and DVC
                   can make them again.
    """

    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(_once_each)] = (0, 1, 2, 3, 4)
    every: int = Field(default=1, ge=1)
    keep_rollouts: bool = False
    arms: Mapping[Name, ArmParams] = Field(min_length=1)

    @model_validator(mode="after")
    def _arms_follow_arms(self) -> "StudyParams":
        before = {name: arm.after for name, arm in self.arms.items() if arm.after is not None}
        for name, other in before.items():
            if other not in self.arms:
                raise ValueError(f"arms.{name}.after is {other!r}; expected another arm, one of {sorted(self.arms)}")
        if circle := _circle(before):
            raise ValueError(f"arms: {' after '.join(circle)} is a circle; expected an arm that starts from the run's student")
        for name, other in before.items():
            used = {section for arm in self.lineage(other) for section in (OWN, *arm.sections)}
            if changed := [dotted for dotted in self.arms[name].settings if dotted.rpartition(".")[0] in used]:
                raise ValueError(f"arms.{name}.settings has {changed[0]!r}; expected those of {other}, which it goes on from, for what that made")
        return self

    def lineage(self, arm: str) -> list[ArmParams]:
        """The arm and all that it goes on from, the first of them first."""
        its = self.arms[arm]
        return [*(self.lineage(its.after) if its.after else []), its]

    def own_student(self, arm: str) -> bool:
        """Whether it starts from another student than the run's."""
        return any(one.own_student for one in self.lineage(arm))


class Params(Section):
    """The run, whole: every section of `params.yaml`."""

    run: RunParams
    environment: EnvironmentParams
    demonstrate: DemonstrateParams = DemonstrateParams()
    policy: PolicyParams = PolicyParams()
    finetune: FinetuneParams = FinetuneParams()
    sample: SampleParams = SampleParams()
    label: LabelParams = LabelParams()
    optimize: OptimizeParams = OptimizeParams()
    explore: ExploreParams = ExploreParams()
    reinforce: ReinforceParams = ReinforceParams()
    evaluate: EvaluateParams = EvaluateParams()
    report: ReportParams = ReportParams()
    demonstrations: Mapping[Key, DemonstrationSet] = Field(default_factory=dict)
    pretrained: Mapping[Key, PretrainedParams] = Field(default_factory=dict)
    finetuned: Mapping[Key, FinetunedParams] = Field(default_factory=dict)
    adopt: Mapping[Key, AdoptParams] = Field(default_factory=dict)
    iterations: Mapping[Key, Name] = Field(description="iteration: the checkpoint it starts from")
    reinforcements: Mapping[Key, Name] = Field(default_factory=dict, description="iteration of GRPO: the checkpoint it starts from")
    evaluations: Mapping[Key, Name] = Field(description="evaluation: the checkpoint it scores")
    studies: Mapping[Name, StudyParams] = Field(default_factory=dict, description="each is `report/<name>` beside the run's own, `report/page`")

    @property
    def batch_sizes(self) -> dict[str, int]:
        """Of the stages of this run that train, by the name of the setting."""
        used = {"finetune": self.trained, "optimize": self.iterations, "reinforce": self.reinforcements}
        return {f"{verb}.batch_size": getattr(self, verb).batch_size for verb, what in used.items() if what}

    @property
    def trained(self) -> dict[str, PretrainedParams]:
        """The checkpoints that `finetune` makes, by name."""
        return {**self.pretrained, **self.finetuned}

    @property
    def origins(self) -> dict[str, str]:
        """The checkpoints that no iteration makes, and the stage that makes each."""
        ways = {"pretrain": self.pretrained, "finetune": self.finetuned, "adopt": self.adopt}
        return {name: f"{stage}@{name}" for stage, made in ways.items() for name in made}

    @property
    def reference(self) -> dict[str, str]:
        """The evaluations that need no iteration."""
        return {name: checkpoint for name, checkpoint in self.evaluations.items() if checkpoint in self.origins}

    @property
    def updates(self) -> dict[str, str]:
        """Every iteration, of either kind: the checkpoint that it starts from."""
        return {**self.iterations, **self.reinforcements}

    def chain(self, checkpoint: str) -> list[str]:
        """A checkpoint and all that it came from, back to one that no iteration made."""
        names = [checkpoint]
        while names[-1] in self.updates:
            names.append(self.updates[names[-1]])
        return names

    def depth(self, iteration: str) -> int:
        """How many iterations of the same kind come right before it on its chain; one of the other kind begins a schedule of its own."""
        chain = self.iterations if iteration in self.iterations else self.reinforcements
        parent = chain[iteration]
        return self.depth(parent) + 1 if parent in chain else 0

    @model_validator(mode="after")
    def _no_study_takes_the_reports_place(self) -> "Params":
        if "page" in self.studies:
            raise ValueError("studies has 'page': that is where the run's own report is; expected another name")
        return self

    @model_validator(mode="after")
    def _names_exist(self) -> "Params":
        checkpoints = {*self.origins, *self.updates}
        wanted = {f"{kind}.{k}": v for kind in ("iterations", "reinforcements", "evaluations") for k, v in getattr(self, kind).items()}
        wanted |= {"label.teacher": self.label.teacher}
        for field, name in wanted.items():
            if name not in checkpoints:
                raise ValueError(f"{field} is {name!r}: no such checkpoint; expected one of {sorted(checkpoints)}")
        for field, made in {f"{kind}.{k}": c for kind in ("pretrained", "finetuned") for k, c in getattr(self, kind).items()}.items():
            if made.demonstrations not in self.demonstrations:
                choices = sorted(self.demonstrations)
                raise ValueError(f"{field}.demonstrations is {made.demonstrations!r}: no such set of demonstrations; expected one of {choices}")
        return self

    @model_validator(mode="after")
    def _checkpoints_come_from_somewhere(self) -> "Params":
        taken: set[str] = set()
        for kind in ("pretrained", "finetuned", "adopt", "iterations", "reinforcements"):
            if overlap := taken.intersection(getattr(self, kind)):
                raise ValueError(f"{kind} has {sorted(overlap)}: these names belong to other checkpoints; choose others")
            taken.update(getattr(self, kind))
        for name, made in self.finetuned.items():
            if made.parent not in self.origins:
                raise ValueError(f"finetuned.{name}.parent is {made.parent!r}: no such checkpoint; expected one of {sorted(self.origins)}")
        if circle := _circle({name: made.parent for name, made in self.finetuned.items()}):
            raise ValueError(f"finetuned: {' -> '.join(circle)} is a circle; expected a chain that starts from another checkpoint")
        if circle := _circle(self.updates):
            raise ValueError(f"iterations: {' -> '.join(circle)} is a circle; expected a chain that starts from a fine-tuned checkpoint")
        if START not in self.origins:
            raise ValueError(f"pretrained, finetuned and adopt have {sorted(self.origins)}; expected {START!r} among them, which the run begins with")
        return self


def _circle(chain: Mapping[str, str]) -> list[str]:
    """A chain that comes back to where it was, if there is one."""
    for name in chain:
        seen = [name]
        while seen[-1] in chain:
            seen.append(chain[seen[-1]])
            if seen[-1] in seen[:-1]:
                return seen
    return []


def load(path: Path | str = "params.yaml", overrides: Iterable[str] = ()) -> Params:
    """Parse `params.yaml` with `section.key=value` overrides. ValueError names the field, the value and what was expected."""
    source = Path(path)
    if not source.is_file():
        raise ValueError(f"params: {source} does not exist; expected the run's params.yaml (are you in the project's folder?)")
    yaml = YAML(typ="safe")
    tree = _parsed(yaml, read_text(source), str(source))
    if not isinstance(tree, dict):
        raise ValueError(f"params: {source} holds {type(tree).__name__}; expected one mapping of sections")
    for override in overrides:
        _override(tree, override, yaml)
    try:
        params = Params.model_validate(tree)
    except ValidationError as error:
        raise ValueError(_explain(error, source)) from None
    if mistakes := [f"  {mistake}" for mistake in _at_odds(params)]:
        raise ValueError("\n".join([f"{source}: {len(mistakes)} mistake(s)", *mistakes]))
    return params


def read_text(path: Path) -> str:
    """A text file of a project, whatever this machine's own encoding is. ValueError names the file, the line and the byte that isn't UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: line {line} has the byte 0x{content[error.start]:02x}; expected a text in UTF-8 (save it in that encoding)"
        ) from None


OPTIONS_OF = {
    "beta": {"jsd"},
    "clamp": {"reverse_kl_sampled", "reverse_kl_rollout"},
    "centre": {"reverse_kl_sampled", "reverse_kl_rollout"},
    "ratio": {"reverse_kl_rollout"},
    "reward": {"reverse_kl_rollout"},
    "discount": {"reverse_kl_rollout"},
    "distill": {"mixed"},
    **{field: {"mixed"} for field in (*GroupParams.model_fields, *ClipParams.model_fields)},
}
"""Settings of `optimize` that only these objectives read: with another one they would be silently without effect."""


WITH_MEMORY = {"libero"}
"""Scripted experts that remember what they did, and so can't be asked at a state to which somebody else came."""


FROM_STUDENT = {"reverse_kl_rollout", "mixed"}
"""Objectives that take the rollout's tokens for the student's: `vla_opd.objectives.ON_DECISIONS`, as a test says."""


def _at_odds(params: Params) -> Iterator[str]:
    """What one section asks of another, and doesn't get. Not asked of a `Params` made in code, of which not every section need be in use."""
    crop, size = params.policy.crop, params.environment.image_size
    if crop > size:
        yield f"policy.crop is {crop}; expected at most environment.image_size, which is {size}"
    every, chunk = params.sample.observe_every, params.policy.chunk
    if chunk % every:
        divisors = [n for n in range(1, chunk + 1) if chunk % n == 0]
        yield f"sample.observe_every is {every}; expected a divisor of policy.chunk, which is {chunk}: one of {divisors}"
    if both := [task for task in params.evaluate.unseen or () if task in params.environment.tasks]:
        yield f"evaluate.unseen has {both[0]!r}; expected other tasks than environment.tasks, which are trained on"
    if params.environment.wording != "bddl" and params.environment.family == "metaworld":
        yield f"environment.wording is {params.environment.wording}; expected bddl: the choice is between LIBERO's instructions"
    yield from _adapters_at_odds(params)
    yield from _labels_at_odds(params)
    yield from _transfer_at_odds(params)
    yield from _objective_at_odds(params)
    yield from _temperatures_at_odds(params)
    for field, name in params.report.model_dump().items():
        if params.evaluations and name not in params.evaluations:  # without any, there is nothing to report
            yield f"report.{field} is {name!r}; expected one of the evaluations {sorted(params.evaluations)}"


def _adapters_at_odds(params: Params) -> Iterator[str]:
    for field in ("finetune", "optimize", "reinforce"):
        its: TrainedParams = getattr(params, field)
        if its.lora is None and its.lora_alpha != TrainedParams.model_fields["lora_alpha"].default:
            yield f"{field}.lora_alpha is {its.lora_alpha}; expected that with {field}.lora_rank only, and it is null"


def _labels_at_odds(params: Params) -> Iterator[str]:
    label = params.label
    if label.expert in WITH_MEMORY:
        yield f"label.expert is {label.expert}, which remembers what it did; expected one that can take over anywhere, or null"
    if {label.expert, params.environment.family} == {"metaworld", "libero"}:
        yield f"label.expert is {label.expert}; expected one for environment.family {params.environment.family}"
    if label.expert is None and label.smoothing != LabelParams.model_fields["smoothing"].default:
        yield f"label.smoothing is {label.smoothing}; expected that with label.expert only, and it is null"
    if label.expert is not None and label.recover_every is not None:
        yield f"label.recover_every is {label.recover_every}; expected null with label.expert: it is the teacher that takes over"
    if params.optimize.recoverable and label.recover_every is None:
        yield "label.recover_every is null; expected a number with optimize.recoverable true, which learns from what it finds"


def _transfer_at_odds(params: Params) -> Iterator[str]:
    """Bins are shared out as the teacher's probabilities are at temperature 1; at another they would have to be so before."""
    if not params.label.transfer:
        return
    if params.label.expert is not None:
        yield "label.transfer is true; expected false with label.expert, whose actions are put into the student's bins"
    if params.sample.visited_by == "teacher":
        yield "label.transfer is true; expected false with sample.visited_by teacher, whose tokens aren't the student's"
    for field in ("temperature", "teacher_temperature"):
        if (value := getattr(params.optimize, field)) not in {1.0, None}:
            yield f"optimize.{field} is {value}; expected 1 with label.transfer, which shares out the teacher's probabilities as they are"


def _objective_at_odds(params: Params) -> Iterator[str]:
    opt = params.optimize
    for field, objectives in OPTIONS_OF.items():
        set_to = getattr(opt, field)
        if set_to != OptimizeParams.model_fields[field].default and opt.objective not in objectives and ":" not in opt.objective:
            yield f"optimize.{field} is {set_to}; expected that with optimize.objective one of {sorted(objectives)} only, and it is {opt.objective}"
    if opt.objective in FROM_STUDENT and params.sample.visited_by == "teacher":
        yield f"sample.visited_by is teacher; expected student with optimize.objective {opt.objective}, which learns from the student's own tokens"
    if opt.objective in FROM_STUDENT and opt.earlier:
        yield f"optimize.earlier is {opt.earlier}; expected 0 with optimize.objective {opt.objective}, which learns from the student's own tokens"
    if opt.objective == "mixed" and opt.states is not None:
        yield f"optimize.states is {opt.states}; expected null with optimize.objective mixed: GRPO's means are over whole episodes"
    if opt.objective == "mixed" and params.sample.group < 2:
        yield f"sample.group is {params.sample.group}; expected at least 2 with optimize.objective mixed: an advantage is one over the others"


def _temperatures_at_odds(params: Params) -> Iterator[str]:
    """The rollout's tokens have to be scored at the temperature at which they were drawn, unless a ratio makes up for it."""
    opt, drawn = params.optimize, params.sample.temperature
    if opt.objective != "reverse_kl_rollout" or (opt.ratio and opt.reward == "fresh" and not opt.discount):
        return
    for field, value in {"temperature": opt.temperature, "teacher_temperature": opt.teacher_temperature}.items():
        if value is not None and value != drawn:
            yield f"optimize.{field} is {value}; expected sample.temperature, {drawn}, with reverse_kl_rollout (but for ratio: true, fresh rewards)"


def _override(tree: dict[str, Any], override: str, yaml: YAML) -> None:
    dotted, equals, text = override.partition("=")
    *sections, key = dotted.split(".")
    if not equals or not sections:
        raise ValueError(f"override {override!r}: expected section.key=value, as in optimize.learning_rate=1e-4")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ValueError(f"override {override!r}: {section} is not a section")
    node[key] = _parsed(yaml, text, f"override {override!r}")


def _parsed(yaml: YAML, text: str, where: str) -> Any:
    try:
        return yaml.load(text)
    except YAMLError as error:
        raise ValueError(f"{where}: not YAML: {error}") from error


def _explain(error: ValidationError, source: Path) -> str:
    lines = [f"{source}: {error.error_count()} mistake(s)"]
    for item in error.errors():
        where = ".".join(map(str, item["loc"]))
        value = "" if item["type"] in ("missing", "value_error") else f" is {SHORTER.repr(item['input'])}"
        hint = " (no such key)" if item["type"] == "extra_forbidden" else ""
        lines.append(f"  {where}{value}{hint}: {item['msg']}".replace("  : ", "  "))
    return "\n".join(lines)


def named_function(name: str, known: Mapping[str, Function], field: str) -> Function:
    """`known[name]`, or the function that `"package.module:function"` names. ValueError names the field and the choices."""
    if name in known:
        return known[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f'{field} is {name!r}; expected one of {sorted(known)} or "package.module:function"')
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{field} is {name!r}: {error}") from error
