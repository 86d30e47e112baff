"""`python -m stages VERB ...`: run one stage of the run that `params.yaml` describes. This is what `dvc.yaml` runs.

Nothing here is part of `params.yaml`: `--workers`, `--device`, `--graphs`, `--processes` and `--tracking` (or OPD_WORKERS, OPD_DEVICE, OPD_GRAPHS,
OPD_PROCESSES, OPD_TRACKING) say how this machine does the work. Manifests name the device and graphs, on which the last bits of logits depend.
"""

import argparse
import gc
import importlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vla_opd import mistakes
from vla_opd.artifacts.draft import Share
from vla_opd.artifacts.manifest import Manifest
from vla_opd.envs import ENVS
from vla_opd.envs.graphics import use_backend
from vla_opd.machine import checkout
from vla_opd.machine.host import (
    LAUNCH,
    METRICS,
    Host,
    on_or_off,
    processes,
    require_equal_bits,
    require_equal_shares,
    this_host,
)
from vla_opd.machine.parent_death import STARTED_BY, die_with_parent
from vla_opd.machine.tracking import execution
from vla_opd.params.load import load
from vla_opd.params.run import Params
from vla_opd.params.stages import START
from vla_opd.plugins import named_function

VERBS = {
    "demonstrate": "--name",
    "finetune": "--name",
    "adopt": "--name",
    "sample": "--iteration",
    "label": "--iteration",
    "optimize": "--iteration",
    "explore": "--iteration",
    "reinforce": "--iteration",
    "evaluate": "--name",
    "report": None,
}
SIMULATED = ("demonstrate", "sample", "explore", "evaluate")
SHARED = ("sample", "label", "explore", "evaluate")
ROLLED_OUT = ("sample", "explore", "evaluate")
TRAINED = ("finetune", "optimize", "reinforce")
FIRST_SPEAKS = 3.0  # seconds
LAUNCHED = "TORCHELASTIC_RUN_ID"  # the environment variable by which torchrun's processes are known


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a stage. What its user or the machine has to put right is one message on stderr, with the exit code of `vla_opd.mistakes`."""
    options = _parser().parse_args(arguments)
    if (
        "DVC_STAGE" in os.environ
    ):  # by hand, a stage may outlive its terminal; DVC's, whose lock dies with DVC, must not be met by the next one
        die_with_parent()
    elif (parent := os.environ.get(STARTED_BY)) is not None:
        die_with_parent(parent=int(parent))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return _obey(options, sys.argv[1:] if arguments is None else arguments)
    except Exception as error:
        code = mistakes.exit_code(error)
        if code is None:
            raise
        return _say(code, options.verb, mistakes.message(error))


def _obey(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run the stage, or have it run as several processes. The exit code. Errors as they come."""
    checkout.require_own_code()
    require_equal_bits()
    params, count = load("params.yaml", options.set), processes(options.processes)
    if "DVC_STAGE" in os.environ:
        checkout.require_no_links(Path("artifacts") / params.run.name)
    if LAUNCHED in os.environ:
        count = int(os.environ["WORLD_SIZE"])
    if count > 1 and options.verb not in TRAINED:
        raise ValueError(
            f"{count} processes; expected one, as of every stage but {', '.join(TRAINED)}"
        )
    if options.verb in TRAINED:
        require_equal_shares(
            {f"{options.verb}.batch_size": getattr(params, options.verb).batch_size}, count
        )
    if count > 1 and LAUNCHED not in os.environ:
        from vla_opd.learning import fsdp

        return fsdp.launch(count, "stages", arguments)
    rank = int(os.environ["RANK"]) if LAUNCHED in os.environ else 0
    graphs = on_or_off("OPD_GRAPHS, or --graphs,", options.graphs)
    host = this_host(
        options.workers,
        options.device,
        options.tracking if rank == 0 else "none",
        METRICS,
        graphs=graphs,
    )
    host = replace(host, share=Share.parse(options.share, os.environ.get(LAUNCH, "")))
    finished = execution(host, params.run.name, options.verb, options.key or options.verb)
    digest = (
        _report_study(params, options.study)
        if options.study
        else _made(options.verb, options.key, params, host)
    )
    if digest is None:
        print(f"{options.verb}: share {host.share} is made")
    elif rank == 0:
        finished(digest)
        print(f"{options.verb}: digest {digest[:12]}")
    return 0


