"""Selection on the server: answers and ids against the oracle, alone and in company, and refusals."""

import itertools
import math
from dataclasses import fields
from typing import Any

import pytest
import torch

from fsa_core.nsa import reference
from fsa_core.nsa.compression import MeanCompression
from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.selecting import SelectingProblem
from service import codec
from service.admission import MAX_KERNEL_SIZE, check_limits
from service.config import Settings
from service.errors import CODES, FsaError
from service.pb.fsa.v1 import attention_pb2, pattern_pb2
from tests.serving import ServerProcess, eventually, tensor_message, tensor_of

Request = attention_pb2.AttendRequest
Response = attention_pb2.AttendResponse
SIZES: dict[str, Any] = {
    "kernel_size": 8,
    "stride": 4,
    "block_size": 16,
    "top_k": 3,
    "num_first_blocks": 1,
    "num_local_blocks": 1,
}
WINDOW = 20
# A chunk of a prompt, a sequence without queries, one shorter than a window, more queries than keys.
LENS = {"q_lens": (40, 0, 3, 9), "k_lens": (130, 33, 3, 5)}
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5}


def make_request(
    *,
    q_lens: tuple[int, ...] = (150,),
    k_lens: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    is_gated: bool = False,
    whole_numbers: bool = False,
    seed: int = 0,
    **sizes: Any,
) -> Request:
    """Two KV heads of three query heads; asks for everything that there is."""
    generator = torch.Generator().manual_seed(seed)
    k_lens = q_lens if k_lens is None else k_lens

    def numbers(*shape: int) -> torch.Tensor:
        if whole_numbers:
            # Even ones of few values: their means are exact, and blocks tie all the time.
            return 2 * torch.randint(-1, 2, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator).to(dtype)

    num_q, num_k = sum(q_lens), sum(k_lens)
    select = pattern_pb2.Select(**(SIZES | sizes), return_block_indices=True)
    if is_gated:
        select.window = WINDOW
        select.gates.CopyFrom(tensor_message(numbers(num_q, 6, 3).sigmoid()))
    return Request(
        q=tensor_message(numbers(num_q, 6, 32)),
        k=tensor_message(numbers(num_k, 2, 32)),
        v=tensor_message(numbers(num_k, 2, 24)),
        pattern=pattern_pb2.SparsityPattern(select=select),
        cu_seqlens_q=[0, *itertools.accumulate(q_lens)],
        cu_seqlens_k=[0, *itertools.accumulate(k_lens)],
        softmax_scale=math.log(2) if whole_numbers else 0.2,
        causal=True,
        return_lse=not is_gated,
    )


def config_of(select: pattern_pb2.Select) -> NSAConfig:
    shares = {name: getattr(select, name) for name in ("top_p", "min_share") if select.HasField(name)}
    return NSAConfig(**{name: getattr(select, name) for name in SIZES}, **shares, window=WINDOW)


class Oracle:
    """What the server has to answer: from the means as they are in the dtype of q, in float64."""

    def __init__(self, request: Request) -> None:
        self.select = request.pattern.select
        config = config_of(self.select)
        q, k, v = (tensor_of(tensor) for tensor in (request.q, request.k, request.v))
        starts = tuple(torch.tensor(x).int() for x in (request.cu_seqlens_q, request.cu_seqlens_k))
        compress = MeanCompression(config.kernel_size, config.stride)
        k_cmp, v_cmp = (compress(x, starts[1]) for x in (k, v))
        is_exact = abs(request.softmax_scale - math.log(2)) < 1e-6
        rest = (*starts, config, math.log(2) if is_exact else request.softmax_scale)
        self.block_indices = reference.select_blocks_reference(q, k_cmp, *rest)
        self.lse = None
        if self.select.HasField("gates"):
            gates = tensor_of(self.select.gates)
            self.out = reference.nsa_attention_reference(q, k, v, k_cmp, v_cmp, gates, *rest)
        else:
            self.out, self.lse = reference.selected_attention_reference(q, k, v, self.block_indices, *rest)


CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "packed": LENS,
    "gated": {"is_gated": True},
    "gated, packed, bfloat16": {"is_gated": True, "dtype": torch.bfloat16, **LENS},
    "every block": {"top_k": 12},
    "top_p": {"top_p": 0.6, "top_k": 6, "num_local_blocks": 0},
    "min_share": {"min_share": 0.2, "top_k": 6},
    "nothing forced": {"num_first_blocks": 0, "num_local_blocks": 0},
    "ties": {"whole_numbers": True, "top_k": 4},
    "long windows": {"kernel_size": 32, "stride": 16, "block_size": 32},
    "more than a mebibyte": {"q_lens": (1200,)},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_answers_and_chosen_blocks_are_the_oracle_s(server: ServerProcess, case: dict[str, Any]) -> None:
    request = make_request(**case)
    response, oracle = server.attend(request), Oracle(request)
    assert torch.equal(tensor_of(response.block_indices), oracle.block_indices)
    dtype = case.get("dtype", torch.float32)
    bounds = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(tensor_of(response.out).double(), oracle.out, **bounds)
    assert tensor_of(response.out).dtype == dtype
    assert response.HasField("lse") == (oracle.lse is not None)
    if oracle.lse is not None:
        torch.testing.assert_close(tensor_of(response.lse).double(), oracle.lse, atol=1e-4, rtol=1e-4)


def test_the_cases_tell_choosing_from_taking_the_last_blocks() -> None:
    """Else the test above could not fail for a wrong importance."""
    ids = Oracle(make_request()).block_indices
    assert (ids[:, -1, 1] < 7).any(), "the last query chooses something between its first and last blocks"


def test_no_tokens_are_an_empty_answer(server: ServerProcess) -> None:
    response = server.attend(make_request(q_lens=(0,), is_gated=True))
    assert list(response.out.shape) == [0, 6, 24]
    assert list(response.block_indices.shape) == [2, 0, 3]


def test_blocks_are_returned_on_request_only(server: ServerProcess) -> None:
    request = make_request()
    asked = server.attend(request)
    request.pattern.select.return_block_indices = False
    answer = server.attend(request)
    assert not answer.HasField("block_indices")
    assert answer.out == asked.out


