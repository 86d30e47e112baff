"""For how many shapes of a linear layer the bits depend on where its operands lie in memory: `python -m benchmarks.alignment`.

Run it as it is, and with `MKL_CBWR=AUTO,STRICT`, which stages ask for: MKL's default kernels may sum in another order for another alignment.
"""

import itertools

import torch
from torch import Tensor
from torch.nn.functional import linear

ROWS, INPUTS, OUTPUTS = (
    (1, 3, 28, 56, 64, 150, 256, 1000),
    (32, 64, 96, 192, 576),
    (32, 64, 256, 576),
)
OFFSETS = (
    (4, 0),
    (0, 4),
    (1, 0),
    (0, 1),
    (8, 8),
    (3, 5),
)  # of input and weights, in floats from a 64-byte boundary
LINE = 16  # floats in 64 bytes


def main() -> None:
    """Print the count."""
    shapes = list(itertools.product(ROWS, INPUTS, OUTPUTS))
    dependent = sum(depends(*shape) for shape in shapes)
    print(f"{dependent} of {len(shapes)} shapes have other bits at another alignment")


def depends(rows: int, inputs: int, outputs: int) -> bool:
    """Whether a product differs at any of the alignments that are tried."""
    torch.manual_seed(0)
    given, weights, bias = (
        torch.randn(rows, inputs),
        torch.randn(outputs, inputs),
        torch.randn(outputs),
    )
    aligned = linear(placed(given, 0), placed(weights, 0), bias)
    others = (
        linear(placed(given, ours), placed(weights, theirs), bias) for ours, theirs in OFFSETS
    )
    return not all(torch.equal(aligned, other) for other in others)


def placed(values: Tensor, offset: int) -> Tensor:
    """A copy that begins so many floats after a 64-byte boundary."""
    room = torch.empty(values.numel() + 2 * LINE)
    boundary = -(room.data_ptr() // room.element_size()) % LINE
    copy = room[boundary + offset :][: values.numel()].view(values.shape)
    return copy.copy_(values)


if __name__ == "__main__":
    main()
