"""Several processes that train one policy: PyTorch's FSDP2, under torchrun.

Each process has a share of the states of every batch, of the weights, the gradient and the
optimizer's moments; a block's weights are gathered only while it computes. Files are those that a
single process reads and writes, so that a launch with any number of processes resumes them. A
single process computes as it would without this module, bit for bit. The first process writes; what
the others prepare is discarded.
"""

import copy
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed, nn

from vla_opd.artifacts.draft import BusyError, Draft, draft
from vla_opd.artifacts.manifest import Kind, Manifest, read_manifest
from vla_opd.machine.host import require_equal_shares
from vla_opd.machine.parent_death import STARTED_BY
from vla_opd.seeds import derive

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# How long the others wait while the first process writes and hashes. If one dies, all end at once.
PATIENCE = timedelta(hours=12)
Model = TypeVar("Model", bound=nn.Module)


def rank() -> int:
    """The number of this process among those that train together; the first is 0."""
    if not distributed.is_initialized():
        return 0
    return distributed.get_rank()


def count() -> int:
    """The number of processes that train together."""
    if not distributed.is_initialized():
        return 1
    return distributed.get_world_size()


@contextmanager
def together(device: str) -> Generator[None]:
    """Join the processes that torchrun started, each with a GPU of its own.

    A process that torchrun did not start stays alone. ValueError for a device with a number.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if ":" in device:
        raise ValueError(
            f"device is {device!r}; expected 'cuda' or 'auto' for processes that train together: "
            "each has a GPU of its own"
        )
    backend = "gloo"
    if device.startswith("cuda"):
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def launch(processes: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m MODULE ARGUMENTS` in processes of this machine that train together.

    Returns the exit code of the first that failed, or 0.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # Unset, torchrun sets it with a long message; the stages set their own number.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[STARTED_BY] = str(os.getpid())
    with TemporaryDirectory() as logs:  # torchrun makes a folder for logs in any case
        options = ["--standalone", f"--nproc-per-node={processes}", f"--log-dir={logs}"]
        try:
            run(parse_args([*options, "-m", module, *arguments]))
        except ChildFailedError as error:
            return error.get_first_failure()[1].exitcode
    return 0


def share(rows: Int[np.ndarray, " B"]) -> Int[np.ndarray, " b"]:
    """Return this process's states of a batch: every `count()`-th.

    ValueError if the processes' shares would differ in size.
    """
    require_equal_shares({"batch_size": len(rows)}, count())
    return rows[rank() :: count()]


def process_seed(seed: int) -> int:
    """Return the seed of this process's own draws; the first draws as a single process does."""
    if rank() == 0:
        return seed
    return derive(seed, "rank", rank())


@contextmanager
def sharded(policy: Model) -> Generator[Model]:
    """Yield a sharded copy of the policy to train; at the end the policy gets its weights.

    A single process trains the policy itself.
    """
    if count() == 1:
        yield policy
        return
    device = next(policy.parameters()).device
    shared = _shard(copy.deepcopy(policy.cpu()), device.type)
    yield shared
    learned = dict(shared.named_parameters())
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(gather(learned[name]))
    policy.to(device)


def blocks(policy: nn.Module) -> list[nn.Module]:
    """Return the blocks of all stacks: each is gathered by itself, while it computes.

    What is in no block is gathered together.
    """
    gathered: list[nn.Module] = []
    for module in policy.modules():
        if isinstance(module, nn.ModuleList):
            gathered.extend(module)
    return gathered


def _shard(policy: Model, device: str) -> Model:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device, (count(),))
    for block in blocks(policy):
        fully_shard(block, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    register_fsdp_forward_method(policy, "logits")
    return policy


def weighted(loss: Float[Tensor, ""], tokens: int) -> Float[Tensor, ""]:
    """Return this process's mean loss, weighted by its number of valid tokens.

    FSDP averages over n processes; with weights n `tokens` / (tokens of all processes) that
    average is the mean over all tokens.
    """
    if count() == 1:
        return loss
    (total,) = _sum_over_processes([tokens])
    return loss * (tokens * count() / total)


def mean(values: Mapping[str, float], tokens: int) -> dict[str, float]:
    """Return means over all processes' valid tokens from those over each process's `tokens`."""
    if count() == 1:
        return dict(values)
    sums = [value * tokens for value in values.values()]
    *totals, all_tokens = _sum_over_processes([*sums, tokens])
    return {name: total / all_tokens for name, total in zip(values, totals, strict=True)}


def _sum_over_processes(values: Sequence[float]) -> list[float]:
    device = "cpu"
    if distributed.get_backend() == "nccl":
        device = "cuda"
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(sums)
    return sums.tolist()


def wait() -> None:
    """Wait until every process has come here."""
    if count() > 1:
        distributed.barrier()


def require_agreement(number: int, name: str) -> None:
    """ValueError unless all processes have the same number."""
    if count() == 1:
        return
    average = _sum_over_processes([number])[0] / count()
    if average != number:
        raise ValueError(
            f"{name} is {number} here, {average:g} in the mean of all processes; "
            "expected the same, in a folder that all of them see"
        )


def gather(tensor: Tensor) -> Tensor:
    """Return all of a sharded tensor, in every process. All processes have to call it."""
    if not _is_sharded(tensor):
        return tensor
    return tensor.full_tensor()


def gather_on_first(tensor: Tensor) -> Tensor:
    """Return all of a sharded tensor in the first process's host memory, a meta tensor elsewhere.

    All processes have to call it.
    """
    if not _is_sharded(tensor):
        return tensor
    full = gather(tensor)
    return full.to("cpu" if rank() == 0 else "meta")


def shard_as(tensor: Float[Tensor, "..."], reference: Tensor) -> Tensor:
    """Return this process's part of a full tensor, sharded as another one of its shape."""
    if not _is_sharded(reference) or not tensor.ndim:  # AdamW's step count is everyone's
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor.to(reference.device),
        reference.device_mesh,
        reference.placements,
        src_data_rank=None,
    )


def _is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    if count() == 1:
        return False
    from torch.distributed.tensor import DTensor  # half a second

    return isinstance(tensor, DTensor)


class _Follower(Draft):
    """The first process's draft, as the others see it: they know its name, and wait."""

    def publish(self, facts: Mapping[str, Any]) -> Manifest:
        """Return the manifest that the first process has published."""
        del facts
        wait()
        return read_manifest(self.target, self.kind)


@contextmanager
def shared_draft(
    target: Path, kind: Kind, parents: Mapping[str, str], params: Mapping[str, Any]
) -> Generator[Draft]:
    """Yield a draft of which only the first process writes and publishes.

    The others begin after it has begun, and end after it has published. ValueError in a process
    with other inputs, settings, code or packages than the first, or that does not see its draft.
    """
    if rank():
        if not _all_are(ready=True):
            raise BusyError(f"{target}: the first process could not begin")
        work = _Follower(target, kind, parents, params)
        work.require_same_fingerprint()
        yield work
        return
    with ExitStack() as held:
        try:
            work = held.enter_context(draft(target, kind, parents, params))
        except BaseException:
            _all_are(ready=False)
            raise
        _all_are(ready=True)
        if count() > 1:
            work.record_made_with({"processes": str(count())})
        yield work
        wait()


def _all_are(*, ready: bool) -> bool:
    """Return whether every process is ready, once each has reported."""
    if count() == 1:
        return True
    (reports,) = _sum_over_processes([float(ready)])
    return reports == count()
