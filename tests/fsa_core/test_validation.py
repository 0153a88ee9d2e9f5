import copy
import pickle
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fsa_core import index_checks
from fsa_core.validation import InputError, checked_limit, validate_dense, validate_selected
from tests.fsa_core.conftest import DISTRIBUTIONS


def call_of(case, **changes):
    tensors = {"q": case.q, "k": case.k, "v": case.v, "block_indices": case.block_indices}
    return validate_selected(**(tensors | case.options | changes))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"q_lens": (0, 5, 0), "k_lens": (16, 40, 0)},
        {"q_lens": (50,), "k_lens": (3,)},
        {"q_lens": (0,), "k_lens": (0,)},
        {"group_size": 3, "index_heads": 6, "value_dim": 17, "head_dim": 256},
        {"index_heads": 1, "causal": False, "num_slots": 1},
    ],
)
def test_valid_calls_pass_and_their_sizes_are_told(make_case, shape, distribution):
    case = make_case(distribution=distribution, **shape)
    assert call_of(case) == case.problem


def test_defaults_are_one_sequence_and_the_usual_scale(make_case):
    case = make_case(q_lens=(20,))
    assert call_of(case, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None) == case.problem
    dense = make_case(q_lens=(20,), dense=True)
    options = {"cu_seqlens_q": None, "cu_seqlens_k": None, "softmax_scale": None, "causal": True}
    assert validate_dense(dense.q, dense.k, dense.v, **options) == dense.problem


def test_a_call_that_is_known_gives_the_same_problem_and_one_that_cannot_be_told_is_looked_at(make_case):
    case = make_case()
    assert call_of(case) is call_of(make_case(seed=1))
    assert call_of(case, softmax_scale=0.5) != call_of(case)
    assert call_of(case, softmax_scale=np.float64(0.5)) == call_of(case, softmax_scale=0.5)
    assert call_of(case, causal=np.True_).causal is True
    assert call_of(case, causal=np.False_).causal is False


def test_any_strides_and_nan_are_allowed(make_case):
    case = make_case()
    q = torch.full_like(case.q, torch.nan).transpose(0, 1).contiguous().transpose(0, 1)
    ids = case.block_indices.transpose(0, 1).contiguous().transpose(0, 1)
    assert call_of(case, q=q, block_indices=ids) == case.problem


