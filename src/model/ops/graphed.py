"""A network as CUDA graphs: one launch a call instead of hundreds."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

WARM_UP = 2  # calls before a graph is captured, in which libraries choose their kernels and make their workspaces
MOST = 4  # graphs, each of which keeps the memory of its call


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Within this block work goes to `stream`, after what was begun before it and before what comes after it."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


class Graphed:
    """Calls of a network in evaluation on CUDA, captured at the first call with a new shape and replayed after that.

    Shape, type, memory format and autocast's type tell calls apart; of the least recently used ones the graphs are
    given up. Weights may change, in place. Worth it where shapes repeat: tiles.
    """

    def __init__(self, net: Callable[[Tensor], Tensor]) -> None:
        self.net = net
        self.graphs: OrderedDict[tuple, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = OrderedDict()

    def __call__(self, x: Tensor) -> Tensor:
        """What the network gives for images (N, C, H, W) on CUDA."""
        autocast = torch.get_autocast_dtype('cuda') if torch.is_autocast_enabled('cuda') else None
        key = (*x.shape, *x.stride(), x.dtype, autocast)
        if key not in self.graphs:
            while len(self.graphs) >= MOST:
                self.graphs.popitem(last=False)
            self.graphs[key] = self._capture(x)
        self.graphs.move_to_end(key)
        graph, given, made = self.graphs[key]
        given.copy_(x)
        graph.replay()
        return made.clone()

    def _capture(self, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """The graph of a call, and the tensors that it reads and writes."""
        given, graph, stream = x.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with on_stream(stream):
            for _ in range(WARM_UP):
                self.net(given)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode='thread_local'):
            made = self.net(given)
        return graph, given, made
