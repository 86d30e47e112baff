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
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in stages.items())
    print(f"stages: {shares}")
    parts["the rest (start-up, checks, files)"] = total - sum(parts.values())
    for name, seconds in parts.items():
        print(f"  {name:<36} {seconds / total:6.1%}")


def time_stages(params: Params, iteration: str, scratch: Path) -> Iterator[tuple[str, float]]:
    """Yield the processor seconds of the three commands, in a folder with links to their inputs."""
    project = Path.cwd()
    original = Layout(Layout.of_run(params.run.name).root.resolve())
    layout = Layout(scratch / "artifacts" / params.run.name)
    for name in ("params.yaml", "stages", "vla_opd"):
        (scratch / name).symlink_to(project / name)
    (layout.root / "checkpoints").mkdir(parents=True)
    for name in (params.iterations[iteration], params.label.teacher):
        layout.checkpoint(name).symlink_to(original.checkpoint(name))
    for verb in ("sample", "label", "optimize"):
        began = _seconds_of_children()
        command = [sys.executable, "-m", "stages", verb, "--iteration", iteration]
        subprocess.run([*command, "--tracking", "jsonl"], cwd=scratch, check=True)  # noqa: S603
        yield verb, _seconds_of_children() - began


def time_parts(params: Params, iteration: str, scratch: Path) -> Iterator[tuple[str, float]]:
    """Yield the processor seconds of the stages' parts, repeated in this process."""
    layout = Layout.of_run(params.run.name)
    student = layout.checkpoint(params.iterations[iteration])
    episodes: list[Episode] = []
    for shard in shards(layout.trajectories(iteration)):
        episodes.extend(read_shard(shard))
    use_backend()
    env = make_env(params.environment)
    physics = _timed(lambda: _replay(env, episodes, params, 0))
    yield "physics and resets", physics
    with_frames = _timed(lambda: _replay(env, episodes, params, params.sample.observe_every))
    yield "rendering", with_frames - physics
    yield "inference", _timed(lambda: _decide_again(params, student, episodes))
    host = Host(workers=1)
    labeling = stage_arguments("label", params, iteration)
    labeling["out"] = scratch / "labels"
    yield "labeling", _timed(lambda: label.run(**labeling, host=host))
    updating = stage_arguments("optimize", params, iteration)
    updating["out"] = scratch / "checkpoint"
    yield "optimization", _timed(lambda: optimize.run(**updating, host=host))


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
            observation = Observations(
                episode.frames[row : row + 1],
                episode.proprio[row : row + 1],
                (episode.instruction,),
            )
            with torch.inference_mode():
                policy.logits(observation)


def _timed(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    # A thread that waits must not count as work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
