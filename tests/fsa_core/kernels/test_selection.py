"""Selection by its kernel: the oracle's blocks, ties included, and nothing of the size of the scores."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fsa_core.kernels import selection
from fsa_core.kernels.replay import Replayed
from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.functional import nsa_attention_from_compressed, select_blocks
from fsa_core.nsa.reference import nsa_attention_reference, select_blocks_reference
from tests.fsa_core.nsa.conftest import SMALL, Call
from tests.fsa_core.nsa.conftest import _make_call as make_call

LENS = {
    "packed, empty, shorter than a window": ((150, 0, 7, 61), None),
    "chunked prefill and decode": ((40, 1, 1), (600, 150, 9)),
    "more queries than keys": ((30, 20), (12, 0)),
}
SIZES = {
    "as the paper, smaller": SMALL,
    "windows that are blocks": replace(SMALL, kernel_size=16, stride=16),
    "windows longer than blocks": replace(SMALL, kernel_size=48, stride=16),
    "a stride of one": replace(SMALL, kernel_size=3, stride=1, num_first_blocks=0),
    "nothing is forced": replace(SMALL, num_first_blocks=0, num_local_blocks=0, top_k=5),
    "one slot, larger blocks": replace(SMALL, num_first_blocks=0, num_local_blocks=1, top_k=1, block_size=64),
    "more slots than blocks": replace(SMALL, top_k=40, num_first_blocks=2, num_local_blocks=3),
    # No ratio of small numbers comes near these: whether a share reaches a budget is not left to rounding.
    "top-p": replace(SMALL, top_k=8, top_p=0.618034),
    "a threshold": replace(SMALL, top_k=6, min_share=0.118034),
}


@pytest.fixture(autouse=True)
def several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of the fewest blocks, so that sequences of a few hundred keys take several."""
    monkeypatch.setattr(selection, "MAX_BLOCKS", selection.MIN_BLOCKS)
    monkeypatch.setattr(selection, "_replayed", Replayed(selection._forward))


def select(call: Call, **options: object) -> torch.Tensor:
    starts = {"cu_seqlens_q": call.cu_seqlens_q, "cu_seqlens_k": call.cu_seqlens_k}
    options = {"config": call.config, "softmax_scale": call.softmax_scale, "backend": "triton", **options}
    return select_blocks(call.q, call.k_cmp, **starts, **options)


def oracle(call: Call) -> torch.Tensor:
    rest = (call.cu_seqlens_q, call.cu_seqlens_k, call.config, call.softmax_scale)
    return select_blocks_reference(call.q, call.k_cmp, *rest)


def with_scores(call: Call, scores: torch.Tensor) -> Call:
    """q one-hot in the first channel: every score is ln 2 times a whole number of ``scores`` [num_windows].

    Weights are then exact, and what should tie ties.
    """
    q, k_cmp = torch.zeros_like(call.q), torch.zeros_like(call.k_cmp)
    q[..., 0] = 1
    k_cmp[..., 0] = scores.to(k_cmp)[:, None]
    return replace(call, q=q, k_cmp=k_cmp, softmax_scale=math.log(2))


def with_ties(call: Call, spread: int, seed: int = 0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    return with_scores(call, torch.randint(-spread, 1, (len(call.k_cmp),), generator=generator))


@pytest.mark.parametrize("lens", LENS.values(), ids=LENS.keys())
def test_selects_the_oracles_blocks(device: torch.device, lens: tuple) -> None:
    call = make_call(device, q_lens=lens[0], k_lens=lens[1], group_size=3)
    got = select(call)
    assert got.dtype == torch.int32
    assert torch.equal(got, oracle(call))


@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES.keys())
def test_every_size_with_ties(device: torch.device, config: NSAConfig) -> None:
    call = make_call(
        device, q_lens=(40, 0, 33), k_lens=(330, 20, 160), num_kv_heads=1, group_size=1, config=config
    )
    call = with_ties(call, spread=3)
    assert torch.equal(select(call), oracle(call))


@pytest.mark.parametrize("spread", [0, 1, 200], ids=lambda spread: f"scores 0 to -{spread}")
def test_ties_go_to_the_lower_id(device: torch.device, spread: int) -> None:
    """Scores of few values, so that many blocks tie; down to -200 some weights vanish and tie at zero."""
    config = replace(SMALL, num_first_blocks=0, num_local_blocks=0, top_k=5)
    call = make_call(device, q_lens=(400,), num_kv_heads=1, group_size=1, config=config)
    call = with_ties(call, spread)
    assert torch.equal(select(call), oracle(call))


@pytest.mark.parametrize("direction", [-1, 1], ids=["the first are best", "the last are best"])
def test_each_step_replaces_all_or_nothing(device: torch.device, direction: int) -> None:
    call = make_call(device, q_lens=(20,), k_lens=(900,), num_kv_heads=1, group_size=1)
    order = direction * torch.arange(len(call.k_cmp)) // 8
    call = with_scores(call, order - order.amax())
    assert torch.equal(select(call), oracle(call))


