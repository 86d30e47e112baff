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
    objectives = {**OBJECTIVES, **ON_DECISIONS}
    named_function(params.optimize.objective.name, objectives, "optimize.objective")
    if params.label.expert is not None:
        named_function(params.label.expert, EXPERTS, "label.expert")
    facts = open_checkpoint(teacher).facts
    require_environment(facts, params.environment, str(teacher))
    space = facts.action_space
    transfer = params.label.transfer
    require_actions(open_unverified(student).facts, space, str(teacher), transfer=transfer)
    _require_trainable("optimize", params.optimize, student)


def check_explore(params: Params, student: Path) -> None:
    """ValueError for what `reinforce` would refuse after `explore`."""
    _require_trainable("reinforce", params.reinforce, student)


def _require_trainable(verb: str, settings: TrainedParams, student: Path) -> None:
    """ValueError for an adapter that does not fit the student, or a student that needs one."""
    adapter = lora.find(student)
    lora.require_trainable(settings.lora, adapter, open_unverified(student).dtypes, verb)
