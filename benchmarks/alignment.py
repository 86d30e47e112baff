"""How many shapes of a linear layer have bits that depend on memory alignment.

`python -m benchmarks.alignment`

Run it as it is, and with `MKL_CBWR=AUTO,STRICT`, which stages set: MKL's default kernels may sum in
another order at another alignment.
"""

import itertools

import torch
from torch import Tensor
from torch.nn.functional import linear

ROWS = (1, 3, 28, 56, 64, 150, 256, 1000)
INPUTS = (32, 64, 96, 192, 576)
OUTPUTS = (32, 64, 256, 576)
# Of input and weights, in floats from a 64-byte boundary.
OFFSETS = ((4, 0), (0, 4), (1, 0), (0, 1), (8, 8), (3, 5))
LINE = 16  # floats in 64 bytes


def main() -> None:
    """Print how many of the shapes depend on alignment."""
    shapes = list(itertools.product(ROWS, INPUTS, OUTPUTS))
    dependent = sum(depends_on_alignment(*shape) for shape in shapes)
    print(f"{dependent} of {len(shapes)} shapes have other bits at another alignment")


def depends_on_alignment(rows: int, inputs: int, outputs: int) -> bool:
    """Return whether a layer's output differs at any of `OFFSETS` from the aligned one."""
    torch.manual_seed(0)
    batch = torch.randn(rows, inputs)
    weights = torch.randn(outputs, inputs)
    bias = torch.randn(outputs)

    def compute(batch_offset: int, weights_offset: int) -> Tensor:
        return linear(
            copy_to_offset(batch, batch_offset),
            copy_to_offset(weights, weights_offset),
            bias,
        )

    aligned = compute(0, 0)
    return any(not torch.equal(compute(*offsets), aligned) for offsets in OFFSETS)


def copy_to_offset(values: Tensor, offset: int) -> Tensor:
    """Copy a tensor to memory that begins `offset` floats after a 64-byte boundary."""
    count = values.numel()
    room = torch.empty(count + 2 * LINE)
    address = room.data_ptr() // room.element_size()
    boundary = -address % LINE
    start = boundary + offset
    copy = room[start : start + count]
    return copy.view(values.shape).copy_(values)


if __name__ == "__main__":
    main()
