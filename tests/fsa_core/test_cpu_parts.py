import torch

from fsa_core.cpu_parts import INDEX_BYTES, parts


def test_parts_stay_within_the_workspace_and_cover_the_call(case_on_cpu):
    case = case_on_cpu(q_lens=(300, 20, 50, 1), num_kv_heads=3, distribution="ragged")
    p, pair_bytes, limit_bytes = case.problem, 1_000, 100_000
    cut = parts(p, *case.tensors[3:], pair_bytes=pair_bytes, token_bytes=500, limit_bytes=limit_bytes)
    num_pairs = (case.block_indices >= 0).sum(-1)
    covered = torch.zeros(p.num_kv_heads, p.num_q_tokens, dtype=torch.int32)
    largest_token = int(num_pairs.amax()) * (INDEX_BYTES + pair_bytes)
    for part in cut:
        covered[part.kv_heads, part.tokens] += 1
        assert part.num_pairs == num_pairs[part.kv_heads, part.tokens].sum()
        assert part.num_pairs * (INDEX_BYTES + pair_bytes) <= limit_bytes + largest_token
        assert part.placed.num_visible_keys.numel() == part.tokens.stop - part.tokens.start
    assert (covered[num_pairs > 0] == 1).all()
    assert (covered <= 1).all()
    assert len(cut) < 60


def test_a_call_without_pairs_has_no_parts(case_on_cpu):
    options = {"pair_bytes": 1, "token_bytes": 1, "limit_bytes": 1000}
    nothing = case_on_cpu(q_lens=(0, 0), k_lens=(10, 0))
    assert not parts(nothing.problem, *nothing.tensors[3:], **options)
    nothing_chosen = case_on_cpu(q_lens=(20,))
    nothing_chosen.block_indices.fill_(-1)
    assert not parts(nothing_chosen.problem, *nothing_chosen.tensors[3:], **options)
