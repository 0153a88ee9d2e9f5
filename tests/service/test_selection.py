"""Patterns of every kind become the normal form, or are refused by field and place."""

import asyncio
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from fsa_core import block_csr as block_csr_module
from fsa_core.patterns import expand_query_blocks, from_vertical_slash
from service import codec
from service.admission import Admission
from service.arena import ArenaPool
from service.config import Settings
from service.errors import FsaError
from service.job import Layout
from service.pb.fsa.v1 import attention_pb2, pattern_pb2
from tests.pattern_messages import block_csr, block_mask, vertical_slash
from tests.serving import request_of, tensor_message

MakeCase = Callable[..., Any]
BLOCK = 16
# Chunked prefill, a sequence without queries, and one whose blocks all fit one row.
LENS = {"q_lens": (40, 0, 21), "k_lens": (90, 33, 21)}


def int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def normal_form(case: Any, pattern: pattern_pb2.SparsityPattern) -> torch.Tensor:
    """What ``pattern`` becomes in the arena, beside the tensors of ``case``."""
    request = request_of(case)
    request.pattern.CopyFrom(pattern)
    call = codec.decode_attend(request.SerializeToString())
    field = Layout.of(call.problem).block_indices
    memory = memoryview(bytearray(b"\x7f" * Layout.of(call.problem).total_bytes))
    codec.write_inputs(call, memory)
    raw = torch.frombuffer(memory, dtype=torch.uint8)[field.offset : field.offset + field.num_bytes]
    return raw.view(torch.int32).view(field.shape)


