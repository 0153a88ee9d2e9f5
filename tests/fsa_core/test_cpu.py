from dataclasses import replace
from functools import partial

import pytest
import torch

from fsa_core import cpu
from fsa_core.cpu import selected_attention_cpu
from tests.fsa_core.conftest import DISTRIBUTIONS


@pytest.fixture(scope="module")
def case_on_cpu(make_case):
    """The CPU backend is tested on the CPU, whatever device the suite runs on."""
    return partial(make_case.func, torch.device("cpu"))


def run(case, **options):
    return selected_attention_cpu(case.problem, *case.tensors, **options)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 6, 7, 8, 12, 16, 32])
def test_any_group_size_and_distribution(case_on_cpu, assert_close_to_oracle, group_size, distribution):
    case = case_on_cpu(group_size=group_size, distribution=distribution, head_dim=32)
    assert_close_to_oracle(*run(case), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("head_dim", "value_dim"),
    [
        (16, 16),
        (32, 32),
        (64, 64),
        (80, 80),
        (96, 96),
        (128, 128),
        (192, 192),
        (256, 256),
        (192, 128),
        (40, 72),
    ],
)
def test_any_head_dim_and_dtype(case_on_cpu, assert_close_to_oracle, head_dim, value_dim, dtype):
    case = case_on_cpu(head_dim=head_dim, value_dim=value_dim, dtype=dtype, group_size=3)
    assert_close_to_oracle(*run(case), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_logits_stay_finite_and_right(case_on_cpu, assert_close_to_oracle, dtype):
    case = case_on_cpu(q_scale=16.0, head_dim=128, dtype=dtype, group_size=4)
    assert_close_to_oracle(*run(case), case)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
def test_any_block_size_with_a_short_last_block(case_on_cpu, assert_close_to_oracle, block_size, causal):
    lens = (2 * block_size + 5, block_size)
    case = case_on_cpu(q_lens=lens, block_size=block_size, num_slots=3, causal=causal, head_dim=32)
    assert_close_to_oracle(*run(case), case)


@pytest.mark.parametrize("index_heads", [1, 2, 6])
@pytest.mark.parametrize("distribution", ["random", "ragged", "same"])
def test_indices_of_one_head_of_kv_heads_or_of_query_heads(
    case_on_cpu, assert_close_to_oracle, index_heads, distribution
):
    case = case_on_cpu(group_size=3, index_heads=index_heads, distribution=distribution)
    assert_close_to_oracle(*run(case), case)


SHAPES = {
    "chunked prefill": {"q_lens": (40, 3), "k_lens": (150, 64)},
    "decode": {"q_lens": (1, 1, 1), "k_lens": (300, 17, 64), "num_slots": 12},
    "more queries than keys": {"q_lens": (40, 9), "k_lens": (30, 0)},
    "empty sequences": {"q_lens": (0, 30, 0, 20, 0), "k_lens": (0, 30, 25, 20, 0)},
    "only empty sequences": {"q_lens": (0, 0), "k_lens": (10, 0)},
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_any_lengths(case_on_cpu, assert_close_to_oracle, shape, causal):
    case = case_on_cpu(causal=causal, group_size=3, **shape)
    assert_close_to_oracle(*run(case), case)


def test_a_workspace_of_any_size_gives_the_answer(case_on_cpu, assert_close_to_oracle):
    case = case_on_cpu(q_lens=(50, 12, 20), num_kv_heads=3, distribution="ragged")
    for limit_bytes in (1, 20_000, 200_000):
        assert_close_to_oracle(*run(case, workspace_limit_bytes=limit_bytes), case)


def test_parts_stay_within_the_workspace_and_cover_the_call(case_on_cpu):
    case = case_on_cpu(q_lens=(300, 20, 50, 1), num_kv_heads=3, distribution="ragged")
    p, layout, limit_bytes = case.problem, cpu._Layout.of(case.problem), 100_000
    placed = cpu.place_queries(case.cu_seqlens_q, case.cu_seqlens_k, p.num_q_tokens, causal=True)
    num_pairs = cpu._pairs_per_token(p, case.block_indices, placed)
    parts = list(cpu._parts(p, layout, num_pairs, placed.sequence, limit_bytes))
    covered = torch.zeros(p.num_kv_heads, p.num_q_tokens, dtype=torch.int32)
    largest_token = int(num_pairs.amax()) * layout.pair_bytes(p)
    for part in parts:
        covered[part.heads, part.tokens] += 1
        assert part.num_pairs == num_pairs[part.heads, part.tokens].sum()
        assert part.num_pairs * layout.pair_bytes(p) <= limit_bytes + largest_token
    assert (covered == 1).all()
    assert len(parts) < 60


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("dtype", "limit_bytes", "threads"),
    [(torch.bfloat16, cpu.CPU_WORKSPACE_BYTES, 2), (torch.float32, 60_000, 1)],
    indirect=["threads"],
)
@pytest.mark.usefixtures("threads")
def test_an_answer_is_bitwise_the_same_alone_and_in_any_company(case_on_cpu, dtype, limit_bytes):
    """200 requests; in company also behind other requests' tokens and with unused slots appended."""
    generator = torch.Generator().manual_seed(5)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    requests = []
    for seed in range(200):
        q_lens = [draw(0, 30) if draw(0, 3) else draw(1, 200) for _ in range(draw(1, 2))]
        case = case_on_cpu(
            q_lens=q_lens,
            k_lens=[n + draw(0, 1) * draw(0, 120) for n in q_lens],
            num_slots=draw(1, 8),
            distribution=DISTRIBUTIONS[draw(0, len(DISTRIBUTIONS) - 1)],
            group_size=3,
            head_dim=24,
            dtype=dtype,
            seed=seed,
        )
        requests.append((case, run(case, workspace_limit_bytes=limit_bytes)))
    order = torch.randperm(len(requests), generator=generator).tolist()
    while order:
        company = [requests[order.pop()] for _ in range(min(draw(2, 24), len(order)))]
        out, lse = run(packed([case for case, _ in company], draw(8, 11)), workspace_limit_bytes=limit_bytes)
        sizes = [case.problem.num_q_tokens for case, _ in company]
        for got_out, got_lse, (_, (alone_out, alone_lse)) in zip(
            out.split(sizes), lse.split(sizes), company, strict=True
        ):
            assert torch.equal(got_out, alone_out)
            assert torch.equal(got_lse, alone_lse)


def packed(cases, num_slots):
    """One call of all the cases' sequences."""
    first = cases[0]

    def joined(starts):
        lens = torch.cat([x.diff() for x in starts])
        return torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int()

    ids = [
        torch.nn.functional.pad(c.block_indices, (0, num_slots - c.problem.num_slots), value=-1)
        for c in cases
    ]
    problem = replace(
        first.problem,
        num_q_tokens=sum(c.problem.num_q_tokens for c in cases),
        num_k_tokens=sum(c.problem.num_k_tokens for c in cases),
        num_sequences=sum(c.problem.num_sequences for c in cases),
        num_slots=num_slots,
    )
    return replace(
        first,
        problem=problem,
        q=torch.cat([c.q for c in cases]),
        k=torch.cat([c.k for c in cases]),
        v=torch.cat([c.v for c in cases]),
        block_indices=torch.cat(ids, dim=1),
        cu_seqlens_q=joined([c.cu_seqlens_q for c in cases]),
        cu_seqlens_k=joined([c.cu_seqlens_k for c in cases]),
    )


def test_nan_stays_with_those_who_selected_it(case_on_cpu):
    case = case_on_cpu(q_lens=(60, 50), distribution="random")
    clean_out, clean_lse = run(case)
    for x in (case.k, case.v):
        x[40] = torch.nan
    out, lse = run(case)
    holds_it = (case.block_indices == 40 // 16).any(-1).repeat_interleave(2, dim=0).T.clone()
    holds_it[60:] = False
    assert holds_it.any()
    assert not holds_it.all()
    assert torch.equal(out[~holds_it], clean_out[~holds_it])
    assert torch.equal(lse[~holds_it], clean_lse[~holds_it])
    assert out[holds_it].isnan().any()


def test_ids_that_no_token_may_see_are_ignored(case_on_cpu, assert_close_to_oracle):
    case = case_on_cpu(distribution="ragged")
    expected = run(case)
    unused = case.block_indices == -1
    case.block_indices[unused] = torch.tensor([2**31 - 1, -(2**31), 10**6, -2], dtype=torch.int32).repeat(
        unused.sum() // 4 + 1
    )[: unused.sum()]
    got = run(case)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_decode_reads_only_the_selected_keys(case_on_cpu):
    """Everything but the selected blocks is NaN, in k and in v."""
    case = case_on_cpu(q_lens=(1,), k_lens=(4000,), num_kv_heads=1, num_slots=8)
    clean = run(case)
    touched = torch.zeros(4000, dtype=torch.bool).view(-1, 16)
    touched[case.block_indices[0, 0].long()] = True
    for x in (case.k, case.v):
        x[~touched.flatten()] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(run(case), clean, strict=True))
