"""`python -m stages VERB ...`: run one stage of the run that `params.yaml` describes.

dvc.yaml runs this. Nothing here is part of `params.yaml`: `--workers`, `--device`, `--graphs`,
`--processes` and `--tracking` (or OPD_WORKERS, OPD_DEVICE, OPD_GRAPHS, OPD_PROCESSES, OPD_TRACKING)
say how this machine does the work. Manifests name the device and graphs, because the last bits of
logits depend on them.
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

from stages.catalog import STAGES, Stage, arguments
from vla_opd import mistakes
from vla_opd.artifacts.draft import Share
from vla_opd.artifacts.layout import Layout
from vla_opd.envs import ENVS
from vla_opd.envs.graphics import use_backend
from vla_opd.machine import checkout
from vla_opd.machine.host import (
    LAUNCH,
    METRICS,
    Host,
    let_waiting_threads_sleep,
    parse_flag,
    parse_processes,
    require_equal_bits,
    require_equal_shares,
    resolve_host,
)
from vla_opd.machine.parent_death import STARTED_BY, die_with_parent
from vla_opd.machine.tracking import start_execution
from vla_opd.params.load import load
from vla_opd.params.run import Params

FIRST_REPORTS = 3.0  # seconds
TORCHRUN = "TORCHELASTIC_RUN_ID"  # the environment variable that torchrun's processes have


def main(words: Sequence[str] | None = None) -> int:
    """Run a stage. A mistake is one message on stderr, with the exit code of `mistakes`."""
    options = _parser().parse_args(words)
    # By hand a stage may outlive its terminal. DVC's lock dies with DVC, so DVC's stage must, too.
    if "DVC_STAGE" in os.environ:
        die_with_parent()
    elif STARTED_BY in os.environ:
        die_with_parent(parent=int(os.environ[STARTED_BY]))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return _obey(options, sys.argv[1:] if words is None else words)
    except Exception as error:
        code = mistakes.exit_code(error)
        if code is None:
            raise
        return _report_mistake(code, options.verb, mistakes.message(error))


def _obey(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Run the stage, or start the processes that run it together. Returns the exit code."""
    checkout.require_own_code()
    require_equal_bits()
    let_waiting_threads_sleep()
    params = load("params.yaml", options.set)
    if "DVC_STAGE" in os.environ:
        checkout.require_no_links(Layout.of_run(params.run.name).root)
    count = _process_count(options, params)
    if count > 1 and TORCHRUN not in os.environ:
        from vla_opd.learning import fsdp

        return fsdp.launch(count, "stages", words)
    rank = int(os.environ["RANK"]) if TORCHRUN in os.environ else 0
    host = _host(options, rank)
    finished = start_execution(host, params.run.name, options.verb, options.key or options.verb)
    digest = _make(options, params, host)
    if digest is None:
        print(f"{options.verb}: share {host.share} is made")
    elif rank == 0:
        finished(digest)
        print(f"{options.verb}: digest {digest[:12]}")
    return 0


def _process_count(options: argparse.Namespace, params: Params) -> int:
    """Return how many processes train together. ValueError if stage or batch do not allow it."""
    count = parse_processes(options.processes)
    if TORCHRUN in os.environ:
        count = int(os.environ["WORLD_SIZE"])
    if STAGES[options.verb].trains:
        batch_size = getattr(params, options.verb).batch_size
        require_equal_shares({f"{options.verb}.batch_size": batch_size}, count)
    elif count > 1:
        trained = ", ".join(verb for verb, stage in STAGES.items() if stage.trains)
        raise ValueError(f"{count} processes; expected one, as of every stage but {trained}")
    return count


def _host(options: argparse.Namespace, rank: int) -> Host:
    host = resolve_host(
        options.workers,
        options.device,
        options.tracking if rank == 0 else "none",
        METRICS,
        graphs=parse_flag("OPD_GRAPHS, or --graphs,", options.graphs),
    )
    return replace(host, share=Share.parse(options.share, os.environ.get(LAUNCH, "")))


def _report_mistake(code: int, verb: str, message: str) -> int:
    """Print what went wrong and return the exit code.

    Of processes that train together, the first on each machine prints it for all of them.
    """
    if TORCHRUN in os.environ and os.environ["LOCAL_RANK"] != "0":
        time.sleep(FIRST_REPORTS)  # torchrun ends the others as soon as one has ended
    else:
        print(f"{verb}: {message}", file=sys.stderr, flush=True)
    return code


def _make(options: argparse.Namespace, params: Params, host: Host) -> str | None:
    """Make the artifact, alone or together with other processes. Returns its digest.

    None after a share of it.
    """
    if options.study:
        from vla_opd.pages import study_page

        return study_page.run(Layout.of_run(params.run.name).root, options.study).digest
    if TORCHRUN not in os.environ:
        return _run(options.verb, options.key, params, host)
    from vla_opd.learning import fsdp

    with fsdp.together(host.device):
        return _run(options.verb, options.key, params, host)


def _run(verb: str, key: str | None, params: Params, host: Host) -> str | None:
    """Run the stage on its inputs. Returns the digest of its artifact; None after a share."""
    inputs = arguments(verb, params, key or "")
    if STAGES[verb].simulates(params) and params.environment.family in ENVS:
        use_backend()  # once for all simulators, which inherit it
    if verb == "sample":
        from vla_opd.learning import preflight  # these bring torch, which --help can do without

        preflight.check_sample(params, inputs["student"], inputs["teacher"])
    elif verb == "explore":
        from vla_opd.learning import preflight

        preflight.check_explore(params, inputs["student"])
    stage = importlib.import_module(f"stages.{verb}")
    manifest = stage.run(**inputs, host=host)
    return None if manifest is None else manifest.digest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stages", description="Run one stage of the run that params.yaml describes."
    )
    parser.set_defaults(key=None, study=None, share="1/1", processes="1", graphs="0")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, stage in STAGES.items():
        command = verbs.add_parser(verb)
        if stage.option:
            command.add_argument(stage.option, dest="key", required=True)
        if verb == "report":
            command.add_argument("--study", metavar="NAME", help="of this study, not of the run")
        _add_common(command)
        _add_special(command, stage)
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
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
        help="simulator processes (0: one per core)",
    )
    command.add_argument(
        "--device",
        default=os.environ.get("OPD_DEVICE", "auto"),
        help="torch device (auto: a GPU if there is one)",
    )
    command.add_argument(
        "--tracking",
        choices=("wandb", "jsonl", "none"),
        default=os.environ.get("OPD_TRACKING", "wandb"),
    )


def _add_special(command: argparse.ArgumentParser, stage: Stage) -> None:
    if stage.rolls_out:
        command.add_argument(
            "--graphs",
            nargs="?",
            const="1",
            default=os.environ.get("OPD_GRAPHS", "0"),
            help="capture forward passes as CUDA graphs (OpenVLA-OFT)",
        )
    if stage.shares:
        command.add_argument(
            "--share",
            metavar="NUMBER/COUNT",
            default="1/1",
            help="make only this share of the shards; the stage without --share puts them together",
        )
    if stage.trains:
        command.add_argument(
            "--processes",
            default=os.environ.get("OPD_PROCESSES", "1"),
            help="processes that train together, each on its own GPU if there are any",
        )


if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt as interrupt:
        print(f"\n{mistakes.message(interrupt)}", file=sys.stderr)
        code = mistakes.exit_code(interrupt)
    gc.freeze()  # skips a last collection of what torch and transformers leave: up to a second
    sys.exit(code)
