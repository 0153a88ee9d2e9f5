"""Requests with exactly one fault, and what the server has to say about each."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, product
from typing import Any

import torch
from hypothesis import strategies as st

from service.pb.fsa.v1 import attention_pb2, pattern_pb2, tensor_pb2
from tests import pattern_messages
from tests.serving import tensor_message, tensor_of

Request = attention_pb2.AttendRequest
Draw = Callable[[st.SearchStrategy[Any]], Any]

# The server under test has small limits, so that small requests can be over them.
LIMITS = {
    "max_tokens": 300,
    "max_sequences": 8,
    "max_q_heads": 16,
    "max_slots": 8,
    "max_message_bytes": 1 << 20,
}

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
Q_LENS, K_LENS = (5, 0, 24, 1), (33, 7, 24, 50)
BLOCK, SLOTS, MOST_BLOCKS = 16, 4, 4

# The tensors of each pattern, by the names that refusals give them.
TENSORS = {
    "block_indices": {"block_indices": "indices"},
    "block_csr": {"offsets": "offsets", "indices": "indices"},
    "block_mask": {"mask": "mask"},
    "vertical_slash": {"vertical": "vertical", "slash": "slash"},
    "select": {"gates": "gates"},
}


CAUSAL = ("vertical_slash", "select")


@dataclass(frozen=True)
class BadRequest:
    """``metadata`` is what the refusal's metadata has to contain, at least."""

    raw: bytes
    reason: str
    code: str = "INVALID_ARGUMENT"
    metadata: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"BadRequest({self.reason}, {self.metadata}, {len(self.raw)} bytes)"


Fault = Callable[[Draw, Request], BadRequest]


