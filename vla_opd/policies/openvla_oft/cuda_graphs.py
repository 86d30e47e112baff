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

    call: torch.cuda.CUDAGraph
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
        first = arguments[0]
        batch_size = len(first)
        with torch.cuda.device(first.device):
            if batch_size not in self._graphs:
                self._graphs[batch_size] = self._capture(arguments)
            graph = self._graphs[batch_size]
            for target, argument in zip(graph.arguments, arguments, strict=True):
                target.copy_(argument)
            graph.call.replay()
            return graph.result.clone()

    def _capture(self, arguments: tuple[Tensor, ...]) -> Graph:
        copies = tuple(argument.clone() for argument in arguments)
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        current = torch.cuda.current_stream()
        with torch.no_grad():
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._function(*copies)
            current.wait_stream(stream)
            with torch.cuda.graph(graph, stream=stream):
                result = self._function(*copies)
        return Graph(graph, copies, result)