def tensor(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def starts(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


# The case has q [103, 4, 64], k and v [103, 2, 64], ids [2, 103, 4] and sequences of 70 and 33.
REFUSED = [
    ({"q": [1.0]}, "INVALID_TYPE", "q has type list: expected torch.Tensor"),
    (
        {"v": tensor(103, 128)},
        "INVALID_RANK",
        "v has rank 2 (shape [103, 128]): expected 3, [tokens, heads, dim]",
    ),
    (
        {"q": tensor(103, 4, 64, dtype=torch.float64)},
        "INVALID_DTYPE",
        "q has dtype float64: expected float16,",
    ),
    (
        {"k": tensor(103, 2, 64, dtype=torch.bfloat16)},
        "INVALID_DTYPE",
        "k has dtype bfloat16: expected float32, that",
    ),
    (
        {"q": tensor(103, 4, 15), "k": tensor(103, 2, 15)},
        "INVALID_HEAD_DIM",
        "q has head dim 15: expected 16 to 256",
    ),
    ({"v": tensor(103, 2, 257)}, "INVALID_HEAD_DIM", "v has head dim 257: expected 16 to 256"),
    ({"k": tensor(103, 2, 32)}, "INVALID_HEAD_DIM", "k has head dim 32: expected 64, that of q"),
    ({"q": tensor(103, 0, 64)}, "INVALID_HEADS", "q has head count 0: expected at least 1"),
    ({"v": tensor(103, 1, 64)}, "INVALID_HEADS", "v has head count 1: expected 2, that of k"),
    ({"q": tensor(103, 3, 64)}, "INVALID_HEADS", "k has 2 heads, q has 3: q's must be a multiple"),
    ({"v": tensor(102, 2, 64)}, "INVALID_TOKENS", "v has token count 102: expected 103, that of k"),
    ({"block_size": 48}, "INVALID_BLOCK_SIZE", "block_size is 48: expected one of 16, 32, 64, 128, 256"),
    ({"block_size": 16.0}, "INVALID_BLOCK_SIZE", "block_size is 16.0"),
    (
        {"query_block_size": 0},
        "INVALID_QUERY_BLOCK_SIZE",
        "query_block_size is 0: expected an integer from 1",
    ),
    ({"query_block_size": True}, "INVALID_QUERY_BLOCK_SIZE", "query_block_size is True"),
    (
        {"softmax_scale": 0.0},
        "INVALID_SOFTMAX_SCALE",
        "softmax_scale is 0.0: expected a finite number above 0",
    ),
    ({"softmax_scale": float("nan")}, "INVALID_SOFTMAX_SCALE", "softmax_scale is nan"),
    ({"softmax_scale": float("inf")}, "INVALID_SOFTMAX_SCALE", "softmax_scale is inf"),
    ({"softmax_scale": "1"}, "INVALID_SOFTMAX_SCALE", "softmax_scale is '1'"),
    # In float32 infinity, zero, or so small that a device may take it for zero.
    ({"softmax_scale": 1e300}, "INVALID_SOFTMAX_SCALE", "softmax_scale is 1e+300: expected a finite number"),
    ({"softmax_scale": 10**400}, "INVALID_SOFTMAX_SCALE", "softmax_scale is 10000"),
    ({"softmax_scale": Fraction(10**400)}, "INVALID_SOFTMAX_SCALE", "softmax_scale is Fraction(1000"),
    ({"softmax_scale": 1e-300}, "INVALID_SOFTMAX_SCALE", "softmax_scale is 1e-300"),
    ({"softmax_scale": 1e-40}, "INVALID_SOFTMAX_SCALE", "softmax_scale is 1e-40"),
    ({"softmax_scale": np.float16(0)}, "INVALID_SOFTMAX_SCALE", "softmax_scale is"),
    ({"causal": None}, "INVALID_CAUSAL", "causal is None: expected True or False"),
    ({"causal": "no"}, "INVALID_CAUSAL", "causal is 'no'"),
    ({"causal": 1}, "INVALID_CAUSAL", "causal is 1"),
    ({"causal": torch.tensor(True)}, "INVALID_CAUSAL", "causal is tensor(True"),
    ({"cu_seqlens_q": [0, 70, 103]}, "INVALID_TYPE", "cu_seqlens_q has type list"),
    (
        {"cu_seqlens_q": starts(0, 70, 103, dtype=torch.int64)},
        "INVALID_DTYPE",
        "cu_seqlens_q has dtype int64",
    ),
    ({"cu_seqlens_k": starts(0, 70, 103)[None]}, "INVALID_RANK", "cu_seqlens_k has rank 2"),
    ({"cu_seqlens_q": starts(0)}, "INVALID_CU_SEQLENS", "cu_seqlens_q has length 1: expected at least 2"),
    (
        {"cu_seqlens_k": starts(0, 103)},
        "INVALID_CU_SEQLENS",
        "cu_seqlens_k has length 2: expected 3, that of",
    ),
    ({"cu_seqlens_q": starts(1, 70, 103)}, "INVALID_CU_SEQLENS", "cu_seqlens_q[0] is 1: expected 0"),
    (
        {"cu_seqlens_k": starts(0, 104, 103)},
        "INVALID_CU_SEQLENS",
        "cu_seqlens_k[2] is 103: expected at least 104",
    ),
    (
        {"cu_seqlens_k": starts(0, 70, 102)},
        "INVALID_CU_SEQLENS",
        "cu_seqlens_k[2] is 102: expected 103, the token",
    ),
    (
        {"cu_seqlens_q": starts(0, -5, 103)},
        "INVALID_CU_SEQLENS",
        "cu_seqlens_q[1] is -5: expected at least 0",
    ),
    (
        {"block_indices": tensor(2, 103, 4)},
        "INVALID_DTYPE",
        "block_indices has dtype float32: expected int32",
    ),
    (
        {"block_indices": tensor(3, 103, 4, dtype=torch.int32)},
        "INVALID_INDEX_SHAPE",
        "block_indices has head count 3: expected 1 or 2 or 4 (1, the heads of k, or those of q)",
    ),
    (
        {"block_indices": tensor(2, 102, 4, dtype=torch.int32)},
        "INVALID_INDEX_SHAPE",
        "block_indices has row count 102: expected 103, one a query token",
    ),
    (
        {"block_indices": tensor(2, 103, 0, dtype=torch.int32)},
        "INVALID_INDEX_SHAPE",
        "block_indices has slot count 0",
    ),
    (
        {"query_block_size": 64},
        "INVALID_INDEX_SHAPE",
        "block_indices has row count 103: expected 3, one for 64 queries of a sequence",
    ),
]


@pytest.mark.parametrize(("changes", "reason", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_what_the_contract_refuses_is_named(make_case, device, changes, reason, message):
    changes = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in changes.items()}
    # What is accepted is remembered, and must not stand for what only looks like it.
    call_of(make_case())
    with pytest.raises(InputError) as caught:
        call_of(make_case(), **changes)
    error = caught.value
    assert error.reason == reason
    assert str(error).startswith(message)
    assert error.metadata["field"] == error.field
    assert error.field in str(error)
    assert all(isinstance(value, str) for value in error.metadata.values())


def test_dense_calls_are_checked_as_well(make_case, device):
    case = make_case(dense=True)
    with pytest.raises(InputError, match=r"cu_seqlens_q\[2\] is 99: expected 103"):
        validate_dense(
            case.q, case.k, case.v, **(case.options | {"cu_seqlens_q": starts(0, 70, 99).to(device)})
        )


@pytest.mark.parametrize("causal", [None, "no", 2, torch.tensor(True)])
def test_dense_attention_is_causal_or_not(make_case, causal):
    case = make_case(dense=True)
    with pytest.raises(InputError, match="expected True or False") as caught:
        validate_dense(case.q, case.k, case.v, **(case.options | {"causal": causal}))
    assert (caught.value.reason, caught.value.field) == ("INVALID_CAUSAL", "causal")


@pytest.mark.parametrize(
    "scale", [torch.finfo(torch.float32).tiny, 1, np.float16(0.5), Fraction(1, 3), 3.4e38]
)
def test_any_scale_that_float32_holds_is_allowed(make_case, scale):
    got = call_of(make_case(), softmax_scale=scale).softmax_scale
    assert type(got) is float
    assert got == float(scale)


@pytest.mark.parametrize("limit", [1, 2**40, np.int32(7), np.uint64(2**63)])
def test_a_workspace_limit_becomes_a_plain_integer(limit):
    assert type(checked_limit(limit)) is int
    assert checked_limit(limit) == limit


@pytest.mark.parametrize("limit", [None, "x", 1.5, 2.0, -5, 0, True, np.True_, np.float32(3)])
def test_a_workspace_limit_is_an_integer_of_at_least_1(limit):
    with pytest.raises(InputError) as caught:
        checked_limit(limit)
    error = caught.value
    assert (error.reason, error.field) == ("INVALID_WORKSPACE_LIMIT_BYTES", "workspace_limit_bytes")
    assert str(error) == f"workspace_limit_bytes is {limit!r}: expected an integer of at least 1"


COPIES = {
    "pickled": lambda error: pickle.loads(pickle.dumps(error)),  # noqa: S301
    "copied": copy.copy,
    "copied deeply": copy.deepcopy,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_an_error_reaches_another_process_whole(make_case, copied):
    """As whatever a process pool's worker raises: pickled."""
    case = make_case()
    case.block_indices[1, 40, 3] = 9
    with pytest.raises(InputError) as caught:
        call_of(case)
    error = caught.value
    error.add_note("layer 3")
    got = copied(error)
    assert type(got) is InputError
    assert str(got) == str(error)
    assert (got.reason, got.field, got.metadata) == (error.reason, error.field, error.metadata)
    assert got.metadata["head"] == "1"
    assert got.__notes__ == ["layer 3"]


def test_values_stay_unread_on_request(make_case, device):
    case = make_case()
    nonsense = torch.full_like(case.block_indices, 10**6)
    wrong_starts = starts(0, 70, 99).to(device)
    assert (
        call_of(case, block_indices=nonsense, cu_seqlens_q=wrong_starts, check_values=False) == case.problem
    )


INDEX_ERRORS = [
    (9, "INDEX_OUT_OF_RANGE", "is 9: sequence 0 has 5 blocks of 16 keys, so expected 0 to 4, or -1"),
    (-2, "INDEX_OUT_OF_RANGE", "is -2: sequence 0 has 5 blocks of 16 keys, so expected 0 to 4, or -1"),
    (2**31 - 1, "INDEX_OUT_OF_RANGE", "is 2147483647: sequence 0 has 5 blocks"),
    (-(2**31), "INDEX_OUT_OF_RANGE", "is -2147483648: sequence 0 has 5 blocks"),
    (3, "INDEX_NOT_CAUSAL", "is 3: the token's own block is 2, so under causal expected at most 2"),
    (0, "INDEX_DUPLICATE", "is 0: slot 1 has it already; ids must be unique in a row"),
]


@pytest.mark.parametrize(("value", "reason", "message"), INDEX_ERRORS)
def test_a_bad_id_is_named_with_its_place(make_case, value, reason, message):
    case = make_case()
    case.block_indices[1, 40] = torch.tensor([2, 0, -1, value])
    with pytest.raises(InputError) as caught:
        call_of(case)
    assert caught.value.reason == reason
    assert str(caught.value).startswith(f"block_indices[head 1, token 40, slot 3] {message}")
    expected = {"head": "1", "token": "40", "slot": "3", "value": str(value), "sequence": "0"}
    assert expected.items() <= caught.value.metadata.items()


def test_queries_before_the_first_key_may_select_nothing(make_case):
    case = make_case(q_lens=(8,), k_lens=(3,))
    case.block_indices[0, 2, 1] = 0
    with pytest.raises(
        InputError, match=r"token 2, slot 1\] is 0: the token comes before all keys, so .* -1"
    ):
        call_of(case)


def offenders(ids, q_lens, k_lens, block_size, query_block_size, causal):
    """Every bad id, one after the other: (reason, head, first token of the row, slot)."""
    for head, rows in enumerate(ids.tolist()):
        row, token = 0, 0
        for len_q, len_k in zip(q_lens, k_lens, strict=True):
            for first in range(0, len_q, query_block_size):
                last = min(first + query_block_size, len_q) - 1
                position = len_k - len_q + last
                num_blocks = -(-len_k // block_size)
                for slot, value in enumerate(rows[row]):
                    if value < -1 or value >= num_blocks:
                        yield "INDEX_OUT_OF_RANGE", head, token + first, slot
                    elif causal and value >= 0 and value * block_size > position:
                        yield "INDEX_NOT_CAUSAL", head, token + first, slot
                    elif value >= 0 and value in rows[row][:slot]:
                        yield "INDEX_DUPLICATE", head, token + first, slot
                row += 1
            token += len_q


@st.composite
def calls(draw):
    lens = st.integers(0, 40)
    k_lens = draw(st.lists(lens, min_size=1, max_size=4))
    q_lens = [draw(lens) for _ in k_lens]
    return {
        "q_lens": q_lens,
        "k_lens": k_lens,
        "query_block_size": draw(st.sampled_from([1, 1, 3, 16])),
        "causal": draw(st.booleans()),
        "num_slots": draw(st.integers(1, 5)),
        "corruptions": draw(st.integers(0, 3)),
        "ascending": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def valid_ids(rng, q_lens, k_lens, query_block_size, causal, num_slots, ascending, **_):
    """int32 [2, rows, num_slots], each row as many distinct visible blocks as chance has it."""
    rows = []
    for _ in range(2):
        for len_q, len_k in zip(q_lens, k_lens, strict=True):
            for first in range(0, len_q, query_block_size):
                last = min(first + query_block_size, len_q) - 1
                visible = -(-(max(len_k - len_q + last + 1, 0) if causal else len_k) // 16)
                row = np.full(num_slots, -1)
                chosen = rng.permutation(visible)[:num_slots]
                row[: len(chosen)] = np.sort(chosen) if ascending else chosen
                row[rng.random(num_slots) < 0.2] = -1
                rows.append(row if ascending else rng.permutation(row))
    return np.array(rows, dtype=np.int32).reshape(2, -1, num_slots)


@settings(max_examples=300, deadline=None)
@given(call=calls())
@example(call={"q_lens": [40], "k_lens": [40], "query_block_size": 1, "causal": True, "num_slots": 5,
               "corruptions": 2, "ascending": False, "seed": 0})  # fmt: skip
def test_the_first_offender_is_the_one_a_plain_loop_finds(device, call):
    rng = np.random.default_rng(call["seed"])
    ids = valid_ids(rng, **call)
    for _ in range(call["corruptions"] if ids.size else 0):
        place = tuple(rng.integers(size) for size in ids.shape)
        ids[place] = rng.choice([-7, -2, 0, 1, 2, 3, 2**31 - 1])
    q_lens, k_lens = call["q_lens"], call["k_lens"]
    expected = next(offenders(ids, q_lens, k_lens, 16, call["query_block_size"], call["causal"]), None)
    if not call["corruptions"]:
        assert expected is None
    q, k = (torch.zeros(sum(lens), 2, 16, device=device) for lens in (q_lens, k_lens))
    cu_q, cu_k = (torch.tensor([0, *lens], device=device).cumsum(0).int() for lens in (q_lens, k_lens))
    found = None
    try:
        validate_selected(
            q,
            k,
            k,
            torch.from_numpy(ids).to(device),
            block_size=16,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            softmax_scale=None,
            causal=call["causal"],
            query_block_size=call["query_block_size"],
        )
    except InputError as error:
        found = (error.reason, *(int(error.metadata[name]) for name in ("head", "token", "slot")))
    assert found == expected


@pytest.mark.parametrize("ids_at_once", [1, 64])
def test_chunks_change_nothing(make_case, monkeypatch, ids_at_once):
    monkeypatch.setattr(index_checks, "CPU_IDS_AT_ONCE", ids_at_once)
    monkeypatch.setattr(index_checks, "CUDA_IDS_AT_ONCE", ids_at_once)
    case = make_case(distribution="ragged")
    assert call_of(case) == case.problem
    case.block_indices[1, 90] = torch.tensor([0, -1, 1, 0])
    with pytest.raises(InputError, match=r"\[head 1, token 90, slot 3\] is 0: slot 0 has it"):
        call_of(case)


def test_validation_imports_no_triton():
    program = "import sys, fsa_core.validation, fsa_core.patterns; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
