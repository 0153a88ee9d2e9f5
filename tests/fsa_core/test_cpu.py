import pytest
import torch

from fsa_core.api import selected_attention
from fsa_core.cpu import selected_attention_cpu
from fsa_core.cpu_parts import CPU_WORKSPACE_BYTES
from tests.fsa_core.conftest import DISTRIBUTIONS, LENGTHS, draw_companies, draw_requests


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


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_any_lengths(case_on_cpu, assert_close_to_oracle, lengths, causal):
    case = case_on_cpu(causal=causal, group_size=3, **lengths)
    assert_close_to_oracle(*run(case), case)


def test_a_workspace_of_any_size_gives_the_answer(case_on_cpu, assert_close_to_oracle):
    case = case_on_cpu(q_lens=(50, 12, 20), num_kv_heads=3, distribution="ragged")
    for limit_bytes in (1, 20_000, 200_000):
        assert_close_to_oracle(*run(case, workspace_limit_bytes=limit_bytes), case)


@pytest.mark.parametrize(
    ("dtype", "limit_bytes", "threads"),
    [(torch.bfloat16, CPU_WORKSPACE_BYTES, 2), (torch.float32, 60_000, 2)],
    indirect=["threads"],
)
@pytest.mark.usefixtures("threads")
def test_an_answer_is_bitwise_the_same_alone_and_in_any_company(case_on_cpu, dtype, limit_bytes):
    """200 requests; in company also behind other requests' tokens and with unused slots appended."""
    requests = draw_requests(case_on_cpu, 200, group_size=3, head_dim=24, dtype=dtype)
    alone = [run(case, workspace_limit_bytes=limit_bytes) for case in requests]
    for members, company in draw_companies(requests):
        out, lse = run(company, workspace_limit_bytes=limit_bytes)
        sizes = [requests[i].problem.num_q_tokens for i in members]
        for got_out, got_lse, i in zip(out.split(sizes), lse.split(sizes), members, strict=True):
            assert torch.equal(got_out, alone[i][0])
            assert torch.equal(got_lse, alone[i][1])


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


@pytest.mark.parametrize("index_heads", [1, 4])
def test_torchs_default_device_changes_no_bit(case_on_cpu, index_heads):
    """Tensors on the CPU are computed on there, whatever device new ones would be on."""
    case = case_on_cpu(distribution="ragged", index_heads=index_heads)
    expected = run(case)
    with torch.device("meta"):
        got = run(case)
        validated = selected_attention(*case.tensors[:4], **case.options)
    for answer in (got, validated):
        assert all(torch.equal(a, b) for a, b in zip(answer, expected, strict=True))


def test_torchs_default_device_changes_no_bit_of_shared_rows(case_on_cpu):
    case = case_on_cpu(q_lens=(40, 20), causal=False)
    options = {**case.options, "query_block_size": 16}
    tensors = (case.q, case.k, case.v, case.block_indices[:, [0, 16, 32, 40, 56]])
    expected = selected_attention(*tensors, **options)
    with torch.device("meta"):
        got = selected_attention(*tensors, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
