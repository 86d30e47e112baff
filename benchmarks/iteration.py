"""Where the processor time of one iteration goes: `python -m benchmarks.iteration it001`, after a run that has made it.

The three stages run again, as commands, on the run's own inputs; then their parts are repeated alone, in this process: the physics by replaying the
recorded actions without frames, the rendering as what frames add to that, the inference by asking the student again at every decision.
Shares of processor time, all processes together, so other load on the machine matters less; run it on the machine's own anyway.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from stages import label, optimize
from vla_opd.data.trajectory import Episode, Observations, read_shard, shards
from vla_opd.envs import Env, make_env
from vla_opd.envs.graphics import use_backend
from vla_opd.machine.host import Host
from vla_opd.params.load import load
from vla_opd.params.run import Params
from vla_opd.params.stages import START
from vla_opd.policies.checkpoint import open_checkpoint
from vla_opd.policies.load import load_policy


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("iteration")
    arguments = parser.parse_args()
    params = load("params.yaml")
    with tempfile.TemporaryDirectory() as scratch:
        stages = dict(_stages(params, arguments.iteration, Path(scratch)))
        parts = dict(_parts(params, arguments.iteration, Path(scratch)))
    whole = sum(stages.values())
    print(
        f"stages: {', '.join(f'{name} {seconds / whole:.0%}' for name, seconds in stages.items())}"
    )
    parts["the rest (start-up, checks, files)"] = whole - sum(parts.values())
    for name, seconds in parts.items():
        print(f"  {name:<36} {seconds / whole:6.1%}")


def _stages(params: Params, iteration: str, scratch: Path) -> Iterator[tuple[str, float]]:
    """Processor seconds of the three commands, in a folder of their own whose inputs are links to the run's."""
    run = scratch / "artifacts" / params.run.name
    run.mkdir(parents=True)
    for source in (Path.cwd() / "params.yaml", Path.cwd() / "stages", Path.cwd() / "vla_opd"):
        (scratch / source.name).symlink_to(source)
    (run / "checkpoints").mkdir()
    for name in (params.iterations[iteration], params.label.teacher):
        (run / "checkpoints" / name).symlink_to(_run(params) / "checkpoints" / name)
    for verb in ("sample", "label", "optimize"):
        began = _children()
        command = [
            sys.executable,
            "-m",
            "stages",
            verb,
            "--iteration",
            iteration,
            "--tracking",
            "jsonl",
        ]
        subprocess.run(command, cwd=scratch, check=True)  # noqa: S603 - our own command
        yield verb, _children() - began


def _parts(params: Params, iteration: str, scratch: Path) -> Iterator[tuple[str, float]]:
    trajectories, logits = (_run(params) / kind / iteration for kind in ("trajectories", "logits"))
    student, teacher, initial = (
        _run(params) / "checkpoints" / name
        for name in (params.iterations[iteration], params.label.teacher, START)
    )
    episodes = [episode for shard in shards(trajectories) for episode in read_shard(shard)]
    use_backend()
    env = make_env(params.environment)
    physics = _timed(lambda: _replay(env, episodes, params, 0))
    yield "physics and resets", physics
    yield (
        "rendering",
        _timed(lambda: _replay(env, episodes, params, params.sample.observe_every)) - physics,
    )
    yield "inference", _timed(lambda: _decide_again(params, student, episodes))
    host = Host(workers=1)
    yield (
        "labelling",
        _timed(lambda: label.run(params, teacher, trajectories, scratch / "logits", host)),
    )
    yield (
        "optimisation",
        _timed(
            lambda: optimize.run(
                params,
                iteration,
                student,
                trajectories,
                logits,
                initial,
                scratch / "checkpoint",
                host,
            )
        ),
    )


def _replay(env: Env, episodes: list[Episode], params: Params, observe_every: int) -> None:
    for episode in episodes:
        env.reset(episode.placement)
        for first in range(0, episode.steps, params.policy.chunk):
            env.advance(episode.actions[first : first + params.policy.chunk], observe_every)


def _decide_again(params: Params, student: Path, episodes: list[Episode]) -> None:
    torch.set_num_threads(1)
    policy = load_policy(open_checkpoint(student), "cpu")
    for episode in episodes:
        decisions = np.flatnonzero(episode.step % params.policy.chunk == 0)
        for row in decisions:
            with torch.inference_mode():
                policy.logits(
                    Observations(
                        episode.frames[row : row + 1],
                        episode.proprio[row : row + 1],
                        (episode.instruction,),
                    )
                )


def _run(params: Params) -> Path:
    return (Path("artifacts") / params.run.name).resolve()


def _timed(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "passive"
    )  # a thread that waits is not to count as work
    main()
