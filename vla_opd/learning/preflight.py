"""Mistakes that a later stage would refuse, found before the rollouts that they would waste."""

from pathlib import Path

from vla_opd.experts import EXPERTS
from vla_opd.learning.bin_transfer import require_actions
from vla_opd.learning.objectives import OBJECTIVES, ON_DECISIONS
from vla_opd.params.run import Params
from vla_opd.params.training import TrainedParams
from vla_opd.plugins import named_function
from vla_opd.policies import lora
from vla_opd.policies.checkpoint import open_checkpoint, open_unverified, require_environment


def check_sample(params: Params, student: Path, teacher: Path) -> None:
    """ValueError for what `label` and `optimize` would refuse after `sample`.

    Reads the teacher's bytes, too; the student's are read by the stage itself.
    """
    label = params.label
    objective = params.optimize.objective
    objectives = {**OBJECTIVES, **ON_DECISIONS}
    named_function(objective.name, objectives, "optimize.objective")
    if label.expert is not None:
        named_function(label.expert, EXPERTS, "label.expert")
    teacher_facts = open_checkpoint(teacher).facts
    require_environment(teacher_facts, params.environment, str(teacher))
    student_facts = open_unverified(student).facts
    require_actions(
        student_facts,
        teacher_facts.action_space,
        str(teacher),
        transfer=label.transfer,
    )
    _require_trainable("optimize", params.optimize, student)


def check_explore(params: Params, student: Path) -> None:
    """ValueError for what `reinforce` would refuse after `explore`."""
    _require_trainable("reinforce", params.reinforce, student)


def _require_trainable(verb: str, settings: TrainedParams, student: Path) -> None:
    """ValueError for an adapter that does not fit the student, or a student that needs one."""
    adapter = lora.find(student)
    checkpoint = open_unverified(student)
    lora.require_trainable(settings.lora, adapter, checkpoint.dtypes, verb)