def test_the_blocks_returned_give_the_same_answer_when_they_are_sent(server: ServerProcess) -> None:
    request = make_request(**LENS, dtype=torch.float16)
    chosen = server.attend(request)
    indices = pattern_pb2.BlockIndices(indices=chosen.block_indices, block_size=16)
    request.pattern.CopyFrom(pattern_pb2.SparsityPattern(block_indices=indices))
    sent = server.attend(request)
    assert (sent.out, sent.lse) == (chosen.out, chosen.lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_answers_are_bitwise_the_same_in_company(server: ServerProcess, dtype: torch.dtype) -> None:
    shapes = [{"q_lens": (70,)}, LENS, {"q_lens": (1,), "k_lens": (99,)}, {"q_lens": (33, 64)}]
    # Of windows as long as these the order of a sum can be seen.
    sizes = {"kernel_size": 32, "stride": 16}
    requests = [
        make_request(**shape, **sizes, dtype=dtype, seed=seed, is_gated=is_gated)
        for is_gated in (False, True)
        for seed, shape in enumerate(shapes)
    ]
    alone = [server.attend(request) for request in requests]
    with server.frozen_worker():
        calls = [server.start_call(request.SerializeToString()) for request in requests * 2]
        eventually(lambda: server.metrics()["fsa_queue_depth",] >= len(requests), what="requests queue up")
    together = [Response.FromString(call.result()) for call in calls]
    assert max(response.timings.batch_requests for response in together) >= len(shapes)
    for response, expected in zip(together, alone * 2, strict=True):
        assert response.out == expected.out
        assert (response.lse, response.block_indices) == (expected.lse, expected.block_indices)


def gates(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {"gates": tensor_message(torch.zeros(shape, dtype=dtype)), "window": 4}


# What is wrong with the pattern: its reason, the field to blame, and what part of the sentence says.
WRONG: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "no kernel size": ({"kernel_size": 0}, "INVALID_KERNEL_SIZE", "kernel_size", "at least 1"),
    "uneven windows": ({"kernel_size": 6}, "INVALID_KERNEL_SIZE", "kernel_size", "multiple of stride, 4"),
    "no stride": ({"stride": 0}, "INVALID_STRIDE", "stride", "at least 1"),
    "a block size that is none": ({"block_size": 48}, "INVALID_BLOCK_SIZE", "block_size", "one of 16"),
    "no block": ({"top_k": 0}, "INVALID_TOP_K", "top_k", "at least 1"),
    "fewer than forced": ({"num_local_blocks": 3}, "INVALID_TOP_K", "top_k", "from 4"),
    "negative": ({"num_first_blocks": -1}, "INVALID_NUM_FIRST_BLOCKS", "num_first_blocks", "at least 0"),
    "negative local": (
        {"num_local_blocks": -1},
        "INVALID_NUM_LOCAL_BLOCKS",
        "num_local_blocks",
        "at least 0",
    ),
    "a share above 1": ({"top_p": 1.5}, "INVALID_TOP_P", "top_p", "at most 1"),
    "a share of NaN": ({"min_share": math.nan}, "INVALID_MIN_SHARE", "min_share", "above 0"),
    "a window without gates": ({"window": 4}, "INVALID_WINDOW", "window", "expected 0"),
    "gates without window": (gates((150, 6, 3)) | {"window": 0}, "INVALID_WINDOW", "window", "at least 1"),
    "two gates": (gates((150, 6, 2)), "INVALID_GATES", "gates", "[150, 6, 3]"),
    "gates of a token": (gates((150, 3)), "INVALID_RANK", "gates", "3"),
    "gates of another dtype": (gates((150, 6, 3), torch.float16), "INVALID_DTYPE", "gates", "that of q"),
    "an lse of gated branches": (gates((150, 6, 3)), "INVALID_GATES", "return_lse", "no log-sum-exp"),
}


@pytest.mark.parametrize(("wrong", "reason", "field", "text"), WRONG.values(), ids=WRONG)
def test_each_refusal_names_field_and_expectation(
    wrong: dict[str, Any], reason: str, field: str, text: str
) -> None:
    request = make_request()
    request.return_lse = field == "return_lse"
    request.pattern.select.MergeFrom(pattern_pb2.Select(**wrong))
    for name in (name for name, value in wrong.items() if value == 0):
        request.pattern.select.ClearField(name)
    with pytest.raises(FsaError) as caught:
        codec.decode_attend(request.SerializeToString())
    assert (caught.value.reason, caught.value.metadata["field"]) == (reason, field)
    assert text in caught.value.message


def test_selection_looks_back_only() -> None:
    request = make_request()
    request.causal = False
    with pytest.raises(FsaError) as caught:
        codec.decode_attend(request.SerializeToString())
    assert (caught.value.reason, caught.value.metadata["field"]) == ("INVALID_PATTERN", "causal")


@pytest.mark.parametrize(
    ("limit", "over"),
    [
        ("max_kernel_size", {"kernel_size": MAX_KERNEL_SIZE + 4}),
        ("max_slots", {"top_k": Settings().max_slots + 1}),
    ],
)
def test_limits_of_selection_are_named(limit: str, over: dict[str, int]) -> None:
    check_limits(codec.decode_attend(make_request().SerializeToString()).problem, Settings())
    problem = codec.decode_attend(make_request(**over).SerializeToString()).problem
    assert isinstance(problem, SelectingProblem)
    with pytest.raises(FsaError) as caught:
        check_limits(problem, Settings())
    assert (caught.value.reason, caught.value.metadata["limit"]) == ("LIMIT_EXCEEDED", limit)


def test_every_fault_of_the_sizes_has_a_code() -> None:
    assert {f"INVALID_{field.name.upper()}" for field in fields(NSAConfig)} <= set(CODES)
