"""One row per stage: what it reads, what it makes, and how it may be run.

`python -m stages`, the flows and the tests read the rows; dvc.yaml says the same to DVC, and a test
compares the two. A stage's module has one public function, `run`, with keyword parameters only:
`run` (the run's name), `out` and `host`, `seed` if it has one, its own section as `settings`, the
other sections by their names, and its inputs by theirs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vla_opd.artifacts.layout import Layout
from vla_opd.params.run import Params
from vla_opd.params.stages import INITIAL_STUDENT

Inputs = Callable[[Params, str, Layout], dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """One stage.

    items:     DVC's stages that it stands behind, and the section of params.yaml whose keys name
               what each of them makes; None for a stage that makes one artifact per run.
    output:    the folder of the artifact with a name.
    inputs:    what `run` gets beside sections: the artifacts that it reads, and what params.yaml
               says about this item.
    seed:      the key of section `run` that its random numbers come from.
    sections:  the sections that it reads, its own first.
    simulates: whether it needs simulators, with these settings.
    rolls_out: a policy acts in simulators, whose forward passes can be CUDA graphs.
    shares:    its shards can be made by several processes.
    trains:    it trains a policy, which several processes can do together.
    on_device: it runs a policy, on a GPU if there is one.
    """

    items: Mapping[str, str | None]
    output: Callable[[Layout, str], Path]
    inputs: Inputs
    sections: tuple[str, ...] = ()
    seed: Literal["seed", "learning_seed"] | None = None
    simulates: Callable[[Params], bool] = lambda _: False
    rolls_out: bool = False
    shares: bool = False
    trains: bool = False
    on_device: bool = True

    @property
    def option(self) -> Literal["--name", "--iteration"] | None:
        """The command-line option that names what it makes."""
        section = next(iter(self.items.values()))
        if section is None:
            return None
        return "--iteration" if section in ITERATIONS else "--name"

    def names(self, params: Params) -> list[str]:
        """The names of what it makes in this run."""
        sections = [section for section in self.items.values() if section is not None]
        return sorted(name for section in sections for name in getattr(params, section))


ITERATIONS = ("iterations", "reinforcements")


def _demonstrate(params: Params, name: str, _: Layout) -> dict[str, Any]:
    return {"name": name, "wanted": params.demonstrations[name], "chunk": params.policy.chunk}


def _finetune(params: Params, name: str, layout: Layout) -> dict[str, Any]:
    recipe = params.trained[name]
    parent = None
    if name in params.finetuned:
        parent = layout.checkpoint(params.finetuned[name].parent)
    return {
        "name": name,
        "recipe": recipe,
        "demonstrations": layout.demonstrations(recipe.demonstrations),
        "parent": parent,
    }


def _adopt(params: Params, name: str, _: Layout) -> dict[str, Any]:
    return {"name": name, "settings": params.adopt[name]}


def _sample(params: Params, iteration: str, layout: Layout) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "student": layout.checkpoint(params.iterations[iteration]),
        "teacher": layout.checkpoint(params.label.teacher),
    }


def _label(params: Params, iteration: str, layout: Layout) -> dict[str, Any]:
    return {
        "teacher": layout.checkpoint(params.label.teacher),
        "trajectories": layout.trajectories(iteration),
    }


def _optimize(params: Params, iteration: str, layout: Layout) -> dict[str, Any]:
    chain = [name for name in params.chain(iteration)[1:] if name in params.iterations]
    return {
        "iteration": iteration,
        "depth": params.depth(iteration),
        "earlier": chain[: params.optimize.earlier],
        "student": layout.checkpoint(params.iterations[iteration]),
        "trajectories": layout.trajectories(iteration),
        "labels": layout.labels(iteration),
        "initial": layout.checkpoint(INITIAL_STUDENT),
    }


def _explore(params: Params, iteration: str, layout: Layout) -> dict[str, Any]:
    student = layout.checkpoint(params.reinforcements[iteration])
    return {"iteration": iteration, "student": student}


def _reinforce(params: Params, iteration: str, layout: Layout) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "depth": params.depth(iteration),
        "student": layout.checkpoint(params.reinforcements[iteration]),
        "trajectories": layout.trajectories(iteration),
    }


def _evaluate(params: Params, name: str, layout: Layout) -> dict[str, Any]:
    return {"checkpoint": layout.checkpoint(params.evaluations[name])}


def _report(params: Params, _: str, layout: Layout) -> dict[str, Any]:
    return {"params": params, "root": layout.root}


STAGES = {
    "demonstrate": Stage(
        items={"demonstrate": "demonstrations"},
        output=Layout.demonstrations,
        inputs=_demonstrate,
        sections=("demonstrate", "environment"),
        seed="seed",
        simulates=lambda _: True,
        on_device=False,
    ),
    "finetune": Stage(
        items={"pretrain": "pretrained", "finetune": "finetuned"},
        output=Layout.checkpoint,
        inputs=_finetune,
        sections=("finetune", "policy", "environment"),
        seed="seed",
        trains=True,
    ),
    "adopt": Stage(
        items={"adopt": "adopt"},
        output=Layout.checkpoint,
        inputs=_adopt,
        sections=("environment",),
        on_device=False,
    ),
    "sample": Stage(
        items={"sample": "iterations"},
        output=Layout.trajectories,
        inputs=_sample,
        sections=("sample", "environment"),
        seed="learning_seed",
        simulates=lambda _: True,
        rolls_out=True,
        shares=True,
    ),
    "label": Stage(
        items={"label": "iterations"},
        output=Layout.labels,
        inputs=_label,
        sections=("label",),
        simulates=lambda params: params.label.simulates,
        shares=True,
    ),
    "optimize": Stage(
        items={"optimize": "iterations"},
        output=Layout.checkpoint,
        inputs=_optimize,
        sections=("optimize",),
        seed="learning_seed",
        trains=True,
    ),
    "explore": Stage(
        items={"explore": "reinforcements"},
        output=Layout.trajectories,
        inputs=_explore,
        sections=("explore", "environment"),
        seed="learning_seed",
        simulates=lambda _: True,
        rolls_out=True,
        shares=True,
    ),
    "reinforce": Stage(
        items={"reinforce": "reinforcements"},
        output=Layout.checkpoint,
        inputs=_reinforce,
        sections=("reinforce",),
        seed="learning_seed",
        trains=True,
    ),
    "evaluate": Stage(
        items={"evaluate": "evaluations"},
        output=Layout.evaluation,
        inputs=_evaluate,
        sections=("evaluate", "environment"),
        seed="seed",
        simulates=lambda _: True,
        rolls_out=True,
        shares=True,
    ),
    "report": Stage(
        items={"report": None},
        output=lambda layout, _: layout.report(),
        inputs=_report,
        on_device=False,
    ),
}

BEHIND = {name: verb for verb, stage in STAGES.items() for name in stage.items}
"""The stage behind each of DVC's stages, e.g. `"pretrain": "finetune"`."""