def _say(code: int, verb: str, what: str) -> int:
    """The exit code, once it is said what went wrong. Of processes that train together the first of each machine says it for all of them."""
    if LAUNCHED in os.environ and os.environ["LOCAL_RANK"] != "0":
        time.sleep(FIRST_SPEAKS)  # torchrun ends the others as soon as one has ended
    else:
        print(f"{verb}: {what}", file=sys.stderr, flush=True)
    return code


def _made(verb: str, key: str | None, params: Params, host: Host) -> str | None:
    """The digest of what a stage made, alone or together with others; None if that is a share of something."""
    if LAUNCHED not in os.environ:
        return _run(verb, key, params, host)
    from vla_opd.learning import fsdp

    with fsdp.together(host.device):
        return _run(verb, key, params, host)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stages", description="Run one stage of the run that params.yaml describes."
    )
    parser.set_defaults(key=None, study=None, share="1/1", processes="1", graphs="0")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, key in VERBS.items():
        command = verbs.add_parser(verb)
        if key:
            command.add_argument(key, dest="key", required=True)
        if verb == "report":
            command.add_argument(
                "--study", metavar="NAME", help="of this study's table, not of the run"
            )
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="section.key=value",
            help="override a setting of params.yaml",
        )
        command.add_argument(
            "--workers",
            type=int,
            default=os.environ.get("OPD_WORKERS", "0"),
            help="simulator processes (0: one a core)",
        )
        command.add_argument(
            "--device",
            default=os.environ.get("OPD_DEVICE", "auto"),
            help="torch device (auto: a GPU if there is one)",
        )
        if verb in ROLLED_OUT:
            said = os.environ.get("OPD_GRAPHS", "0")
            command.add_argument(
                "--graphs",
                nargs="?",
                const="1",
                default=said,
                help="capture forward passes as CUDA graphs (OpenVLA-OFT)",
            )
        if verb in SHARED:
            command.add_argument(
                "--share",
                metavar="NUMBER/COUNT",
                default="1/1",
                help="of the shards; whoever runs the stage without it then puts them together",
            )
        if verb in TRAINED:
            command.add_argument(
                "--processes",
                default=os.environ.get("OPD_PROCESSES", "1"),
                help="that train together, each on its own GPU if there are any",
            )
        command.add_argument(
            "--tracking",
            choices=("wandb", "jsonl", "none"),
            default=os.environ.get("OPD_TRACKING", "wandb"),
        )
    return parser


def _run(verb: str, key: str | None, params: Params, host: Host) -> str | None:
    """Find the stage's inputs and output by the layout of `artifacts/<run>/`, and run it. Returns the digest of what it made; None of a share."""
    simulated = verb in SIMULATED or (verb == "label" and params.label.simulates)
    if simulated and params.environment.family in ENVS:
        use_backend()  # once, here: the simulators inherit it, and need not find out each for itself
    stage = importlib.import_module(f"stages.{verb}")
    root = Path("artifacts") / params.run.name
    checkpoints = root / "checkpoints"
    match verb:
        case "demonstrate":
            name = _known(key, params.demonstrations, "demonstrations")
            made = stage.run(params, name, root / "demonstrations" / name, host)
        case "finetune":
            name = _known(key, params.trained, "checkpoint")
            parent = (
                checkpoints / params.finetuned[name].parent if name in params.finetuned else None
            )
            made = stage.run(
                params,
                name,
                root / "demonstrations" / params.trained[name].demonstrations,
                parent,
                checkpoints / name,
                host,
            )
        case "adopt":
            name = _known(key, params.adopt, "adopt")
            made = stage.run(params, name, checkpoints / name, host)
        case "evaluate":
            name = _known(key, params.evaluations, "evaluations")
            made = stage.run(
                params, checkpoints / params.evaluations[name], root / "evaluations" / name, host
            )
        case "report":
            made = stage.run(params, root, root / "report" / "page", host)
        case "explore" | "reinforce":
            made = _run_reinforcement(
                verb, _known(key, params.reinforcements, "reinforcements"), params, root, host
            )
        case _:
            made = _run_iteration(
                verb, _known(key, params.iterations, "iterations"), params, root, host
            )
    return None if made is None else made.digest


