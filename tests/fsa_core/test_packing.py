import pytest
import torch

from fsa_core.packing import place_queries, row_starts, sequence_starts, single_sequence


def starts(*lens, device):
    return torch.tensor([0, *lens], device=device).cumsum(0).int()


def test_queries_end_where_their_keys_end(device):
    cu_q, cu_k = starts(3, 0, 2, 4, device=device), starts(3, 5, 7, 1, device=device)
    placed = place_queries(cu_q, cu_k, 9, causal=True)
    assert placed.sequence.tolist() == [0, 0, 0, 2, 2, 3, 3, 3, 3]
    assert placed.position.tolist() == [0, 1, 2, 5, 6, -3, -2, -1, 0]
    assert placed.num_visible_keys.tolist() == [1, 2, 3, 6, 7, 0, 0, 0, 1]


def test_without_causality_every_key_is_visible(device):
    placed = place_queries(starts(2, 1, device=device), starts(5, 0, device=device), 3, causal=False)
    assert placed.num_visible_keys.tolist() == [5, 5, 0]


def test_a_sequence_has_a_row_for_each_started_query_block(device):
    assert row_starts(starts(1, 0, 16, 17, device=device), 16).tolist() == [0, 1, 1, 2, 4]


def test_one_sequence_has_all_tokens(device):
    assert single_sequence(7, device).tolist() == [0, 7]
    assert single_sequence(0, device).dtype == torch.int32


def test_one_sequence_is_made_anew_in_a_graph_and_may_be_kept_for_gradients(device):
    if device.type != "cuda":
        pytest.skip("nothing is kept on the CPU")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.inference_mode():
        kept = single_sequence(9, device)
        assert single_sequence(9, device) is kept
    assert not kept.is_inference()
    assert single_sequence(9, device) is not kept, "another stream would have to wait for this one"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = single_sequence(9, device)
    assert captured is not kept
    captured.zero_()
    graph.replay()
    assert captured.tolist() == [0, 9]


def test_offsets_that_are_left_out_are_those_of_one_sequence(device):
    q, k = torch.empty(5, 1, device=device), torch.empty(7, 1, device=device)
    given = starts(0, 5, device=device)
    assert [x.tolist() for x in sequence_starts(q, k, None, None)] == [[0, 5], [0, 7]]
    assert [x.tolist() for x in sequence_starts(q, k, given, None)] == [given.tolist(), [0, 7]]
    assert [x.tolist() for x in sequence_starts(q, k, None, given)] == [[0, 5], given.tolist()]
    of_q, of_k = sequence_starts(q, q, None, None)
    assert of_q is of_k
    assert of_q.tolist() == [0, 5]
