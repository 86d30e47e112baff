"""The sections of `params.yaml` that belong to one stage, and those that several stages read."""

from typing import Annotated, Any, Literal, NamedTuple

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

INITIAL_STUDENT = "student"
"""The checkpoint with which the run begins: the start of a study's arms, and the anchor's p_0."""


def _require_plain_path(path: str) -> str:
    if path.startswith("~") or "$" in path:
        raise PydanticCustomError(
            "path",
            "expected a plain path: neither ~ nor $VARIABLE is expanded, by DVC or by a stage",
        )
    return path


class RunParams(Section):
    """Settings of the whole run.

    name: the run's folder in `artifacts/`.
    seed: seed of demonstrations, fine-tuning and evaluation.
    learning_seed: seed of the iterations: of their rollouts and updates. Another one repeats the
        learning from the same student and teacher, with other placements and other samples.
    """

    name: Name
    seed: int = Field(default=0, ge=0)
    learning_seed: int = Field(default=0, ge=0)


class EnvironmentParams(Section):
    """The simulator and its rendering.

    family: a key of `vla_opd.envs.ENVS`, or `"package.module:function"`.
    tasks: tasks that the student learns.
    cameras: names of the family's cameras, in the order in which the policy sees them.
    image_size: height and width of a rendered frame, in pixels.
    settle: no-op control steps before the first decision (objects start in mid-air).
    stepping: `exact` is bit-identical to the stock environment; `fast` leaves out redundant work.
        Every manifest names it.
    render: `exact` gives the stock images; `fast` gives simpler ones, for policies trained on them.
    wording: of LIBERO's instructions. `bddl`: as in the task's file ("pick the akita black bowl
        ..."). `benchmark`: as in the task's name ("pick up the black bowl ..."), with which the
        public checkpoints were trained.
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
    """Scripted demonstrations from seeded placements, never the benchmark's fixed initial states.

    expert: a key of `vla_opd.experts.EXPERTS`, or `"package.module:function"`.
    noise: standard deviation of the Gaussian noise on the executed xyz action, in the units of the
        action. The label stays the expert's own action.
    burst: fraction of episodes with bursts: a few random actions in a row, so that the expert
        shows how to recover.
    observe_every: control steps per stored frame.
    horizon: maximum length of an episode, in control steps.
    attempts: placements tried per demonstration before the stage fails.
    """

    expert: str = "libero"
    noise: float = Field(default=0.15, ge=0)
    burst: Fraction = 0.5
    observe_every: int = Field(default=2, ge=1)
    horizon: int = Field(default=300, ge=1)
    attempts: int = Field(
        default=3, ge=1, description="placements tried per demonstration before the stage fails"
    )


class DemonstrationSet(Section):
    """One set of demonstrations.

    tasks: the tasks that are demonstrated; the run's own tasks if null.
    episodes: successful demonstrations per task.
    """

    tasks: Names | None = None
    episodes: int = Field(ge=1)


class PolicyParams(Section):
    """The architecture of a policy trained from scratch; a policy with a parent has its parent's.

    family: a key of `vla_opd.policies.load.POLICIES`, or `"package.module:function"`.
    chunk: actions per decision, executed open loop.
    bins: V, bins per action dimension, over [-1, 1] of the normalized action.
    crop: height and width of the center crop that the policy sees, in pixels of the rendered frame.
    proprio: true if the policy sees proprioception (OpenVLA-OFT's LIBERO students do not).
    width: dimension of the transformer's tokens.
    layers: transformer blocks.
    heads: attention heads per block.
    channels: channels of the first convolutions of the vision tower.
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
    def _require_heads_to_divide_width(self) -> "PolicyParams":
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width is {self.width} and heads is {self.heads}; "
                "expected width to be a multiple of 2 * heads (rotary embedding)"
            )
        return self


