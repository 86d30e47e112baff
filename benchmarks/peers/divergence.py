"""Our reverse KL beside torch's `kl_div` and TRL's `generalized_jsd_loss`.

`python -m benchmarks.peers.divergence [--rows 448] [--vocabulary 32064] [--threads 1]`

From logits of student and teacher to the gradient for the student's. TRL belongs in an environment
of its own, which also has this project: `pip install trl==1.16.0`. Without it, its row is left out.
Prints the ratio of times, peer / ours; the gradients are compared first.
"""

import argparse
import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from benchmarks.peers.duel import duel
from vla_opd.learning.kl import kl

Loss = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    """Print a row per peer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=448)
    parser.add_argument("--vocabulary", type=int, default=32_064)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=11)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    student = torch.randn(arguments.rows, arguments.vocabulary, requires_grad=True)
    teacher = 2 * torch.randn(arguments.rows, arguments.vocabulary)
    print(f"{'time, peer / ours':<28} {'min':>6} {'median':>6} {'max':>6}")
    for name, loss in peers().items():
        torch.testing.assert_close(
            gradient(loss, student, teacher), gradient(reverse_kl, student, teacher)
        )
        duel(
            name,
            lambda: gradient(reverse_kl, student, teacher),
            lambda loss=loss: gradient(loss, student, teacher),
            arguments.repeats,
        )


def gradient(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the gradient of a loss for the student's logits."""
    student.grad = None
    loss(student, teacher).backward()
    assert student.grad is not None
    return student.grad


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return our mean reverse KL."""
    return kl(log_softmax(student, -1), log_softmax(teacher, -1)).mean()


def peers() -> dict[str, Loss]:
    """Return the losses of the peers that are installed."""
    losses: dict[str, Loss] = {"torch kl_div": _torch}
    if importlib.util.find_spec("trl") is not None:
        losses["TRL generalized_jsd_loss"] = _trl
    return losses


def _torch(student: Tensor, teacher: Tensor) -> Tensor:
    return kl_div(
        log_softmax(teacher, -1), log_softmax(student, -1), reduction="batchmean", log_target=True
    )


def _trl(student: Tensor, teacher: Tensor) -> Tensor:
    module = importlib.import_module("trl.experimental.gkd")
    loss = module.GKDTrainer.generalized_jsd_loss
    return loss(student.unsqueeze(0), teacher.unsqueeze(0), beta=1.0) / len(student)


if __name__ == "__main__":
    main()
