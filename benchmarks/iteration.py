"""How the processor time of one iteration is spent.

`python -m benchmarks.iteration it001`, after a run that has made it.

The three stages run again, as commands, on the run's own inputs. Then their parts are repeated
alone, in this process: physics by replaying the recorded actions without frames, rendering as the
additional time with frames, inference by querying the student again at every decision. Shares are
of processor time, over all processes, so other load on the machine matters less; still run it on an
idle machine.
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
from typing import Any

import numpy as np
import torch

from stages import label, optimize
from stages.catalog import arguments as stage_arguments
from vla_opd.artifacts.layout import Layout
from vla_opd.data.trajectory import Episode, Observations, read_shard, shards
from vla_opd.envs import Env, make_env
from vla_opd.envs.graphics import use_backend
from vla_opd.machine.host import Host
from vla_opd.params.load import load
from vla_opd.params.run import Params
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
        stages = dict(time_stages(params, arguments.iteration, Path(scratch)))
        parts = dict(time_parts(params, arguments.iteration, Path(scratch)))
    total = sum(stages.values())
    for name, seconds in stages.items():
        share = seconds / total
        print(f"{name:<38} {share:6.1%}")
    in_parts = sum(parts.values())
    parts["start-up, checks, files"] = total - in_parts
    for name, seconds in parts.items():
        share = seconds / total
        print(f"  {name:<36} {share:6.1%}")


def time_stages(params: Params, iteration: str, scratch: Path) -> Iterator[tuple[str, float]]:
    """Yield the processor seconds of the three commands, in a folder with links to their inputs."""
    original = Layout.of_run(params.run.name)
    copy = Layout(scratch / original.root)
    for name in ("params.yaml", "stages", "vla_opd"):
        link(Path(name), scratch / name)
    for name in (params.iterations[iteration], params.label.teacher):
        link(original.checkpoint(name), copy.checkpoint(name))
    for verb in ("sample", "label", "optimize"):
        began = _seconds_of_children()
        options = ["--iteration", iteration, "--tracking", "jsonl"]
        command = [sys.executable, "-m", "stages", verb, *options]
        subprocess.run(command, cwd=scratch, check=True)  # noqa: S603 - our own command
        yield verb, _seconds_of_children() - began


def link(original: Path, copy: Path) -> None:
    """Link a file or folder under another name, in folders that are made for it."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.symlink_to(original.resolve())


def time_parts(params: Params, iteration: str, scratch: Path) -> Iterator[tuple[str, float]]:
    """Yield the processor seconds of the stages' parts, repeated in this process."""
    layout = Layout.of_run(params.run.name)
    student = layout.checkpoint(params.iterations[iteration])
    episodes: list[Episode] = []
    for shard in shards(layout.trajectories(iteration)):
        episodes.extend(read_shard(shard))
    use_backend()
    env = make_env(params.environment)
    chunk = params.policy.chunk
    physics = _timed(_replay, env, episodes, chunk, observe_every=0)
    yield "physics and resets", physics
    every = params.sample.observe_every
    with_frames = _timed(_replay, env, episodes, chunk, observe_every=every)
    yield "rendering", with_frames - physics
    yield "inference", _timed(_decide_again, student, episodes, chunk)
    host = Host(workers=1)
    labeling = stage_arguments("label", params, iteration)
    labeling["out"] = scratch / "labels"
    yield "labeling", _timed(label.run, **labeling, host=host)
    updating = stage_arguments("optimize", params, iteration)
    updating["out"] = scratch / "checkpoint"
    yield "optimization", _timed(optimize.run, **updating, host=host)


def _replay(env: Env, episodes: list[Episode], chunk: int, *, observe_every: int) -> None:
    for episode in episodes:
        env.reset(episode.placement)
        for first in range(0, episode.steps, chunk):
            actions = episode.actions[first : first + chunk]
            env.advance(actions, observe_every)


def _decide_again(student: Path, episodes: list[Episode], chunk: int) -> None:
    torch.set_num_threads(1)
    policy = load_policy(open_checkpoint(student), "cpu")
    for episode in episodes:
        decisions = np.flatnonzero(episode.step % chunk == 0)
        for row in decisions:
            rows = slice(row, row + 1)
            observation = Observations(
                frames=episode.frames[rows],
                proprio=episode.proprio[rows],
                instructions=(episode.instruction,),
            )
            with torch.inference_mode():
                policy.logits(observation)


def _timed(work: Callable[..., object], /, *arguments: Any, **options: Any) -> float:
    began = time.process_time()
    work(*arguments, **options)
    return time.process_time() - began


def _seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    # A thread that waits must not count as work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