class FinetuneParams(TrainedParams):
    """Supervised training on demonstrations, eq. (1), with AdamW.

    The learning rate warms up linearly, then decays as a cosine. Its peak and the number of steps
    belong to each checkpoint: `pretrained`, `finetuned`.

    batch_size: states per step, over all processes.
    weight_decay: AdamW's: every step shrinks the weights by learning rate * weight_decay.
    warmup_fraction: fraction of the steps that warm up.
    final_fraction: final learning rate as a fraction of the peak.
    smoothing: standard deviation, in bins, of the Gaussian that spreads the target over the bins
        around the demonstrated one; 0 is plain cross-entropy.
    gradient_clip: maximum L2 norm of the gradient.
    save_every: steps between resumable saves.
    threads: CPU threads of the optimizer; the last bits of the weights depend on it.
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
        description="CPU threads of the optimizer; the last bits of the weights depend on it",
    )


class PretrainedParams(Section):
    """One checkpoint that `finetune` trains from random weights.

    demonstrations: name of the set of demonstrations.
    per_task: demonstrations per task; all of the set if null.
    steps: AdamW steps.
    learning_rate: at the peak, after the warm-up.
    seed: seed of the initial weights and of the order of states; `run.seed` if null.
    """

    demonstrations: Name
    per_task: int | None = Field(
        default=None, ge=1, description="demonstrations per task; all of the set if null"
    )
    steps: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    seed: int | None = Field(
        default=None,
        ge=0,
        exclude_if=is_default(None),
        description="seed of the initial weights and of the order of states; run.seed if null",
    )


class FinetunedParams(PretrainedParams):
    """One checkpoint that `finetune` trains from another.

    parent: that other checkpoint. Its action statistics (q01, q99) and vocabulary are kept, so
        that a token means the same action in both.
    """

    parent: Name


class Variant(NamedTuple):
    """How a public checkpoint was trained.

    unnorm_key: data set of its action statistics. crop: fraction of the image area that it sees.
    """

    unnorm_key: str | None
    crop: float


SUITES = {
    "-spatial": "libero_spatial",
    "-object": "libero_object",
    "-goal": "libero_goal",
    "10": "libero_10",
}
KNOWN = {
    f"Haozhan72/Openvla-oft-SFT-libero{suffix}-{demonstrations}": Variant(f"{suite}_no_noops", 0.9)
    for suffix, suite in SUITES.items()
    for demonstrations in ("traj1", "trajall")
}
"""Public checkpoints by published name, with the settings of SimpleVLA-RL's scripts."""


class AdoptParams(Section):
    """One checkpoint made from a public OpenVLA-OFT with discrete tokens. See docs/policies.md.

    folder: folder of the public files: `config.json`, `dataset_statistics.json`,
        `model*.safetensors`, `tokenizer.json` and so on.
    known: name under which the checkpoint is published, a key of `KNOWN`. It sets `unnorm_key` and
        `crop`. (Nothing is inferred from the folder's name.)
    unnorm_key: data set of the checkpoint's action statistics; may be left out if there is only
        one.
    crop: fraction of the image area that the policy sees, at the center; 1 if it was trained
        without random crops. No public file states it.
    dtype: precision in which weights are stored and computed.
    """

    folder: Annotated[str, AfterValidator(_require_plain_path)] = Field(min_length=1)
    known: str | None = Field(default=None, exclude_if=is_default(None))
    unnorm_key: str | None = None
    crop: float = Field(default=0.9, gt=0, le=1)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    @model_validator(mode="after")
    def _require_known(self) -> "AdoptParams":
        if self.known is not None and self.known not in KNOWN:
            raise ValueError(
                f"known is {self.known!r}; expected one of {sorted(KNOWN)}, "
                "or unnorm_key and crop in its place"
            )
        self._require_trained_with("unnorm_key", self.unnorm_key, self.variant.unnorm_key)
        self._require_trained_with("crop", self.crop, self.variant.crop)
        return self

    def _require_trained_with(self, field: str, value: Any, trained_with: Any) -> None:
        if field in self.model_fields_set and value not in (None, trained_with):
            raise ValueError(
                f"{field} is {value!r}; expected {trained_with!r}, "
                f"with which {self.known} was trained, or nothing"
            )

    @property
    def variant(self) -> Variant:
        """Statistics and crop: those of the published name, or those set here."""
        return Variant(self.unnorm_key, self.crop) if self.known is None else KNOWN[self.known]


