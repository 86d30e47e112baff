"""The simulator process: it owns one `Env`, and runs commands in it until its parent is gone."""

import functools
import mmap
import multiprocessing.connection as mpc
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from vla_opd.envs import make_env
from vla_opd.envs.protocol import Env
from vla_opd.machine.parent_death import die_with_parent
from vla_opd.params.stages import EnvironmentParams
from vla_opd.simulation.jobs import Command, Frames, Outcome


@dataclass(frozen=True)
class Crash:
    """What is sent in place of an outcome when a command raised: `mistake` is a ValueError's own text."""

    text: str
    mistake: str | None = None


def serve(pipe: int, shared: int, parent: int) -> None:
    """The worker's life: make the environment at the first command, run commands until the parent is gone. `pipe`, `shared`: file descriptors."""
    die_with_parent(parent=parent)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the parent, which then closes the pool
    for descriptor in (pipe, shared):
        os.set_inheritable(
            descriptor, False
        )  # a simulator's own child would keep the pipe open beyond our death
    connection = mpc.Connection(pipe)
    environment, capacity = connection.recv()
    block = frames_in(shared, environment, capacity)
    simulator = functools.cache(lambda: make_env(environment))
    for command in _commands(connection):
        connection.send(_reply(command, simulator, block))
    if simulator.cache_info().currsize:
        simulator().close()


def _commands(connection: mpc.Connection) -> Iterator[Command]:
    while True:
        try:
            command = connection.recv()
        except (EOFError, ConnectionResetError):  # the parent closed the pool, or is dead
            return
        yield command


def _reply(command: Command, simulator: Callable[[], Env], block: Frames) -> Outcome | Crash:
    began = time.perf_counter()
    try:
        done = _publish(command(simulator()), block)
    except Exception as error:  # noqa: BLE001 - the process boundary: whatever it is, it travels to the parent
        # ValueError itself is a user's mistake; its subclasses (LinAlgError, UnicodeDecodeError, ...) come from inside a simulator.
        return Crash(traceback.format_exc(), str(error) if type(error) is ValueError else None)
    return replace(
        done, seconds=time.perf_counter() - began, environment=dict(simulator().describe())
    )


def _publish(done: Outcome, block: Frames) -> Outcome:
    """Move the frames into shared memory."""
    count = len(done.frames)
    if count and done.frames.shape[1:] != block.shape[1:]:
        raise ValueError(
            f"environment.family: frames of shape {done.frames.shape[1:]}; expected {block.shape[1:]}, as environment.cameras and image_size say"
        )
    assert count <= len(block), (
        f"{count} observations in one reply; the pool was made for {len(block)}"
    )
    block[:count] = done.frames if count else block[:0]
    return replace(done, frames=block[:0])


def frames_in(shared: int, environment: EnvironmentParams, capacity: int) -> Frames:
    """The shared memory behind a file descriptor, as frames: capacity x C x H x W x 3 bytes."""
    shape = (capacity, len(environment.cameras), environment.image_size, environment.image_size, 3)
    return np.frombuffer(mmap.mmap(shared, int(np.prod(shape))), np.uint8).reshape(shape)