@pytest.mark.parametrize(("group_size", "head_dim"), [(1, 32), (5, 80)])
def test_half_precision_is_exact_once_read(
    device: torch.device, dtype: torch.dtype, group_size: int, head_dim: int
) -> None:
    call = make_call(
        device, q_lens=(150,), num_kv_heads=1, group_size=group_size, head_dim=head_dim, dtype=dtype
    )
    assert torch.equal(select(call), oracle(call))


def test_large_scores_are_right(device: torch.device) -> None:
    call = make_call(device, q_scale=16.0, dtype=torch.float16, q_lens=(150,))
    assert torch.equal(select(call), oracle(call))


def test_rows_of_nan_select_as_if_all_were_equal(device: torch.device) -> None:
    call = make_call(device, q_lens=(100,), config=replace(SMALL, top_k=4), group_size=2)
    q = call.q.clone()
    q[90, 0, 0] = torch.nan
    rows, right = select(replace(call, q=q)), select(call)
    assert rows[0, 90].tolist() == [0, 1, 2, 5]
    others = torch.arange(100) != 90
    assert torch.equal(rows[:, others], right[:, others])
    assert torch.equal(rows[1], right[1])


def test_a_future_key_changes_no_earlier_choice(device: torch.device) -> None:
    call = make_call(device, q_lens=(160,), num_kv_heads=1)
    k_cmp = call.k_cmp.clone()
    k_cmp[20:] = torch.nan  # windows from key 80 on: their last keys are 87 and later
    assert torch.equal(select(replace(call, k_cmp=k_cmp))[:, :87], select(call)[:, :87])


@st.composite
def configs(draw: st.DrawFn) -> NSAConfig:
    stride = draw(st.sampled_from([1, 2, 4, 8, 16]))
    forced = draw(st.tuples(st.integers(0, 2), st.integers(0, 3)))
    return NSAConfig(
        kernel_size=stride * draw(st.integers(1, 5)),
        stride=stride,
        block_size=draw(st.sampled_from([16, 32])),
        top_k=max(1, sum(forced), draw(st.integers(1, 20))),
        num_first_blocks=forced[0],
        num_local_blocks=forced[1],
        top_p=draw(st.sampled_from([None, 0.618034])),
        min_share=draw(st.sampled_from([None, 0.118034])),
    )


@settings(settings.get_profile("shapes"))
@given(
    config=configs(),
    lens=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 300)), min_size=1, max_size=3),
    spread=st.integers(0, 40),
    seed=st.integers(0, 2**31),
)
def test_any_sizes_select_the_oracles_blocks(
    device: torch.device, config: NSAConfig, lens: list[tuple[int, int]], spread: int, seed: int
) -> None:
    q_lens, k_lens = zip(*lens, strict=True)
    call = make_call(device, q_lens=q_lens, k_lens=k_lens, config=config, group_size=1, num_kv_heads=1)
    call = with_ties(call, spread, seed)
    assert torch.equal(select(call), oracle(call))


def test_what_does_not_fit_the_chip_is_selected_by_torch_or_refused(device: torch.device) -> None:
    config = NSAConfig(kernel_size=32, stride=1, block_size=256)
    call = make_call(device, q_lens=(40,), config=config)
    with pytest.raises(ValueError, match="'auto' does"):
        select(call)
    assert torch.equal(select(call, backend="auto"), oracle(call))


def test_the_operator_by_kernels_is_the_oracles(device: torch.device) -> None:
    call = make_call(device, q_lens=(90, 20), k_lens=(90, 70), value_dim=16, group_size=2)
    starts = {"cu_seqlens_q": call.cu_seqlens_q, "cu_seqlens_k": call.cu_seqlens_k}
    tensors = (call.q, call.k, call.v, call.k_cmp, call.v_cmp, call.gates)
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = nsa_attention_from_compressed(
        *leaves, config=call.config, softmax_scale=call.softmax_scale, backend="triton", **starts
    )
    true_leaves = [x.double().requires_grad_() for x in tensors]
    true = nsa_attention_reference(*true_leaves, *starts.values(), call.config, call.softmax_scale)
    torch.testing.assert_close(out.double(), true, rtol=0, atol=1e-5)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum(), leaves)
    true_grads = torch.autograd.grad((true * weights).sum(), true_leaves)
    for grad, true_grad in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(grad.double(), true_grad, rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [1_000, 16_000])
def test_memory_is_the_answers_and_two_numbers_a_row(device: torch.device, num_tokens: int) -> None:
    if device.type == "cpu":
        pytest.skip("what the interpreter takes is not what a kernel takes")
    call = make_call(device, q_lens=(num_tokens,), dtype=torch.bfloat16, config=NSAConfig())
    select(call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    select(call)
    row_bytes = call.k_cmp.shape[1] * call.config.top_k * 4 + call.q.shape[1] * 8
    # Starts of sequences and what the allocator rounds up.
    assert torch.cuda.max_memory_allocated() - before < num_tokens * row_bytes + 2**16
