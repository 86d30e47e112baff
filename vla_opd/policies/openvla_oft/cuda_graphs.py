"""Forward passes as CUDA graphs, so that no kernel waits for Python to launch it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

WARM_UPS = (
    3  # calls before the capture: libraries initialize on first use, which cannot be captured
)


class Graph(NamedTuple):
    """A captured call, and the tensors it reads and writes."""

    graph: torch.cuda.CUDAGraph
    arguments: tuple[Tensor, ...]
    result: Tensor


class Captured:
    """A function of tensors on a GPU, captured as one CUDA graph per batch size.

    A graph also refers to every other tensor that the function reads (weights), at its address at
    the time of capture. Their values may change; their storage may not.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._graphs: dict[int, Graph] = {}

    def __call__(self, *arguments: Tensor) -> Tensor:
        """Return the function's result, without gradient."""
        batch_size = len(arguments[0])
        with torch.cuda.device(arguments[0].device):
            if batch_size not in self._graphs:
                copies = tuple(argument.clone() for argument in arguments)
                self._graphs[batch_size] = self._capture(copies)
            captured = self._graphs[batch_size]
            for target, argument in zip(captured.arguments, arguments, strict=True):
                target.copy_(argument)
            captured.graph.replay()
            return captured.result.clone()

    def _capture(self, arguments: tuple[Tensor, ...]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        with torch.no_grad():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._function(*arguments)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, stream=stream):
                result = self._function(*arguments)
        return Graph(graph, arguments, result)