class SampleParams(Section):
    """Student rollouts, eq. (3).

    prompts: placements per task and iteration.
    group: G, episodes per placement.
    temperature: softmax temperature at which action tokens are sampled.
    horizon: maximum length of an episode, in control steps.
    observe_every: control steps per stored state; a divisor of the policy's chunk. Below the chunk,
        states inside chunks are labeled too.
    inference_batch: rows per forward pass, padded, so that a sampled token never depends on which
        other episodes are waiting for the policy.
    visited_by: the policy that acts. `teacher` is the off-policy control: as many episodes and
        updates, but on states that the teacher visits.
    protocol: `held-out` starts from seeded placements. `benchmark` starts from the initial states
        of the evaluation: this leaks test states into training, for comparison only.
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
        description="benchmark trains on the evaluation's initial states: for comparison only",
    )


class LabelParams(Section):
    """Teacher log-probabilities, eq. (4), of all V bins at every stored state.

    teacher: name of the teacher's checkpoint.
    expert: scripted expert that labels in the teacher's place (DAgger), as in
        `demonstrate.expert`. From every stored state, in a simulator that is brought there again,
        it acts for one chunk; the bins of its actions are the label.
    smoothing: standard deviation, in bins, of the Gaussian that spreads the expert's bins.
    recover_every: in failed episodes the teacher takes over at every n-th decision, for
        `sample.horizon` control steps; the labels record whether it succeeds. Off if null.
    transfer: accept a teacher with other action statistics than the student's. `optimize` then
        distributes its probabilities over the student's bins by the overlap of their intervals
        (`vla_opd/learning/bin_transfer.py`).
    batch_size: states per forward pass of the teacher.
    dtype: precision in which the log-probabilities are stored.
    threads: CPU threads of the teacher; the last bits of a log-probability depend on it.
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
        """True if labeling needs simulators."""
        return self.expert is not None or self.recover_every is not None


class ExploreParams(GroupParams):
    """Student rollouts for GRPO: like `sample`, hotter and in larger groups.

    Only the states at which the student decided are stored.

    prompts: placements per task and round.
    group: G, episodes per placement.
    temperature: softmax temperature at which action tokens are sampled.
    horizon: maximum length of an episode, in control steps.
    inference_batch: rows per forward pass, padded; see `SampleParams`.
    rounds: maximum number of rounds (dynamic sampling). Another round follows while the groups to
        learn from (`keep_low`, `keep_high`) number fewer than `prompts` per task, over all tasks.
    """

    prompts: int = Field(default=1, ge=1)
    group: int = Field(default=8, ge=2)
    temperature: float = Field(default=1.6, gt=0)
    horizon: int = Field(default=150, ge=1)
    inference_batch: int = Field(default=1, ge=1)
    rounds: int = Field(default=1, ge=1)


class ReinforceParams(UpdateParams, ClipParams):
    """The student's update by GRPO, eq. (2), without a teacher.

    Steps and schedule are counted apart from those of `optimize`.
    """

    steps: int = Field(default=20, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)


class EvaluateParams(Section):
    """Greedy rollouts from the benchmark's fixed initial states.

    unseen: tasks that the run does not train on, scored separately: they show forgetting.
    decide: two success rates. The evaluation stops as soon as the episodes decide between them, at
        `confidence`; tasks then take turns, state by state. This takes about half of the episodes,
        but their success is a biased estimate of the rate, and they cannot be paired with those of
        another evaluation.
    episodes: episodes per task, from the initial states first_state ... first_state + episodes - 1.
    first_state: number of the first initial state.
    horizon: maximum length of an episode, in control steps.
    inference_batch: rows per forward pass, padded; see `SampleParams`.
    confidence: level of the intervals, and of the decision.
    allow_mismatch: accept an environment that differs from the training's (stepping, rendering,
        cameras and so on).
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
        description="accept other stepping, rendering or cameras than in training",
    )

    @model_validator(mode="after")
    def _require_decidable(self) -> "EvaluateParams":
        if self.decide is not None and (self.unseen or self.confidence <= 0.5):
            raise ValueError(
                f"decide is set, unseen is {self.unseen} and confidence is {self.confidence}; "
                "expected no unseen tasks, and a confidence above 0.5"
            )
        return self

    @model_validator(mode="after")
    def _require_existing_states(self) -> "EvaluateParams":
        if self.first_state + self.episodes > EVALUATION_STATES:
            raise ValueError(
                f"first_state is {self.first_state} and episodes is {self.episodes}; "
                f"expected first_state + episodes to be at most {EVALUATION_STATES}: "
                f"a task has the initial states 0 ... {EVALUATION_STATES - 1}"
            )
        return self


class ReportParams(Section):
    """The HTML page: the three evaluations that its summary compares.

    start: of the initial student. final: of the last checkpoint. teacher: of the teacher.
    """

    start: Name = "start"
    final: Name = "final"
    teacher: Name = "teacher"
