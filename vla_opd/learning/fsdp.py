"""Several processes that train one policy: PyTorch's FSDP2, under torchrun.

Each process has a share of every batch's states, and of the weights, the gradient and the optimiser's moments; a block's weights are whole only while
it computes. What is read and written is what a process alone reads and writes, so that checkpoints and saves of any launch go on in any other.
A process alone is left as it is, bit for bit. The first process is the one that writes; what the others make ready is thrown away.
"""

import copy
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vla_opd.artifacts.draft import BusyError, Draft, draft
from vla_opd.artifacts.manifest import Kind, Manifest, read_manifest
from vla_opd.machine.host import require_equal_shares
from vla_opd.machine.parent_death import STARTED_BY
from vla_opd.seeds import derive

PATIENCE = timedelta(
    hours=12
)  # for which the others wait while the first writes and hashes; a process that dies ends all of them at once


def rank() -> int:
    """The number of this process among those that train together; the first, 0, leads."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextmanager
def together(device: str) -> Generator[None]:
    """Be one of the processes that torchrun started, each with a GPU of its own; a process that it did not start is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if ":" in device:
        raise ValueError(
            f"device is {device!r}; expected 'cuda' or 'auto' for processes that train together: each has a GPU of its own"
        )
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()


def launch(processes: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m MODULE ARGUMENTS` as so many processes of this machine that train together. The exit code of the first that failed, or 0."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # torchrun says at length that it does so; the stages set their own number
    os.environ[STARTED_BY] = str(os.getpid())
    with (
        TemporaryDirectory() as logs
    ):  # torchrun makes a folder for them in any case, and leaves it
        try:
            run(
                parse_args(
                    [
                        "--standalone",
                        f"--nproc-per-node={processes}",
                        f"--log-dir={logs}",
                        "-m",
                        module,
                        *arguments,
                    ]
                )
            )
        except ChildFailedError as error:
            return error.get_first_failure()[1].exitcode
    return 0


def share(rows: Int[np.ndarray, " B"]) -> Int[np.ndarray, " b"]:
    """This process's states of a batch: every `count()`-th. ValueError if they can't be shared out evenly."""
    require_equal_shares({"batch_size": len(rows)}, count())
    return rows[rank() :: count()]


def own(seed: int) -> int:
    """A seed for what this process draws of its share: the first's is that of a process alone."""
    return derive(seed, "rank", rank()) if rank() else seed


@contextmanager
def sharded(policy: Any) -> Generator[Any]:
    """A copy of the policy to train, shared out over the processes; what it has learnt is in the policy itself at the end. Alone, the policy."""
    if count() == 1:
        yield policy
        return
    device = next(policy.parameters()).device
    shared = _cut(copy.deepcopy(policy.cpu()), device.type)
    yield shared
    learnt = dict(shared.named_parameters())
    with torch.no_grad():
        for name, one in policy.named_parameters():
            if one.requires_grad:
                one.copy_(entire(learnt[name]))
    policy.to(device)


def blocks(policy: nn.Module) -> list[nn.Module]:
    """What is gathered by itself, for as long as it computes: each block of each stack of blocks. What is left is gathered as a whole."""
    return [
        block for stack in policy.modules() if isinstance(stack, nn.ModuleList) for block in stack
    ]


def _cut(policy: Any, device: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device, (count(),))
    for block in blocks(policy):
        fully_shard(block, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    register_fsdp_forward_method(policy, "logits")
    return policy


def weighted(loss: Float[Tensor, ""], tokens: int) -> Float[Tensor, ""]:
    """The mean over this process's `tokens` valid tokens, weighted: the mean of the processes', which FSDP takes, is then that over all tokens."""
    return loss if count() == 1 else loss * (tokens * count() / _total([tokens])[0])


def mean(values: Mapping[str, float], tokens: int) -> dict[str, float]:
    """Means over all processes' valid tokens, of means over each one's own."""
    if count() == 1:
        return dict(values)
    *sums, tokens_of_all = _total([*(value * tokens for value in values.values()), tokens])
    return {name: total / tokens_of_all for name, total in zip(values, sums, strict=True)}


def _total(values: Sequence[float]) -> list[float]:
    """Sums over the processes."""
    summed = torch.tensor(
        values, dtype=torch.float64, device="cuda" if distributed.get_backend() == "nccl" else "cpu"
    )
    distributed.all_reduce(summed)
    return summed.tolist()


def wait() -> None:
    """Until every process has come here."""
    if count() > 1:
        distributed.barrier()


def require_agreement(number: int, what: str) -> None:
    """ValueError unless all processes have the same number."""
    if count() > 1 and (average := _total([number])[0] / count()) != number:
        raise ValueError(
            f"{what} is {number} here, {average:g} in the mean of all processes; expected the same, in a folder that all of them see"
        )


def entire(tensor: Tensor) -> Tensor:
    """All of a tensor that is shared out, in every process. Every process has to ask at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is shared out, in the first process's memory; nothing of it in the others'. Every process has to ask at once."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = entire(tensor)
    return full.cpu() if rank() == 0 else full.to("meta")


def cut(tensor: Float[Tensor, "..."], like: Tensor) -> Tensor:
    """This process's part of a whole tensor, shared out as another of its shape is."""
    if not isinstance(like, DTensor) or not tensor.ndim:  # AdamW's count of steps is everybody's
        return tensor
    return distribute_tensor(
        tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


class _Follower(Draft):
    """What the first process writes, to the others: they have the name, and wait."""

    def publish(self, facts: Mapping[str, Any]) -> Manifest:
        """The manifest that the first process has published."""
        del facts
        wait()
        return read_manifest(self.target, self.kind)


@contextmanager
def shared_draft(
    target: Path, kind: Kind, parents: Mapping[str, str], params: Mapping[str, Any]
) -> Generator[Draft]:
    """`draft`, which only the first process writes: the others' is there when its is, and published when its is.

    ValueError in a process that has other inputs, settings, code or packages than the first, or doesn't see its draft.
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
    """Whether every process is ready, once each has said so of itself."""
    return count() == 1 or _total([float(ready)])[0] == count()