def _report_study(params: Params, study: str) -> str:
    from vla_opd.analysis import study_page

    return study_page.run(Path("artifacts") / params.run.name, study).digest


def _run_iteration(
    verb: str, iteration: str, params: Params, root: Path, host: Host
) -> Manifest | None:
    stage = importlib.import_module(f"stages.{verb}")
    checkpoints, trajectories, logits = (
        root / "checkpoints",
        root / "trajectories" / iteration,
        root / "logits" / iteration,
    )
    student = checkpoints / params.iterations[iteration]
    match verb:
        case "sample":
            teacher = checkpoints / params.label.teacher
            _check_what_follows(params, student, teacher)
            return stage.run(params, iteration, student, teacher, trajectories, host)
        case "label":
            return stage.run(params, checkpoints / params.label.teacher, trajectories, logits, host)
        case _:
            return stage.run(
                params,
                iteration,
                student,
                trajectories,
                logits,
                checkpoints / START,
                checkpoints / iteration,
                host,
            )


def _run_reinforcement(
    verb: str, iteration: str, params: Params, root: Path, host: Host
) -> Manifest | None:
    stage = importlib.import_module(f"stages.{verb}")
    checkpoints, trajectories = root / "checkpoints", root / "trajectories" / iteration
    student = checkpoints / params.reinforcements[iteration]
    if verb == "reinforce":
        return stage.run(params, iteration, student, trajectories, checkpoints / iteration, host)
    _require_trainable(params, "reinforce", student)
    return stage.run(params, iteration, student, trajectories, host)


def _check_what_follows(params: Params, student: Path, teacher: Path) -> None:
    """ValueError, before any rollout, for what `label` and `optimize` would refuse after it."""
    from vla_opd.experts import EXPERTS
    from vla_opd.learning.bin_transfer import require_actions
    from vla_opd.learning.objectives import OBJECTIVES, ON_DECISIONS
    from vla_opd.policies.checkpoint import (
        glance,
        open_checkpoint,
        require_environment,
    )  # these bring torch, and --help can do without

    named_function(params.optimize.objective, {**OBJECTIVES, **ON_DECISIONS}, "optimize.objective")
    if params.label.expert is not None:
        named_function(params.label.expert, EXPERTS, "label.expert")
    facts = open_checkpoint(
        teacher
    ).facts  # its bytes too: nobody reads them before `label`. The student's, the stage checks
    require_environment(facts, params.environment, str(teacher))
    require_actions(
        glance(student).facts, facts.action_space, str(teacher), transfer=params.label.transfer
    )
    _require_trainable(params, "optimize", student)


def _require_trainable(params: Params, verb: str, student: Path) -> None:
    """ValueError, before any rollout, for an adapter that can't be trained on the student, or a student that can't be trained without."""
    from vla_opd.policies import lora
    from vla_opd.policies.checkpoint import glance

    lora.require_trainable(
        getattr(params, verb).lora, lora.beside(student), glance(student).dtypes, verb
    )


def _known(key: str | None, choices: object, field: str) -> str:
    names = sorted(choices)  # pyright: ignore[reportArgumentType, reportUnknownVariableType]
    if key not in names:
        raise ValueError(f"{field} is {key!r}; expected one of {names}")
    return str(key)


if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt as interrupt:
        print(f"\n{mistakes.message(interrupt)}", file=sys.stderr)
        code = mistakes.exit_code(interrupt)
    gc.freeze()  # what torch and transformers leave need not be looked through once more: most of a second of each stage
    sys.exit(code)