def ascending_rows(case: Any, heads: int, query_block_size: int) -> torch.Tensor:
    """int32 [heads, rows, slots of the fullest]: what the last query of each row selects, then -1."""
    starts = case.cu_seqlens_q.tolist()
    last = [
        min(first + query_block_size, end) - 1
        for start, end in itertools.pairwise(starts)
        for first in range(start, end, query_block_size)
    ]
    ids = case.block_indices[:heads, last].cpu()
    ids = ids.where(ids >= 0, 99).sort(dim=-1).values
    return ids[..., : int((ids < 99).sum(-1).amax())].masked_fill(ids == 99, -1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("query_block_size", [1, 16, 24])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_each_form_of_one_selection_becomes_the_same_rows(
    make_case: MakeCase, heads: int, query_block_size: int, causal: bool
) -> None:
    case = make_case(**LENS, index_heads=4, distribution="ragged", causal=causal)
    ids = ascending_rows(case, heads, query_block_size)
    sizes = {"block_size": BLOCK, "query_block_size": query_block_size}
    starts = {"cu_seqlens_q": case.cu_seqlens_q.cpu(), "cu_seqlens_k": case.cu_seqlens_k.cpu()}
    expected = expand_query_blocks(ids, **sizes, **starts, causal=causal)
    for pattern in (block_csr(ids, **sizes), block_mask(ids, **sizes, num_blocks=6)):
        assert torch.equal(normal_form(case, pattern), expected), pattern.WhichOneof("kind")


def test_ragged_ids_keep_their_order_and_rows_of_one_length_need_no_place_to_be_found(
    make_case: MakeCase,
) -> None:
    case = make_case(q_lens=(3,), k_lens=(90,))
    ids = int32([[4, 0], [1, 3], [5, 2]])
    assert torch.equal(normal_form(case, block_csr(ids, BLOCK)), ids)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_columns_and_diagonals_become_the_rows_of_the_library(make_case: MakeCase, heads: int) -> None:
    case = make_case(**LENS)
    vertical, slash = (
        torch.randint(-1, 95, (heads, n), generator=torch.Generator().manual_seed(n)).int() for n in (3, 5)
    )
    starts = {"cu_seqlens_q": case.cu_seqlens_q.cpu(), "cu_seqlens_k": case.cu_seqlens_k.cpu()}
    expected = from_vertical_slash(vertical, slash, block_size=BLOCK, **starts)
    assert torch.equal(normal_form(case, vertical_slash(vertical, slash, BLOCK)), expected.indices)


def test_a_pattern_without_marks_selects_nothing(make_case: MakeCase) -> None:
    case = make_case(q_lens=(20,))
    nothing = torch.full((1, 20, 1), -1, dtype=torch.int32)
    empty = torch.zeros(1, 0, dtype=torch.int32)
    for pattern in (
        block_csr(nothing, BLOCK),
        block_mask(nothing, BLOCK, num_blocks=2),
        vertical_slash(empty, empty, BLOCK),
    ):
        assert torch.equal(normal_form(case, pattern), nothing), pattern.WhichOneof("kind")


def test_no_tokens_need_no_rows(make_case: MakeCase) -> None:
    case = make_case(q_lens=(0,), k_lens=(20,))
    nothing = torch.zeros(2, 0, 1, dtype=torch.int32)
    for pattern in (block_csr(nothing, BLOCK), block_mask(nothing, BLOCK, num_blocks=2)):
        assert normal_form(case, pattern).shape == (2, 0, 1)


def csr(offsets: torch.Tensor, indices: torch.Tensor, **sizes: int) -> pattern_pb2.SparsityPattern:
    message = pattern_pb2.BlockCsr(offsets=tensor_message(offsets), indices=tensor_message(indices), **sizes)
    return pattern_pb2.SparsityPattern(block_csr=message)


def rows_16(offsets: torch.Tensor, indices: torch.Tensor) -> pattern_pb2.SparsityPattern:
    """The 40 queries over 60 keys of the case take three rows; the last query of each sees block 2, 3, 3."""
    return csr(offsets, indices, block_size=BLOCK, query_block_size=16)


def mask_16(mask: torch.Tensor) -> pattern_pb2.SparsityPattern:
    sizes = {"block_size": BLOCK, "query_block_size": 16}
    return pattern_pb2.SparsityPattern(block_mask=pattern_pb2.BlockMask(mask=tensor_message(mask), **sizes))


def marks(*places: tuple[int, int, int], heads: int = 2) -> torch.Tensor:
    mask = torch.zeros(heads, 3, 4, dtype=torch.bool)
    for place in places:
        mask[place] = True
    return mask


def byte_of_two() -> pattern_pb2.SparsityPattern:
    pattern = mask_16(marks())
    payload = bytearray(pattern.block_mask.mask.inline)
    payload[12 + 4 + 3] = 2
    pattern.block_mask.mask.inline = bytes(payload)
    return pattern


def without(pattern: pattern_pb2.SparsityPattern, name: str) -> pattern_pb2.SparsityPattern:
    getattr(pattern, pattern.WhichOneof("kind")).ClearField(name)
    return pattern


NO_ROWS, NO_IDS = int32([0, 0, 0, 0]), int32()
BIG = 2**31 - 1
REFUSALS: Mapping[str, tuple[pattern_pb2.SparsityPattern, str, dict[str, Any]]] = {
    "no offsets": (without(rows_16(NO_ROWS, NO_IDS), "offsets"), "MISSING_FIELD", {"field": "offsets"}),
    "no indices": (without(rows_16(NO_ROWS, NO_IDS), "indices"), "MISSING_FIELD", {"field": "indices"}),
    "no mask": (without(mask_16(marks()), "mask"), "MISSING_FIELD", {"field": "mask"}),
    "no slash": (
        without(vertical_slash(int32([0]), int32([0]), BLOCK), "slash"),
        "MISSING_FIELD",
        {"field": "slash"},
    ),
    "float offsets": (rows_16(NO_ROWS.float(), NO_IDS), "INVALID_DTYPE", {"field": "offsets"}),
    "bool indices": (
        rows_16(int32([0, 1, 1, 1]), torch.ones(1).bool()),
        "INVALID_DTYPE",
        {"field": "indices"},
    ),
    "int mask": (mask_16(marks().int()), "INVALID_DTYPE", {"field": "mask", "expected": "bool"}),
    "half columns": (
        vertical_slash(torch.zeros(1, 1).half(), int32([0]), BLOCK),
        "INVALID_DTYPE",
        {"field": "vertical"},
    ),
    "flat offsets": (rows_16(NO_ROWS[0], NO_IDS), "INVALID_RANK", {"field": "offsets"}),
    "flat mask": (mask_16(marks()[0]), "INVALID_RANK", {"field": "mask"}),
    "flat slash": (vertical_slash(int32([0]), int32(0), BLOCK), "INVALID_RANK", {"field": "slash"}),
    "a wrong block size": (csr(NO_ROWS, NO_IDS, block_size=24), "INVALID_BLOCK_SIZE", {"got": 24}),
    "a negative query block": (
        csr(NO_ROWS, NO_IDS, block_size=16, query_block_size=-1),
        "INVALID_QUERY_BLOCK_SIZE",
        {"got": -1},
    ),
    "three heads of offsets": (
        rows_16(NO_ROWS.expand(3, -1), NO_IDS),
        "INVALID_INDEX_SHAPE",
        {"field": "offsets", "got": 3},
    ),
    "three heads of a mask": (mask_16(marks(heads=3)), "INVALID_INDEX_SHAPE", {"field": "mask", "got": 3}),
    "three heads of columns": (
        vertical_slash(int32([0], [0], [0]), int32([0], [0], [0]), BLOCK),
        "INVALID_INDEX_SHAPE",
        {"field": "vertical", "got": 3},
    ),
    "other heads of diagonals": (
        vertical_slash(int32([0]), int32([0], [0]), BLOCK),
        "INVALID_INDEX_SHAPE",
        {"field": "slash", "got": 2},
    ),
    "a row too few in offsets": (
        rows_16(NO_ROWS[:, 1:], NO_IDS),
        "INVALID_INDEX_SHAPE",
        {"field": "offsets", "got": 2},
    ),
    "a row too many in a mask": (
        mask_16(torch.zeros(1, 4, 4).bool()),
        "INVALID_INDEX_SHAPE",
        {"field": "mask", "got": 4},
    ),
    "a column too few in a mask": (
        mask_16(torch.zeros(1, 3, 3).bool()),
        "INVALID_INDEX_SHAPE",
        {"field": "mask", "got": 3},
    ),
    "no offsets in it": (rows_16(int32([]), NO_IDS), "INVALID_OFFSETS", {"field": "offsets"}),
    "offsets that start late": (
        rows_16(int32([1, 1, 1, 1]), int32(0)),
        "INVALID_OFFSETS",
        {"head": 0, "index": 0, "value": 1},
    ),
    "a head that starts late": (
        rows_16(int32([0, 1, 1, 1], [2, 2, 2, 2]), int32(0, 0)),
        "INVALID_OFFSETS",
        {"head": 1, "index": 0, "value": 2},
    ),
    "offsets that decrease": (
        rows_16(int32([0, 2, 1, 2]), int32(0, 1)),
        "INVALID_OFFSETS",
        {"head": 0, "index": 2, "value": 1},
    ),
    "offsets whose differences overflow": (
        rows_16(int32([0, BIG, -2, 1]), int32(0)),
        "INVALID_OFFSETS",
        {"head": 0, "index": 2, "value": -2},
    ),
    "fewer ids than offsets": (rows_16(int32([0, 1, 1, 2]), int32(0)), "INVALID_OFFSETS", {"got": 2}),
    "a row with too many ids": (
        rows_16(int32([0, 0, 0, 4097]), torch.zeros(4097, dtype=torch.int32)),
        "INVALID_INDEX_SHAPE",
        {"field": "offsets", "got": 4097},
    ),
    "an id past the sequence": (
        rows_16(int32([0, 0, 0, 1], [1, 1, 3, 3]), int32(0, 3, 4)),
        "INDEX_OUT_OF_RANGE",
        {"field": "indices", "head": 1, "row": 1, "token": 16, "slot": 1, "index": 2, "value": 4},
    ),
    "an id below -1": (
        rows_16(int32([0, 1, 1, 1]), int32(-2)),
        "INDEX_OUT_OF_RANGE",
        {"field": "indices", "head": 0, "row": 0, "slot": 0, "index": 0, "value": -2},
    ),
    "an id of the future": (
        rows_16(int32([0, 2, 2, 2]), int32(2, 3)),
        "INDEX_NOT_CAUSAL",
        {"field": "indices", "head": 0, "row": 0, "token": 0, "slot": 1, "index": 1, "value": 3},
    ),
    "an id that is there already": (
        rows_16(int32([0, 1, 1, 4]), int32(0, 3, 0, 3)),
        "INDEX_DUPLICATE",
        {"field": "indices", "head": 0, "row": 2, "token": 32, "slot": 2, "index": 3, "value": 3},
    ),
    "a mark past the sequence": (
        mask_16(marks((0, 2, 3), (1, 0, 3))),
        "INDEX_NOT_CAUSAL",
        {"field": "mask", "head": 1, "row": 0, "token": 0, "index": 3, "value": 3},
    ),
    "a byte that is no bool": (
        byte_of_two(),
        "INVALID_PATTERN",
        {"field": "mask", "head": 1, "row": 1, "index": 3, "value": 2},
    ),
    "a column below -1": (
        vertical_slash(int32([0, -1], [0, -5]), int32([0], [0]), BLOCK),
        "INVALID_PATTERN",
        {"field": "vertical", "head": 1, "index": 1, "value": -5},
    ),
    "a distance below -1": (
        vertical_slash(int32([0]), int32([-1, -2]), BLOCK),
        "INVALID_PATTERN",
        {"field": "slash", "head": 0, "index": 1, "value": -2},
    ),
}


@pytest.mark.parametrize("refused", REFUSALS)
def test_what_is_wrong_is_refused_by_field_and_place(make_case: MakeCase, refused: str) -> None:
    pattern, reason, expected = REFUSALS[refused]
    case = make_case(q_lens=(40,), k_lens=(60,))
    request = request_of(case, request_id="mine")
    request.pattern.CopyFrom(pattern)
    error = refusal(request)
    assert (error.reason, error.code.name, error.request_id) == (reason, "INVALID_ARGUMENT", "mine")
    facts = {name: str(value) for name, value in expected.items()}
    assert error.metadata | facts == error.metadata
    assert error.metadata["field"] in error.message


def test_blocks_past_a_shorter_sequence_are_refused(make_case: MakeCase) -> None:
    request = request_of(make_case(q_lens=(5, 5), k_lens=(60, 20), causal=False))
    mask = torch.zeros(1, 10, 4, dtype=torch.bool)
    mask[0, :5] = mask[0, 7, 2] = True
    request.pattern.CopyFrom(mask_16(mask))
    request.pattern.block_mask.query_block_size = 0
    error = refusal(request)
    assert error.reason == "INDEX_OUT_OF_RANGE"
    assert {"row": "7", "token": "7", "value": "2"}.items() <= error.metadata.items()
    assert "mask[head 0, token 7, block 2] is set: sequence 1 has 2 blocks" in error.message


def test_columns_and_diagonals_need_causal_and_end_with_as_many_slots_as_there_are(
    make_case: MakeCase,
) -> None:
    request = request_of(make_case(q_lens=(40,), causal=False))
    request.pattern.CopyFrom(vertical_slash(int32([0]), int32([0]), BLOCK))
    assert (refusal(request).reason, refusal(request).metadata["field"]) == ("INVALID_PATTERN", "causal")
    long = request_of(make_case(q_lens=(1,), k_lens=(70_000,), head_dim=16))
    every_block = torch.arange(0, 70_000, BLOCK, dtype=torch.int32)[None]
    long.pattern.CopyFrom(vertical_slash(every_block, int32([0]), BLOCK))
    error = refusal(long)
    assert (error.reason, error.metadata["got"]) == ("INVALID_INDEX_SHAPE", str(every_block.shape[1]))


def test_the_first_bad_id_of_many_is_found(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among more ids than are looked at together, in rows of every length."""
    monkeypatch.setattr(block_csr_module, "CPU_IDS_AT_ONCE", 1000)
    case = make_case(q_lens=(2000,), head_dim=16, index_heads=2, num_slots=60, distribution="ragged")
    rows = [[[i for i in row if i >= 0] for row in head] for head in case.block_indices.tolist()]
    for head, row, slot, value in ((1, 1999, 0, 125), (1, 900, 5, None), (0, 1990, 3, 125)):
        ids = rows[head][row]
        ids[slot] = ids[0] if value is None else value
        offsets = [0, *itertools.accumulate(len(ids) for ids in (*rows[0], *rows[1]))]
        request = request_of(case)
        both = int32(offsets[:2001], offsets[2000:])
        flat = int32(*itertools.chain.from_iterable(itertools.chain(*rows)))
        request.pattern.CopyFrom(csr(both, flat, block_size=BLOCK))
        error = refusal(request)
        assert error.reason == ("INDEX_DUPLICATE" if value is None else "INDEX_OUT_OF_RANGE")
        place = {"head": head, "row": row, "slot": slot, "index": offsets[head * 2000 + row] + slot}
        assert {name: str(number) for name, number in place.items()}.items() <= error.metadata.items()


def test_what_a_pattern_becomes_is_admitted_or_not_before_it_is_written(make_case: MakeCase) -> None:
    settings = Settings(max_inflight_bytes=64 << 20, max_message_bytes=64 << 20, max_slots=300)
    admission = Admission(settings, ArenaPool(settings.max_inflight_bytes))

    def limit_of(request: attention_pb2.AttendRequest) -> tuple[str, int]:
        raw = request.SerializeToString()
        assert request.pattern.ByteSize() < 1 << 20
        with pytest.raises(FsaError) as caught:
            asyncio.run(admission.admit(codec.decode_attend(raw).problem))
        assert caught.value.reason == "LIMIT_EXCEEDED"
        return caught.value.metadata["limit"], int(caught.value.metadata["value"])

    request = request_of(make_case(q_lens=(20,), k_lens=(5000,), head_dim=16))
    rows = torch.full((1, 20, 301), -1, dtype=torch.int32)
    rows[0, 7] = torch.arange(301)
    request.pattern.CopyFrom(block_csr(rows, BLOCK))
    assert limit_of(request) == ("max_slots", 301)
    tokens, heads = 10_000, 16
    request = request_of(make_case(q_lens=(tokens,), num_kv_heads=1, group_size=heads, head_dim=16))
    columns = torch.arange(0, tokens, 64, dtype=torch.int32).expand(heads, -1).contiguous()
    request.pattern.CopyFrom(vertical_slash(columns, columns[:, :0].contiguous(), 64))
    limit, num_bytes = limit_of(request)
    assert limit == "max_inflight_bytes"
    assert num_bytes > heads * tokens * columns.shape[1] * 4


def refusal(request: attention_pb2.AttendRequest) -> FsaError:
    with pytest.raises(FsaError) as caught:
        codec.decode_attend(request.SerializeToString())
    return caught.value
