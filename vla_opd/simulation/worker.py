"""The simulator process: it owns one `Env` and runs commands in it until its parent is gone."""

import functools
import math
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
    """The reply to a command that raised an exception.

    text:    its traceback.
    mistake: the message of a ValueError; None for any other exception.
    """

    text: str
    mistake: str | None = None


def serve(pipe: int, shared: int, parent: int) -> None:
    """Run commands until the parent is gone; the first one makes the environment.

    pipe, shared: file descriptors of the connection and of the shared memory.
    """
    die_with_parent(parent=parent)
    # Ctrl-C is handled by the parent, which then closes the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Children of a simulator must not keep the pipe open after this process has died.
    os.set_inheritable(pipe, False)
    os.set_inheritable(shared, False)
    connection = mpc.Connection(pipe)
    environment, capacity = connection.recv()
    block = map_frames(shared, environment, capacity)
    simulator = functools.cache(lambda: make_env(environment))
    for command in _receive_commands(connection):
        connection.send(_reply(command, simulator, block))
    if simulator.cache_info().currsize:
        simulator().close()


def _receive_commands(connection: mpc.Connection) -> Iterator[Command]:
    while True:
        try:
            command = connection.recv()
        except (EOFError, ConnectionResetError):  # the parent closed the pool, or is dead
            return
        yield command


def _reply(command: Command, simulator: Callable[[], Env], block: Frames) -> Outcome | Crash:
    began = time.perf_counter()
    try:
        outcome = _move_frames(command(simulator()), block)
    except Exception as error:  # noqa: BLE001 - any exception travels to the parent
        # A plain ValueError is the user's mistake; its subclasses (LinAlgError, UnicodeDecodeError,
        # ...) come from inside a simulator.
        mistake = str(error) if type(error) is ValueError else None
        return Crash(traceback.format_exc(), mistake)
    return replace(
        outcome,
        seconds=time.perf_counter() - began,
        environment=dict(simulator().describe()),
    )


def _move_frames(outcome: Outcome, block: Frames) -> Outcome:
    """Move an outcome's frames into the shared memory."""
    count, *shape = outcome.frames.shape
    capacity, *expected = block.shape
    if count and shape != expected:
        raise ValueError(
            f"environment.family: frames of shape {shape}; expected {expected}, "
            "as environment.cameras and image_size say"
        )
    assert count <= capacity, f"{count} observations in one reply; the pool has room for {capacity}"
    if count:
        block[:count] = outcome.frames
    return replace(outcome, frames=block[:0])


def map_frames(shared: int, environment: EnvironmentParams, capacity: int) -> Frames:
    """Map a file descriptor's memory as frames."""
    shape = frames_shape(environment, capacity)
    memory = mmap.mmap(shared, math.prod(shape))
    return np.frombuffer(memory, np.uint8).reshape(shape)


def frames_shape(environment: EnvironmentParams, capacity: int) -> tuple[int, ...]:
    """Return the shape of a worker's frames, of one byte each: capacity x C x H x W x 3."""
    size = environment.image_size
    return (capacity, len(environment.cameras), size, size, 3)
