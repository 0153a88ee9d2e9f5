import pytest
import torch

from fsa_core import cpu_tiles
from fsa_core.cpu import selected_attention_cpu
from fsa_core.cpu_backward import selected_attention_cpu_backward
from fsa_core.cpu_parts import CPU_WORKSPACE_BYTES
from tests.fsa_core.conftest import DISTRIBUTIONS, LENGTHS, draw_companies, draw_requests

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def gradients(case, grad_out, grad_lse, **options):
    answer = selected_attention_cpu(case.problem, *case.tensors)
    return selected_attention_cpu_backward(
        case.problem, *case.tensors, *answer, grad_out, grad_lse, **options
    )


@pytest.fixture
def check(case_on_cpu, assert_gradients_close_to_oracle):
    def run(**options):
        case = case_on_cpu(**options)
        given = case.output_gradients()
        assert_gradients_close_to_oracle(gradients(case, *given), case, *given)

    return run


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 6, 7, 8, 12, 16, 32])
def test_any_group_size_and_distribution(check, group_size, distribution):
    check(group_size=group_size, distribution=distribution, head_dim=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("head_dim", "value_dim"),
    [(16, 16), (32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128), (40, 72)],
)
def test_any_head_dim_and_dtype(check, head_dim, value_dim, dtype):
    check(head_dim=head_dim, value_dim=value_dim, dtype=dtype, group_size=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_logits_stay_finite_and_right(check, dtype):
    check(q_scale=16.0, head_dim=128, dtype=dtype, group_size=4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
def test_any_block_size_with_a_short_last_block(check, block_size, causal):
    lens = (2 * block_size + 5, block_size)
    check(q_lens=lens, block_size=block_size, num_slots=3, causal=causal, head_dim=32)


@pytest.mark.parametrize("index_heads", [1, 2, 6])
@pytest.mark.parametrize("distribution", ["random", "ragged", "same"])
def test_indices_of_one_head_of_kv_heads_or_of_query_heads(check, index_heads, distribution):
    check(group_size=3, index_heads=index_heads, distribution=distribution)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_any_lengths(check, lengths, causal):
    check(causal=causal, group_size=3, **lengths)


@pytest.mark.parametrize("through", ["out", "lse"])
def test_a_gradient_of_one_answer_alone(case_on_cpu, assert_gradients_close_to_oracle, through):
    case = case_on_cpu(group_size=3)
    grad_out, grad_lse = case.output_gradients()
    (grad_lse if through == "out" else grad_out).zero_()
    grads = gradients(case, grad_out, grad_lse)
    assert_gradients_close_to_oracle(grads, case, grad_out, grad_lse)


def test_a_workspace_of_any_size_gives_the_gradients(case_on_cpu, assert_gradients_close_to_oracle):
    case = case_on_cpu(q_lens=(50, 12, 20), num_kv_heads=3, distribution="ragged")
    given = case.output_gradients()
    for limit_bytes in (1, 20_000, 200_000):
        grads = gradients(case, *given, workspace_limit_bytes=limit_bytes)
        assert_gradients_close_to_oracle(grads, case, *given)


@pytest.mark.parametrize(
    ("dtype", "limit_bytes", "threads"),
    [(torch.bfloat16, CPU_WORKSPACE_BYTES, 2), (torch.float32, 60_000, 1)],
    indirect=["threads"],
)
@pytest.mark.usefixtures("threads")
def test_gradients_are_bitwise_the_same_alone_and_in_any_company(
    case_on_cpu, monkeypatch, dtype, limit_bytes
):
    # Small enough for these requests that the tiles of a block are spread over several batches.
    monkeypatch.setattr(cpu_tiles, "BATCH_BYTES", 200_000)
    monkeypatch.setattr(cpu_tiles, "BLOCKS_BYTES", 50_000)
    requests = draw_requests(case_on_cpu, 30, group_size=3, head_dim=24, dtype=dtype)
    given = [case.output_gradients() for case in requests]
    options = {"workspace_limit_bytes": limit_bytes}
    alone = [gradients(case, *x, **options) for case, x in zip(requests, given, strict=True)]
    for members, company in draw_companies(requests):
        given_all = (torch.cat(x) for x in zip(*(given[i] for i in members), strict=True))
        together = gradients(company, *given_all, **options)
        for which, grad in enumerate(together):
            expected = [alone[i][which] for i in members]
            for got, want in zip(grad.split([len(x) for x in expected]), expected, strict=True):
                assert torch.equal(got, want)


def test_nan_in_a_query_stays_in_its_row_and_the_blocks_it_selected(case_on_cpu):
    """The next sequence's keys begin inside the tile of the first one's short last block."""
    case = case_on_cpu(q_lens=(60, 50))
    given = case.output_gradients()
    clean = gradients(case, *given)
    case.q[59] = torch.nan
    got = gradients(case, *given)
    assert got[0][59].isnan().all()
    reached = (torch.arange(110)[:60] // 16 == case.block_indices[:, 59, :, None]).any(1).T
    for grad in got[1:]:
        assert grad[:60][reached].isnan().all()
        grad[:60][reached] = 0
    got[0][59] = 0
    for expected in clean[1:]:
        expected[:60][reached] = 0
    clean[0][59] = 0
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))


def test_ids_that_no_token_may_see_are_ignored(case_on_cpu):
    case = case_on_cpu(distribution="ragged")
    given = case.output_gradients()
    expected = gradients(case, *given)
    unused = case.block_indices == -1
    wild = torch.tensor([2**31 - 1, -(2**31), 10**6, -2], dtype=torch.int32)
    case.block_indices[unused] = wild.repeat(unused.sum() // 4 + 1)[: unused.sum()]
    assert all(torch.equal(a, b) for a, b in zip(gradients(case, *given), expected, strict=True))


def test_torchs_default_device_changes_no_bit(case_on_cpu):
    case = case_on_cpu(distribution="ragged")
    given = case.output_gradients()
    expected = gradients(case, *given)
    with torch.device("meta"):
        got = gradients(case, *given)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
