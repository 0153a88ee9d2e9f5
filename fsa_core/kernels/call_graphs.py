"""Launches at addresses that come back, as one launch of a CUDA graph.

A loop that calls the same functions on tensors of the same sizes gets the same addresses again and again: its
allocator gives back what was freed. A launch costs the driver 4 to 6 microseconds of the host's time, and the
gradients of a call have a dozen and more of them; a graph of all of them costs little more than one launch.

Which addresses come back is not known before they do: a graph, which takes the host about a millisecond to
record, is recorded when a program meets the same addresses once more after it has met them before. Where they
come back now and then only, recording stops, until what is recorded has been worth it.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from threading import Lock

import torch

Key = tuple[Hashable, ...]
# What launches, given a stream that is being recorded.
Record = Callable[[torch.cuda.Stream], None]

# How often addresses are met before they are recorded. Of fewer launches than that a graph saves nothing.
SIGHTINGS = 3
FEWEST_LAUNCHES = 3
# Graphs that are kept, and addresses that are remembered.
MOST_GRAPHS, MOST_SEEN = 256, 4096
# So many are recorded on trust; further ones, while each so far was launched so often on the mean.
TRUSTED_GRAPHS, LAUNCHES_A_GRAPH = 64, 16


@dataclass(slots=True)
class _Graph:
    recorded: torch.cuda.CUDAGraph
    # How many had been launched then.
    last_launch: int


class CallGraphs:
    """Graphs by the program and its addresses, the least recently launched forgotten first."""

    def __init__(self) -> None:
        # A graph is launched by one thread at a time.
        self._lock = Lock()
        self._seen: OrderedDict[Key, int] = OrderedDict()
        self._graphs: dict[Key, _Graph] = {}
        self.num_recorded = 0
        self.num_launched = 0

    def launch(self, key: Key) -> bool:
        """Launches the graph of a program and addresses, if there is one, on the current stream."""
        graph = self._graphs.get(key)
        if graph is None or torch.cuda.is_current_stream_capturing():
            return False
        with self._lock:
            graph.recorded.replay()
            self.num_launched += 1
            graph.last_launch = self.num_launched
        return True

    def note(self, key: Key, record: Record, device: torch.device) -> None:
        """That ``key`` has just been launched: next time there may be a graph of what ``record`` launches."""
        with self._lock:
            times = self._seen.pop(key, 0) + 1
            if times < SIGHTINGS:
                self._seen[key] = times
                if len(self._seen) > MOST_SEEN:
                    self._seen.popitem(last=False)
                return
            is_worth_it = self.num_launched >= LAUNCHES_A_GRAPH * (self.num_recorded - TRUSTED_GRAPHS)
            if not is_worth_it or torch.cuda.is_current_stream_capturing():
                return
            self._graphs[key] = _Graph(_recorded(record, device), self.num_launched)
            self.num_recorded += 1
            if len(self._graphs) > MOST_GRAPHS:
                del self._graphs[min(self._graphs, key=lambda key: self._graphs[key].last_launch)]


def _recorded(record: Record, device: torch.device) -> torch.cuda.CUDAGraph:
    """What ``record`` launches on the stream that it is given, without doing it."""
    graph = torch.cuda.CUDAGraph()
    # The default stream cannot be recorded. What other threads do meanwhile is neither recorded nor refused.
    with torch.cuda.stream(torch.cuda.Stream(device)):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            record(torch.cuda.current_stream(device))
        finally:
            graph.capture_end()
    return graph


call_graphs = CallGraphs()