def planned_artifacts(params: Params) -> set[Path]:
    """Return the folders of all artifacts that the stages of a run make."""
    layout = Layout.of_run(params.run.name)
    folders: set[Path] = set()
    for stage in STAGES.values():
        names = [""] if stage.option is None else stage.names(params)
        folders.update(stage.output(layout, name) for name in names)
    return folders


def arguments(verb: str, params: Params, name: str) -> dict[str, Any]:
    """Return what the stage's `run` gets to make the artifact with a name, all but the host.

    ValueError for a name that params.yaml doesn't have.
    """
    stage = STAGES[verb]
    layout = Layout.of_run(params.run.name)
    if stage.option is not None and name not in stage.names(params):
        section = " or ".join(section for section in stage.items.values() if section is not None)
        raise ValueError(f"{section} is {name!r}; expected one of {stage.names(params)}")
    sections = {section: getattr(params, section) for section in stage.sections}
    if verb in sections:
        sections["settings"] = sections.pop(verb)
    seed = {} if stage.seed is None else {"seed": getattr(params.run, stage.seed)}
    return {
        "run": params.run.name,
        "out": stage.output(layout, name),
        **seed,
        **sections,
        **stage.inputs(params, name, layout),
    }


def batch_sizes(params: Params) -> dict[str, int]:
    """Return the batch sizes of the stages of this run that train, by the name of the setting."""
    trained = [verb for verb, stage in STAGES.items() if stage.trains and stage.names(params)]
    return {f"{verb}.batch_size": getattr(params, verb).batch_size for verb in trained}
