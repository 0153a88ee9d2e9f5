"""Graphs of launches whose addresses come back: when they are recorded, and that they do as launches did."""

from threading import Thread
from typing import cast

import pytest
import torch

from fsa_core.api import selected_attention
from fsa_core.drawn_indices import causal_block_indices
from fsa_core.kernels import call_graphs, replay
from fsa_core.kernels.call_graphs import (
    LAUNCHES_A_GRAPH,
    MOST_GRAPHS,
    SIGHTINGS,
    TRUSTED_GRAPHS,
    CallGraphs,
    Record,
)
from fsa_core.plan import KV_MAJOR, MIXED, QUERY_TILE


class Graph:
    """Launches what it was made of, and counts."""

    def __init__(self, launch: Record) -> None:
        self.launch = launch
        self.times = 0

    def replay(self) -> None:
        self.times += 1
        self.launch(cast("torch.cuda.Stream", None))


def nothing(_stream: object) -> None:
    pass


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The graphs that were recorded, where there is no GPU to record them."""
    graphs: list[Graph] = []

    def record(launch: Record, _device: torch.device) -> Graph:
        graphs.append(Graph(launch))
        return graphs[-1]

    monkeypatch.setattr(call_graphs, "_recorded", record)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return graphs


def call(graphs: CallGraphs, key: tuple[int, ...]) -> bool:
    """As a program does; whether a graph was launched."""
    if graphs.launch(key):
        return True
    graphs.note(key, nothing, torch.device("cpu"))
    return False


def test_addresses_that_come_back_are_recorded_once(made: list[Graph]) -> None:
    graphs = CallGraphs()
    assert [call(graphs, (1, 2)) for _ in range(SIGHTINGS + 3)] == [False] * SIGHTINGS + [True] * 3
    assert not any(call(graphs, (1, 3)) for _ in range(SIGHTINGS))
    assert [graph.times for graph in made] == [3, 0]


def test_the_least_recently_launched_is_forgotten(made: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_graphs, "TRUSTED_GRAPHS", MOST_GRAPHS + 1)
    graphs = CallGraphs()
    for number in range(MOST_GRAPHS):
        for _ in range(SIGHTINGS):
            call(graphs, (number,))
    assert call(graphs, (0,))
    for _ in range(SIGHTINGS):
        call(graphs, (MOST_GRAPHS,))
    assert call(graphs, (0,))
    assert not call(graphs, (1,))


def test_recording_stops_where_it_is_not_worth_it(made: list[Graph]) -> None:
    graphs = CallGraphs()
    for number in range(2 * TRUSTED_GRAPHS):
        for _ in range(SIGHTINGS):
            call(graphs, (number,))
    assert len(made) == TRUSTED_GRAPHS + 1
    for _ in range(LAUNCHES_A_GRAPH):
        assert call(graphs, (0,))
    for _ in range(SIGHTINGS):
        call(graphs, (-1,))
    assert len(made) == TRUSTED_GRAPHS + 2


@pytest.fixture
def graphs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> CallGraphs:
    """Those of this test alone."""
    if device.type == "cpu":
        pytest.skip("only a GPU has graphs to record")
    own = CallGraphs()
    monkeypatch.setattr(replay, "call_graphs", own)
    return own


def problem(device: torch.device, tokens: int, *, is_random: bool = False) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(tokens)
    shapes = (tokens, 8, 64), (tokens, 2, 64), (tokens, 2, 64)
    q, k, v = (
        torch.randn(x, device=device, generator=generator, dtype=torch.bfloat16).requires_grad_()
        for x in shapes
    )
    own = (torch.arange(tokens, device=device, dtype=torch.int32) // 64)[None, :, None]
    ids = torch.cat((torch.zeros_like(own), own.where(own > 0, -1)), 2).expand(2, -1, -1).contiguous()
    if is_random:
        ids = causal_block_indices(tokens, 2, 4, 64, "random", generator)
    return q, k, v, ids


def answers(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, path: str
) -> list[torch.Tensor]:
    out, lse = selected_attention(q, k, v, ids, block_size=64, validate=False, path=path)
    grads = torch.autograd.grad((out.float().square().sum(), lse.sum()), (q, k, v))
    return [out.detach(), lse.detach(), *grads]


def copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.clone() for x in tensors]


@pytest.mark.parametrize("path", [KV_MAJOR, MIXED, QUERY_TILE])
@pytest.mark.parametrize("is_random", [False, True])
def test_graphs_give_the_bits_of_launches_and_follow_what_tensors_hold(
    device: torch.device, graphs: CallGraphs, monkeypatch: pytest.MonkeyPatch, path: str, is_random: bool
) -> None:
    q, k, v, ids = problem(device, 4000 if is_random else 700, is_random=is_random)
    kept: list[list[torch.Tensor]] = []
    for seed in (0, 0, 0, 0, 0, 0, 0, 1, 2):
        with torch.no_grad():
            q.copy_(torch.randn(q.shape, generator=torch.Generator().manual_seed(seed)))
        # Copied to the host, so that no answer's memory is kept.
        kept.append([x.cpu() for x in answers(q, k, v, ids, path)])
    assert graphs.num_launched >= 4
    monkeypatch.setattr(replay, "call_graphs", CallGraphs())
    for seed, known in ((0, kept[6]), (1, kept[7]), (2, kept[8])):
        with torch.no_grad():
            q.copy_(torch.randn(q.shape, generator=torch.Generator().manual_seed(seed)))
        launched = [x.cpu() for x in answers(q, k, v, ids, path)]
        assert all(torch.equal(a, b) for a, b in zip(known, launched, strict=True))
    assert not torch.equal(kept[6][0], kept[7][0])


def test_a_call_that_is_being_recorded_is_launched(device: torch.device, graphs: CallGraphs) -> None:
    q, k, v, ids = (x.detach() for x in problem(device, 700))
    expected = selected_attention(q, k, v, ids, block_size=64, validate=False)[0].clone()
    for _ in range(6):
        selected_attention(q, k, v, ids, block_size=64, validate=False)
    assert graphs.num_launched > 0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again, _ = selected_attention(q, k, v, ids, block_size=64, validate=False)
    again.zero_()
    graph.replay()
    assert torch.equal(again, expected)


def test_threads_launch_the_same_graph(device: torch.device, graphs: CallGraphs) -> None:
    tensors = [x.detach() for x in problem(device, 700)]
    expected = selected_attention(*tensors, block_size=64, validate=False)[0].clone()
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            out, _ = selected_attention(*tensors, block_size=64, validate=False)
            if not torch.equal(out, expected):
                wrong.append(number)

    threads = [Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert graphs.num_recorded > 0