@cache
def _valid(dtype: torch.dtype, index_heads: int, causal: bool, kind: str) -> bytes:
    """2 KV heads, 4 query heads; every row has its own block and the one before it, where there is one."""
    generator = torch.Generator().manual_seed(index_heads)
    q, k, v = (
        torch.randn(n, heads, dim, generator=generator).to(dtype)
        for n, heads, dim in ((sum(Q_LENS), 4, 32), (sum(K_LENS), 2, 32), (sum(K_LENS), 2, 16))
    )
    # Every query sees at least one block; block 0 is right for all, block 1 where there is one.
    own = torch.cat(
        [(n_k - n_q + torch.arange(n_q)) // BLOCK for n_q, n_k in zip(Q_LENS, K_LENS, strict=True)]
    )
    rows = torch.stack([own, torch.full_like(own, -1), own - 1, torch.full_like(own, -1)], dim=-1)
    indices = rows.clamp(min=-1).int().expand(index_heads, -1, -1)
    return Request(
        request_id="fuzz",
        q=tensor_message(q),
        k=tensor_message(k),
        v=tensor_message(v),
        pattern=_select(dtype) if kind == "select" else _pattern(kind, indices),
        cu_seqlens_q=[0, *accumulate(Q_LENS)],
        cu_seqlens_k=[0, *accumulate(K_LENS)],
        causal=causal,
    ).SerializeToString()


def _select(dtype: torch.dtype) -> pattern_pb2.SparsityPattern:
    select = pattern_pb2.Select(
        kernel_size=8,
        stride=4,
        block_size=BLOCK,
        top_k=SLOTS,
        num_first_blocks=1,
        num_local_blocks=1,
        gates=tensor_message(torch.ones(sum(Q_LENS), 4, 3, dtype=dtype)),
        window=20,
    )
    return pattern_pb2.SparsityPattern(select=select)


def _pattern(kind: str, indices: torch.Tensor) -> pattern_pb2.SparsityPattern:
    match kind:
        case "block_indices":
            return pattern_messages.block_indices(indices, BLOCK)
        case "block_csr":
            return pattern_messages.block_csr(indices, BLOCK)
        case "block_mask":
            return pattern_messages.block_mask(indices, BLOCK, num_blocks=MOST_BLOCKS)
        case _:
            entries = torch.tensor([[0, 40, -1]]).int().expand(len(indices), -1)
            return pattern_messages.vertical_slash(entries, entries[:, :2], BLOCK)


@cache
def one_of(*options: Any) -> st.SearchStrategy[Any]:
    """One of the options. A strategy is costly to make and cheap to draw from, so each is made once."""
    return st.sampled_from(options)


@cache
def integers(smallest: int, largest: int) -> st.SearchStrategy[int]:
    return st.integers(smallest, largest)


def _valid_request(draw: Draw, *kinds: str) -> Request:
    dtype, index_heads, causal, kind = draw(
        one_of(*product(FLOATS, (1, 2, 4), (False, True), kinds or TENSORS))
    )
    return Request.FromString(_valid(dtype, index_heads, causal or kind in CAUSAL, kind))


valid_requests = st.composite(_valid_request)


WRONG_BLOCK_SIZES = integers(-(2**31), 2**31 - 1).filter(lambda n: n not in (16, 32, 64, 128, 256))
WRONG_SCALES = one_of(0.0, -0.0, math.nan, math.inf, -math.inf) | st.floats(max_value=-(2.0**-100), width=32)
WRONG_IDS = st.text("0aZ~", min_size=129, max_size=300) | st.text(" \n\té\0💥", min_size=1, max_size=20)


def missing(draw: Draw, request: Request) -> BadRequest:
    name = draw(one_of("q", "k", "v", "pattern"))
    request.ClearField(name)
    return BadRequest(request.SerializeToString(), "MISSING_FIELD", metadata={"field": name})


def missing_payload(draw: Draw, request: Request) -> BadRequest:
    name, tensor = _any_tensor(draw, request)
    tensor.ClearField("inline")
    metadata = {"field": f"{name}.inline"}
    return BadRequest(request.SerializeToString(), "MISSING_FIELD", metadata=metadata)


def unknown_dtype(draw: Draw, request: Request) -> BadRequest:
    name, tensor = _any_tensor(draw, request)
    tensor.dtype = draw(one_of(0, 6, 99, -1, 2**31 - 1))
    return BadRequest(request.SerializeToString(), "INVALID_DTYPE", metadata={"field": name})


def wrong_dtype(draw: Draw, request: Request) -> BadRequest:
    """A known dtype in the wrong place, with the right number of bytes for it."""
    name, tensor = _any_tensor(draw, request)
    values = tensor_of(tensor)
    known = (torch.int32, *FLOATS) if name in ("q", "k", "v") else (torch.int32, torch.bool, *FLOATS)
    dtype = draw(one_of(*(dtype for dtype in known if dtype != values.dtype)))
    tensor.CopyFrom(tensor_message(values.to(dtype)))
    # Where q changes to another float, it is k that disagrees with it.
    blamed = "k" if name == "q" and dtype is not torch.int32 else name
    return BadRequest(request.SerializeToString(), "INVALID_DTYPE", metadata={"field": blamed})


def wrong_byte_count(draw: Draw, request: Request) -> BadRequest:
    name, tensor = _any_tensor(draw, request)
    payload = tensor.inline
    cut = draw(integers(1, len(payload)))
    tensor.inline = payload[:-cut] if draw(one_of(False, True)) else payload + bytes(cut)
    metadata = {"field": name, "expected_bytes": str(len(payload)), "num_bytes": str(len(tensor.inline))}
    return BadRequest(request.SerializeToString(), "INVALID_BYTE_COUNT", metadata=metadata)


def impossible_shape(draw: Draw, request: Request) -> BadRequest:
    name, tensor = _any_tensor(draw, request)
    axis = draw(integers(0, len(tensor.shape) - 1))
    kind = draw(one_of("negative", "huge", "deep"))
    if kind == "negative":
        tensor.shape[axis] = draw(integers(-(2**63), -1))
    elif kind == "huge":
        tensor.shape[axis] = draw(integers(2**62, 2**63 - 1))
        if draw(one_of(False, True)) and len(tensor.shape) > 1:
            tensor.shape[axis - 1] = 0
    else:
        tensor.shape.extend([1] * draw(integers(8, 40)))
    return BadRequest(request.SerializeToString(), "INVALID_SHAPE", metadata={"field": name})


def wrong_rank(draw: Draw, request: Request) -> BadRequest:
    name, tensor = _any_tensor(draw, request)
    first, *rest = tensor.shape
    shapes = [[*tensor.shape, 1], [1, *tensor.shape]]
    if rest:
        shapes += [[math.prod(tensor.shape)], [first * rest[0], *rest[1:]]]
    tensor.shape[:] = shapes[draw(integers(0, len(shapes) - 1))]
    return BadRequest(request.SerializeToString(), "INVALID_RANK", metadata={"field": name})


def wrong_heads(draw: Draw, request: Request) -> BadRequest:
    name = draw(one_of("q", "v"))
    tensor = getattr(request, name)
    values = tensor_of(tensor)
    heads = draw(one_of(0, 1, 3, 5) if name == "q" else one_of(0, 1, 3))
    tensor.CopyFrom(tensor_message(_resized(values, 1, heads)))
    return BadRequest(request.SerializeToString(), "INVALID_HEADS", metadata={"field": name})


def wrong_head_dim(draw: Draw, request: Request) -> BadRequest:
    name = draw(one_of("q", "k", "v"))
    tensor = getattr(request, name)
    # k's has to be that of q, which is 32.
    sizes = (0, 1, 15, 257, 300, *((16, 31, 64) if name == "k" else ()))
    tensor.CopyFrom(tensor_message(_resized(tensor_of(tensor), 2, draw(one_of(*sizes)))))
    return BadRequest(request.SerializeToString(), "INVALID_HEAD_DIM", metadata={"field": name})


def wrong_value_tokens(draw: Draw, request: Request) -> BadRequest:
    values = tensor_of(request.v)
    count = (values.shape[0] + draw(integers(1, 200))) % 201
    request.v.CopyFrom(tensor_message(_resized(values, 0, count)))
    return BadRequest(request.SerializeToString(), "INVALID_TOKENS", metadata={"field": "v"})


def wrong_block_size(draw: Draw, request: Request) -> BadRequest:
    _variant(request).block_size = draw(WRONG_BLOCK_SIZES)
    return BadRequest(request.SerializeToString(), "INVALID_BLOCK_SIZE")


def wrong_query_block_size(draw: Draw, request: Request) -> BadRequest:
    _variant(request).query_block_size = draw(integers(-(2**31), -1))
    return BadRequest(request.SerializeToString(), "INVALID_QUERY_BLOCK_SIZE")


def wrong_scale(draw: Draw, request: Request) -> BadRequest:
    request.softmax_scale = draw(WRONG_SCALES)
    return BadRequest(request.SerializeToString(), "INVALID_SOFTMAX_SCALE")


def wrong_starts(draw: Draw, request: Request) -> BadRequest:
    name = draw(one_of("cu_seqlens_q", "cu_seqlens_k"))
    starts = getattr(request, name)
    match draw(one_of("first", "last", "order", "count", "one")):
        case "first":
            starts[0] = draw(one_of(-(2**31), -1, 1, 4))
        case "last":
            starts[-1] += draw(one_of(-1, 1, 1000))
        case "order":
            starts[1], starts[2] = 6, 5
        case "count":
            starts.append(starts[-1])
        case _:
            starts[:] = [starts[-1]]
    return BadRequest(request.SerializeToString(), "INVALID_CU_SEQLENS")


def wrong_index_shape(draw: Draw, request: Request) -> BadRequest:
    tensor = request.pattern.block_indices.indices
    values = tensor_of(tensor)
    axis, sizes = draw(one_of((0, (0, 3, 5)), (1, (0, 1, 29, 31, 60)), (2, (0,))))
    tensor.CopyFrom(tensor_message(_resized(values, axis, draw(one_of(*sizes)))))
    return BadRequest(request.SerializeToString(), "INVALID_INDEX_SHAPE")


def wrong_row_count(draw: Draw, request: Request) -> BadRequest:
    """One row a query token, where rows are said to serve several."""
    _variant(request).query_block_size = draw(integers(2, 2**31 - 1))
    return BadRequest(request.SerializeToString(), "INVALID_INDEX_SHAPE")


def bad_index(draw: Draw, request: Request) -> BadRequest:
    """One entry that is out of range, after its token, or there twice; named by head, token and slot."""
    tensor = request.pattern.block_indices.indices
    values = tensor_of(tensor)
    head = draw(integers(0, values.shape[0] - 1))
    token = draw(integers(0, values.shape[1] - 1))
    slot = draw(one_of(1, 3))
    num_blocks, own = _blocks_of(token)
    wrong = {
        "INDEX_OUT_OF_RANGE": (draw(integers(-(2**31), -2)), draw(integers(num_blocks, 2**31 - 1))),
        "INDEX_DUPLICATE": (own,),
        "INDEX_NOT_CAUSAL": tuple(range(own + 1, num_blocks)) if request.causal else (),
    }
    reason = draw(one_of(*(reason for reason, values in wrong.items() if values)))
    values[head, token, slot] = value = wrong[reason][draw(integers(0, len(wrong[reason]) - 1))]
    tensor.CopyFrom(tensor_message(values))
    where = {"head": head, "token": token, "slot": slot, "value": value}
    metadata = {name: str(number) for name, number in where.items()}
    return BadRequest(request.SerializeToString(), reason, metadata=metadata)


def missing_pattern_tensor(draw: Draw, request: Request) -> BadRequest:
    label, name = draw(one_of(*TENSORS[_kind(request)].items()))
    _variant(request).ClearField(name)
    return BadRequest(request.SerializeToString(), "MISSING_FIELD", metadata={"field": label})


def wrong_offsets(draw: Draw, request: Request) -> BadRequest:
    """One offset that does not follow from its neighbours."""
    tensor = request.pattern.block_csr.offsets
    values = tensor_of(tensor)
    head = draw(integers(0, values.shape[0] - 1))
    index = draw(integers(0, values.shape[1] - 1))
    # Every row has an id, so an offset below the one before it is wrong, as is one past the next.
    before = int(values[head, index - 1]) if index else int(values[head, 0])
    value = draw(integers(-(2**31), before - 1))
    values[head, index] = value
    tensor.CopyFrom(tensor_message(values))
    metadata = {"field": "offsets", "head": str(head), "index": str(index), "value": str(value)}
    return BadRequest(request.SerializeToString(), "INVALID_OFFSETS", metadata=metadata)


def bad_ragged_index(draw: Draw, request: Request) -> BadRequest:
    """As bad_index, named by its place in indices as well."""
    csr = request.pattern.block_csr
    offsets, values = tensor_of(csr.offsets), tensor_of(csr.indices)
    head = draw(integers(0, offsets.shape[0] - 1))
    token = draw(integers(0, offsets.shape[1] - 2))
    first, end = offsets[head, token : token + 2].tolist()
    index = draw(integers(first, end - 1))
    num_blocks, own = _blocks_of(token)
    wrong = {
        "INDEX_OUT_OF_RANGE": (draw(integers(-(2**31), -2)), draw(integers(num_blocks, 2**31 - 1))),
        "INDEX_DUPLICATE": (own,) if index > first else (),
        "INDEX_NOT_CAUSAL": tuple(range(own + 1, num_blocks)) if request.causal else (),
    }
    reason = draw(one_of(*(reason for reason, values in wrong.items() if values)))
    values[index] = value = wrong[reason][draw(integers(0, len(wrong[reason]) - 1))]
    csr.indices.CopyFrom(tensor_message(values))
    where = {"head": head, "token": token, "slot": index - first, "index": index, "value": value}
    metadata = {name: str(number) for name, number in where.items()}
    return BadRequest(request.SerializeToString(), reason, metadata={"field": "indices"} | metadata)


def bad_mark(draw: Draw, request: Request) -> BadRequest:
    """A block that is not the row's to see, or a byte that is no bool."""
    tensor = request.pattern.block_mask.mask
    heads, num_rows, num_blocks = tensor.shape
    head, row = draw(integers(0, heads - 1)), draw(integers(0, num_rows - 1))
    in_sequence, own = _blocks_of(row)
    allowed = own + 1 if request.causal else in_sequence
    is_byte = allowed == num_blocks or draw(one_of(False, True))
    block = draw(integers(0, num_blocks - 1) if is_byte else integers(allowed, num_blocks - 1))
    payload = bytearray(tensor.inline)
    payload[(head * num_rows + row) * num_blocks + block] = draw(integers(2, 255)) if is_byte else 1
    tensor.inline = bytes(payload)
    past = "INDEX_OUT_OF_RANGE" if block >= in_sequence else "INDEX_NOT_CAUSAL"
    where = {"head": head, "row": row, "index": block}
    metadata = {"field": "mask"} | {name: str(number) for name, number in where.items()}
    return BadRequest(request.SerializeToString(), "INVALID_PATTERN" if is_byte else past, metadata=metadata)


def bad_entry(draw: Draw, request: Request) -> BadRequest:
    """A column or a diagonal that is no place, or a request that looks ahead."""
    name = draw(one_of("vertical", "slash", "causal"))
    if name == "causal":
        request.causal = False
        return BadRequest(request.SerializeToString(), "INVALID_PATTERN", metadata={"field": name})
    tensor = getattr(request.pattern.vertical_slash, name)
    values = tensor_of(tensor)
    head, index = (draw(integers(0, size - 1)) for size in values.shape)
    values[head, index] = value = draw(integers(-(2**31), -2))
    tensor.CopyFrom(tensor_message(values))
    where = {"head": head, "index": index, "value": value}
    metadata = {"field": name} | {name: str(number) for name, number in where.items()}
    return BadRequest(request.SerializeToString(), "INVALID_PATTERN", metadata=metadata)


def wrong_pattern_shape(draw: Draw, request: Request) -> BadRequest:
    """Heads that fit neither q nor k, rows of other tokens, or columns of other blocks."""
    label, axis, sizes = {
        "block_csr": draw(one_of(("offsets", 0, (3, 5)), ("offsets", 1, (2, 30, 32, 60)))),
        "block_mask": draw(one_of(("mask", 0, (0, 3, 5)), ("mask", 1, (0, 29, 31)), ("mask", 2, (0, 3, 5)))),
        "vertical_slash": draw(one_of(("vertical", 0, (0, 3, 5)), ("slash", 0, (0, 3, 5)))),
    }[_kind(request)]
    tensor = getattr(_variant(request), label)
    values = _resized(tensor_of(tensor), axis, draw(one_of(*sizes)))
    if label == "offsets":
        # In order, and of as many ids as before.
        values = torch.zeros_like(values)
        values[-1, -1] = request.pattern.block_csr.indices.shape[0]
    tensor.CopyFrom(tensor_message(values))
    return BadRequest(request.SerializeToString(), "INVALID_INDEX_SHAPE")


def wrong_selection(draw: Draw, request: Request) -> BadRequest:
    """Sizes that do not fit one another, gates of other branches, or what a gated sum does not have."""
    select = request.pattern.select
    name, value = draw(
        one_of(
            *product(("kernel_size", "stride", "top_k", "window"), (-(2**31), -1, 0)),
            *product(("num_first_blocks", "num_local_blocks"), (-(2**31), -1)),
            *product(("top_p", "min_share"), (-1.0, 0.0, 1.5, math.nan, math.inf)),
            *product(("kernel_size",), (1, 6, 2**31 - 1)),
            *product(("top_k",), (1, 4097, 2**31 - 1)),
            *product(("gates",), (1, 2, 4)),
            ("causal", False),
            ("return_lse", True),
        )
    )
    reason = {"causal": "INVALID_PATTERN", "return_lse": "INVALID_GATES"}.get(name, f"INVALID_{name.upper()}")
    if name == "gates":
        select.gates.CopyFrom(tensor_message(_resized(tensor_of(select.gates), 2, value)))
    else:
        setattr(request if name in ("causal", "return_lse") else select, name, value)
    return BadRequest(request.SerializeToString(), reason, metadata={"field": name})


def unknown_field(draw: Draw, request: Request) -> BadRequest:
    """A field of a later version, in any of the messages."""
    owner = draw(one_of("", "q", "k", "v", "pattern", "variant"))
    number = draw(one_of(200, 1000, 18_999, 20_000, 2**29 - 1))
    extra = _varint(number << 3) + b"\x01"
    if owner == "variant":
        # Merged into the variant that is there.
        tag = pattern_pb2.SparsityPattern.DESCRIPTOR.fields_by_name[_kind(request)].number << 3 | 2
        extra = _varint(tag) + _varint(len(extra)) + extra
        extra = _varint(Request.PATTERN_FIELD_NUMBER << 3 | 2) + _varint(len(extra)) + extra
    elif owner:
        part = getattr(request, owner)
        whole = part.SerializeToString() + extra
        request.ClearField(owner)
        tag = Request.DESCRIPTOR.fields_by_name[owner].number << 3 | 2
        extra = _varint(tag) + _varint(len(whole)) + whole
    raw = request.SerializeToString() + extra
    return BadRequest(raw, "UNKNOWN_FIELD", metadata={"field_number": str(number)})


def cut_off(draw: Draw, request: Request) -> BadRequest:
    """The last field promises more bytes than there are."""
    promised, given = draw(integers(41, 2**31)), draw(integers(0, 40))
    raw = request.SerializeToString() + b"\x0a" + _varint(promised) + bytes(given)
    return BadRequest(raw, "MALFORMED_MESSAGE")


def bad_request_id(draw: Draw, request: Request) -> BadRequest:
    request.request_id = draw(WRONG_IDS)
    return BadRequest(request.SerializeToString(), "INVALID_REQUEST_ID")


def over_a_limit(draw: Draw, request: Request) -> BadRequest:
    """Valid for a larger server."""
    name = draw(one_of("max_tokens", "max_sequences", "max_q_heads", "max_slots", "max_message_bytes"))
    size = LIMITS[name] + draw(integers(1, 40))
    match name:
        case "max_tokens":
            _one_dense_sequence(request, num_k_tokens=size)
        case "max_sequences":
            for starts in (request.cu_seqlens_q, request.cu_seqlens_k):
                starts.extend([starts[-1]] * (size - len(Q_LENS)))
        case "max_q_heads":
            size = size // 2 * 2 + 2
            request.q.CopyFrom(tensor_message(_resized(tensor_of(request.q), 1, size)))
            indices = request.pattern.block_indices.indices
            indices.CopyFrom(tensor_message(tensor_of(indices)[:1]))
        case "max_slots":
            indices = request.pattern.block_indices.indices
            padded = _resized(tensor_of(indices), 2, size)
            padded[:, :, SLOTS:] = -1
            indices.CopyFrom(tensor_message(padded))
        case _:
            raw = request.SerializeToString()
            # The request id goes round again and again; the last one counts.
            repeated = b"\x0a\x04fuzz"
            raw += repeated * -(-(size - len(raw)) // len(repeated))
            metadata = {"limit": name, "value": str(len(raw)), "max": str(LIMITS[name])}
            return BadRequest(raw, "LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", metadata)
    metadata = {"limit": name, "value": str(size), "max": str(LIMITS[name])}
    return BadRequest(request.SerializeToString(), "LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", metadata)


FAULTS = (
    missing,
    missing_payload,
    missing_pattern_tensor,
    unknown_dtype,
    wrong_dtype,
    wrong_byte_count,
    impossible_shape,
    wrong_rank,
    wrong_heads,
    wrong_head_dim,
    wrong_value_tokens,
    wrong_block_size,
    wrong_query_block_size,
    wrong_scale,
    wrong_starts,
    wrong_index_shape,
    wrong_pattern_shape,
    wrong_row_count,
    wrong_offsets,
    bad_index,
    bad_index,
    bad_ragged_index,
    bad_ragged_index,
    bad_mark,
    bad_entry,
    wrong_selection,
    wrong_selection,
    unknown_field,
    cut_off,
    bad_request_id,
    over_a_limit,
)
# The patterns that a fault can be put into; those not named here can be put into any.
SHARED_ROWS = ("block_indices", "block_csr", "block_mask")
KINDS: Mapping[Fault, tuple[str, ...]] = {
    # Gates may be left out.
    missing_pattern_tensor: (*SHARED_ROWS, "vertical_slash"),
    wrong_query_block_size: SHARED_ROWS,
    wrong_row_count: SHARED_ROWS,
    wrong_index_shape: ("block_indices",),
    wrong_pattern_shape: ("block_csr", "block_mask", "vertical_slash"),
    wrong_offsets: ("block_csr",),
    bad_index: ("block_indices",),
    bad_ragged_index: ("block_csr",),
    bad_mark: ("block_mask",),
    bad_entry: ("vertical_slash",),
    wrong_selection: ("select",),
    over_a_limit: ("block_indices",),
}


@st.composite
def bad_requests(draw: Draw) -> BadRequest:
    fault = draw(one_of(*FAULTS))
    return fault(draw, _valid_request(draw, *KINDS.get(fault, ())))


def _kind(request: Request) -> str:
    return str(request.pattern.WhichOneof("kind"))


def _variant(request: Request) -> Any:
    return getattr(request.pattern, _kind(request))


def _any_tensor(draw: Draw, request: Request) -> tuple[str, tensor_pb2.Tensor]:
    of_pattern = TENSORS[_kind(request)]
    name = draw(one_of("q", "k", "v", *of_pattern))
    return name, getattr(_variant(request), of_pattern[name]) if name in of_pattern else getattr(
        request, name
    )


def _resized(values: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """``values`` repeated or cut to ``size`` along ``axis``."""
    index = torch.arange(size) % max(values.shape[axis], 1)
    return values.index_select(axis, index)


def _blocks_of(token: int) -> tuple[int, int]:
    """How many blocks the token's sequence has, and which one is the token's own."""
    start = 0
    for n_q, n_k in zip(Q_LENS, K_LENS, strict=True):
        if token < start + n_q:
            return -(-n_k // BLOCK), (n_k - n_q + token - start) // BLOCK
        start += n_q
    raise ValueError(token)


def _one_dense_sequence(request: Request, *, num_k_tokens: int) -> None:
    for tensor in (request.k, request.v):
        tensor.CopyFrom(tensor_message(_resized(tensor_of(tensor), 0, num_k_tokens)))
    request.pattern.CopyFrom(pattern_pb2.SparsityPattern(dense=pattern_pb2.Dense()))
    request.ClearField("cu_seqlens_q")
    request.ClearField("cu_seqlens_k")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*encoded, value))
