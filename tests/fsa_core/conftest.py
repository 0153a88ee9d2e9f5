"""Problems that are valid by construction, and how far from the float64 oracle an answer may be."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import pytest
import torch

from fsa_core.packing import place_queries
from fsa_core.patterns import expand_query_blocks
from fsa_core.problem import Problem
from fsa_core.reference import (
    dense_attention_reference,
    dense_attention_reference_backward,
    selected_attention_reference,
    selected_attention_reference_backward,
)

DISTRIBUTIONS = ("random", "local", "same", "ragged", "empty_rows")
LENGTHS: dict[str, dict[str, Any]] = {
    "chunked prefill": {"q_lens": (40, 3), "k_lens": (150, 64)},
    "decode": {"q_lens": (1, 1, 1), "k_lens": (300, 17, 64), "num_slots": 12},
    "more queries than keys": {"q_lens": (40, 9), "k_lens": (30, 0)},
    "empty sequences": {"q_lens": (0, 30, 0, 20, 0), "k_lens": (0, 30, 25, 20, 0)},
    "only empty sequences": {"q_lens": (0, 0), "k_lens": (10, 0)},
}


@dataclass(frozen=True)
class Case:
    """The tensors of one call and its sizes; ``block_indices`` is None for dense attention."""

    problem: Problem
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    block_indices: torch.Tensor | None
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What a backend of selected attention takes after the problem."""
        assert self.block_indices is not None
        return self.q, self.k, self.v, self.block_indices, self.cu_seqlens_q, self.cu_seqlens_k

    @property
    def dense_tensors(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k, self.v, self.cu_seqlens_q, self.cu_seqlens_k

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the public function, beside its tensors."""
        shared = {
            "cu_seqlens_q": self.cu_seqlens_q,
            "cu_seqlens_k": self.cu_seqlens_k,
            "softmax_scale": self.problem.softmax_scale,
            "causal": self.problem.causal,
        }
        return shared if self.problem.is_dense else {"block_size": self.problem.block_size, **shared}

    @cached_property
    def oracle(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.problem.is_dense:
            return dense_attention_reference(self.problem, *self.dense_tensors)
        return selected_attention_reference(self.problem, *self.tensors)

    def oracle_gradients(self, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """float64 gradients of q, k and v."""
        given = (*self.oracle, grad_out, grad_lse)
        if self.problem.is_dense:
            return dense_attention_reference_backward(self.problem, *self.dense_tensors, *given)
        return selected_attention_reference_backward(self.problem, *self.tensors, *given)

    def output_gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Random gradients of out, in its dtype, and of lse, float32."""
        p, generator = self.problem, torch.Generator().manual_seed(7)
        grad_out = torch.randn(p.num_q_tokens, p.num_q_heads, p.value_dim, generator=generator)
        grad_lse = torch.randn(p.num_q_tokens, p.num_q_heads, generator=generator)
        return grad_out.to(self.q.device, p.dtype), grad_lse.to(self.q.device)


def _make_case(
    device: torch.device,
    *,
    q_lens: Sequence[int] = (70, 33),
    k_lens: Sequence[int] | None = None,
    num_kv_heads: int = 2,
    group_size: int = 2,
    index_heads: int | None = None,
    head_dim: int = 64,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    block_size: int = 16,
    num_slots: int = 4,
    distribution: str = "random",
    causal: bool = True,
    q_scale: float = 1.0,
    softmax_scale: float | None = None,
    dense: bool = False,
    seed: int = 0,
) -> Case:
    """A valid call: sequences of ``q_lens`` queries over ``k_lens`` keys (default: as many).

    ``index_heads`` defaults to ``num_kv_heads``. The draws are made on the CPU, so a seed means the same
    numbers on every device.
    """
    k_lens = q_lens if k_lens is None else k_lens
    generator = torch.Generator().manual_seed(seed)
    problem = Problem(
        num_q_tokens=sum(q_lens),
        num_k_tokens=sum(k_lens),
        num_sequences=len(q_lens),
        num_q_heads=num_kv_heads * group_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=head_dim if value_dim is None else value_dim,
        dtype=dtype,
        index_heads=0 if dense else (index_heads or num_kv_heads),
        num_slots=0 if dense else num_slots,
        block_size=0 if dense else block_size,
        causal=causal,
        softmax_scale=head_dim**-0.5 if softmax_scale is None else softmax_scale,
    )
    normal = partial(torch.randn, generator=generator)
    q = q_scale * normal(problem.num_q_tokens, problem.num_q_heads, head_dim)
    k = normal(problem.num_k_tokens, num_kv_heads, head_dim)
    v = normal(problem.num_k_tokens, num_kv_heads, problem.value_dim)
    cu_q, cu_k = _cumulative(q_lens), _cumulative(k_lens)
    ids = None if dense else _draw_indices(problem, cu_q, cu_k, distribution, generator).to(device)
    return Case(
        problem,
        *(x.to(device=device, dtype=dtype) for x in (q, k, v)),
        ids,
        cu_q.to(device),
        cu_k.to(device),
    )


def sharing_rows(case: Case, query_block_size: int) -> Case:
    """The case with what the last query of a row selects for all of them, in another order of slots."""
    last = [
        min(first + query_block_size, end) - 1
        for start, end in pairwise(case.cu_seqlens_q.tolist())
        for first in range(start, end, query_block_size)
    ]
    assert case.block_indices is not None
    rows = case.block_indices[:, last]
    order = torch.randperm(rows.shape[2], generator=torch.Generator().manual_seed(0))
    p = replace(case.problem, query_block_size=query_block_size)
    ids = expand_query_blocks(
        rows[..., order.to(rows.device)],
        query_block_size=query_block_size,
        block_size=p.block_size,
        cu_seqlens_q=case.cu_seqlens_q,
        cu_seqlens_k=case.cu_seqlens_k,
        causal=p.causal,
    )
    return replace(case, problem=p, block_indices=ids)


@dataclass(frozen=True)
class PagedCase:
    """A case whose keys lie in the pages of a cache, in any order, among NaN that nothing may read."""

    case: Case
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor

    @property
    def tensors(self) -> dict[str, torch.Tensor | None]:
        """What paged_selected_attention takes of them, by name."""
        return {
            "q": self.case.q,
            "k_cache": self.k_cache,
            "v_cache": self.v_cache,
            "page_table": self.page_table,
            "block_indices": self.case.block_indices,
            "seq_lens": self.seq_lens,
            "cu_seqlens_q": self.case.cu_seqlens_q,
        }


def _make_paged(device: torch.device, *, page_size: int = 32, **options: Any) -> PagedCase:
    """``_make_case`` with one query a sequence unless ``q_lens`` says otherwise.

    There are two pages more than needed, and the table names none where none is needed.
    """
    options.setdefault("q_lens", [1] * len(options["k_lens"]))
    case = _make_case(device, **options)
    lens = case.cu_seqlens_k.diff().tolist()
    counts = [-(-n // page_size) for n in lens]
    pages = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(1)).tolist()
    page_table = torch.full((len(lens), max(counts) + 1), 2**31 - 1, dtype=torch.int32)
    caches = [x.new_full((len(pages), page_size, *x.shape[1:]), torch.nan) for x in (case.k, case.v)]
    for sequence, runs in enumerate(zip(case.k.split(lens), case.v.split(lens), strict=True)):
        for column in range(counts[sequence]):
            page = page_table[sequence, column] = pages.pop()
            for cache, run in zip(caches, runs, strict=True):
                keys = run[column * page_size : (column + 1) * page_size]
                cache[page, : len(keys)] = keys
    return PagedCase(case, *caches, page_table.to(device), case.cu_seqlens_k.diff())


def _cumulative(lens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lens]).cumsum(0).int()


def _draw_indices(
    problem: Problem, cu_q: torch.Tensor, cu_k: torch.Tensor, distribution: str, generator: torch.Generator
) -> torch.Tensor:
    placed = place_queries(cu_q, cu_k, problem.num_q_tokens, causal=problem.causal)
    num_visible = -(-placed.num_visible_keys // problem.block_size)
    shape = (problem.index_heads, problem.num_q_tokens)
    num_blocks = max([1, *num_visible.tolist()])
    draw = torch.rand(*shape, num_blocks, generator=generator)
    block = torch.arange(num_blocks)
    preference = {"local": block.float(), "same": -block.float()}.get(distribution, draw)
    preference = torch.where(block < num_visible[:, None], preference, -torch.inf).expand(*shape, -1)
    best = preference.topk(min(problem.num_slots, num_blocks), dim=-1)
    ids = torch.full((*shape, problem.num_slots), -1)
    ids[..., : best.indices.shape[-1]] = best.indices.masked_fill(best.values == -torch.inf, -1)
    if distribution == "ragged":
        share = torch.rand(*shape, 1, generator=generator)
        ids.masked_fill_(torch.rand(ids.shape, generator=generator) < share, -1)
    if distribution == "empty_rows":
        ids.masked_fill_(torch.rand(*shape, 1, generator=generator) < 0.5, -1)
    # Pads and ids in any order: the contract gives it no meaning.
    order = torch.rand(ids.shape, generator=generator).argsort(-1)
    return ids.gather(-1, order).int()


def eager_attention(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain masked softmax attention computed in the dtype of q: the error that this precision costs."""
    p, q = case.problem, case.q
    k, v = (x.repeat_interleave(p.group_size, dim=1) for x in (case.k, case.v))
    scores = torch.einsum("thd,shd->hts", q, k) * p.softmax_scale
    scores = scores.masked_fill(~visible_keys(case), -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("hts,shd->thd", weights, v), scores.float().logsumexp(-1).T


def visible_keys(case: Case) -> torch.Tensor:
    """bool [num_q_heads, num_q_tokens, num_k_tokens]: the mask of the whole packed call."""
    p = case.problem
    placed = place_queries(case.cu_seqlens_q, case.cu_seqlens_k, p.num_q_tokens, causal=p.causal)
    key = torch.arange(p.num_k_tokens, device=case.q.device)
    key_in_sequence = key - case.cu_seqlens_k[:-1][placed.sequence, None]
    mask = (key_in_sequence >= 0) & (key_in_sequence < placed.num_visible_keys[:, None])
    if case.block_indices is None:
        return mask.expand(p.num_q_heads, -1, -1)
    # One column a block and one for the pads, which no key belongs to.
    num_blocks = p.num_k_tokens // p.block_size + 1
    ids = case.block_indices.long()
    selected = torch.zeros(*ids.shape[:2], num_blocks + 1, dtype=torch.bool, device=ids.device)
    selected.scatter_(-1, ids.where(ids >= 0, num_blocks), True)
    block = (key_in_sequence // p.block_size).clamp(0, num_blocks - 1)
    chosen = selected.gather(-1, block.expand(p.index_heads, -1, -1))
    return mask & chosen.repeat_interleave(p.num_q_heads // p.index_heads, dim=0)


def assert_close_to_oracle(out: torch.Tensor, lse: torch.Tensor, case: Case, *, factor: float = 2.0) -> None:
    """The error is at most ``factor`` times that of eager attention in the same precision, and a rounding."""
    p = case.problem
    assert out.shape == (p.num_q_tokens, p.num_q_heads, p.value_dim)
    assert lse.shape == (p.num_q_tokens, p.num_q_heads)
    assert out.dtype == p.dtype
    assert lse.dtype == torch.float32
    true_out, true_lse = case.oracle
    empty = true_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty), "lse is -inf exactly where a token has no keys"
    assert not out[empty].any(), "a token without keys gives zeros"
    eager_out, eager_lse = eager_attention(case)
    # A weight is off by as much, relatively, as its score is absolutely; eager attention adds scores up in
    # another order.
    _assert_error(out, eager_out, true_out, p.dtype, factor, "out", _largest_logit(case))
    # Products of a score may cancel: what is left of a small one is their rounding.
    rounding = torch.finfo(torch.float32).eps * _longest(case.q) * _longest(case.k) * p.softmax_scale
    lses = (lse[~empty], eager_lse[~empty], true_lse[~empty])
    _assert_error(*lses, torch.float32, factor, "lse", least_bound=rounding)


def _largest_logit(case: Case) -> float:
    """At least 1."""
    lse = case.oracle[1]
    seen = lse > -torch.inf
    return max(1.0, lse[seen].abs().amax().item()) if seen.any() else 1.0


def eager_gradients(case: Case, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What autograd makes of eager attention in the dtype of q: gradients of q, k and v."""
    operands = [x.detach().clone().requires_grad_() for x in (case.q, case.k, case.v)]
    with torch.enable_grad():
        answer = eager_attention(replace(case, q=operands[0], k=operands[1], v=operands[2]))
    return torch.autograd.grad(answer, operands, (grad_out, grad_lse))


def assert_gradients_close_to_oracle(
    grads: Sequence[torch.Tensor],
    case: Case,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    *,
    factor: float = 2.0,
) -> None:
    """Gradients of q, k and v, given those of out and lse; bounded as in ``assert_close_to_oracle``."""
    true_grads = case.oracle_gradients(grad_out, grad_lse)
    eager_grads = eager_gradients(case, grad_out, grad_lse)
    mask = visible_keys(case)
    sees_nothing = ~mask.any(-1).T
    unseen = ~mask.unflatten(0, (-1, case.problem.group_size)).any(1).any(1).T
    # Weights are made again from the log-sum-exp, whose rounding, in float32, eager attention has not.
    logit = _largest_logit(case)
    # A score's gradient is a difference of two sums, equal where there is one key: what is left is their
    # rounding, of which eager attention may have none.
    largest_sum = (grad_out.double() * case.oracle[0]).abs().sum(-1).amax().item() if grad_out.numel() else 0
    roundings = 2 * torch.finfo(torch.float32).eps * largest_sum
    # And one of them is of the answer as it was rounded.
    out = case.oracle[0]
    of_out = (grad_out.double() * (out.to(case.problem.dtype).double() - out)).sum(-1).abs()
    roundings = (roundings + (of_out.amax().item() if of_out.numel() else 0)) * case.problem.softmax_scale
    least_bounds = (roundings * _largest(case.k), roundings * _largest(case.q), 0.0)
    operands = (case.q, case.k, case.v)
    names, left_out = ("grad_q", "grad_k", "grad_v"), (sees_nothing, unseen, unseen)
    for what, x, got, eager, true, empty, least in zip(
        names, operands, grads, eager_grads, true_grads, left_out, least_bounds, strict=True
    ):
        assert got.shape == x.shape, what
        assert got.dtype == x.dtype, what
        assert not got[empty].any(), f"{what}: a token without keys, or a key without queries, gets zeros"
        _assert_error(got, eager, true, case.problem.dtype, factor, what, logit, least)


def _largest(x: torch.Tensor) -> float:
    return x.abs().amax().item() if x.numel() else 0.0


def _longest(x: torch.Tensor) -> float:
    return x.double().norm(dim=-1).amax().item() if x.numel() else 0.0


def _assert_error(
    got: torch.Tensor,
    eager: torch.Tensor,
    true: torch.Tensor,
    dtype: torch.dtype,
    factor: float,
    what: str,
    logit: float = 1.0,
    least_bound: float = 0.0,
) -> None:
    if not true.numel():
        return
    error, eager_error = ((x.double() - true).abs().amax().item() for x in (got, eager))
    # In float32, exponentials of base 2 and products in three parts each cost a rounding that eager has not.
    roundings = 4 * logit if dtype == torch.float32 else 1
    bound = factor * eager_error + roundings * torch.finfo(dtype).eps * true.abs().amax().item()
    bound = max(bound, least_bound)
    # Written so that a NaN error fails.
    assert error <= bound, f"{what}: error {error:.3g}, eager {eager_error:.3g}, bound {bound:.3g}"


def draw_requests(make_case: Callable[..., Case], count: int, **options: Any) -> list[Case]:
    """Requests of one or two sequences, most of them short, of every way to choose blocks."""
    generator = torch.Generator().manual_seed(5)
    draw = partial(_draw, generator)
    requests = []
    for seed in range(count):
        q_lens = [draw(0, 30) if draw(0, 3) else draw(1, 200) for _ in range(draw(1, 2))]
        case = make_case(
            q_lens=q_lens,
            k_lens=[n + draw(0, 1) * draw(0, 120) for n in q_lens],
            num_slots=draw(1, 8),
            distribution=DISTRIBUTIONS[draw(0, len(DISTRIBUTIONS) - 1)],
            seed=seed,
            **options,
        )
        requests.append(case)
    return requests


def draw_companies(requests: Sequence[Case]) -> Iterator[tuple[list[int], Case]]:
    """Each request once, with 1 to 23 others: their numbers, and the one call of all their sequences.

    Slots are appended that nobody uses.
    """
    generator = torch.Generator().manual_seed(6)
    order = torch.randperm(len(requests), generator=generator).tolist()
    while order:
        members = [order.pop() for _ in range(min(_draw(generator, 2, 24), len(order)))]
        yield members, _packed([requests[i] for i in members], _draw(generator, 8, 11))


def _draw(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _packed(cases: Sequence[Case], num_slots: int) -> Case:
    first = cases[0]

    def joined(starts: Sequence[torch.Tensor]) -> torch.Tensor:
        return _cumulative([n for x in starts for n in x.diff().tolist()])

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


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Shapes here are small: more threads would mostly wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """As many threads as the parameter says."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN and huge integers, so that whatever reads it before writing it is found out."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def case_on_cpu() -> Callable[..., Case]:
    """The CPU backend is tested on the CPU, whatever device the suite runs on."""
    return partial(_make_case, torch.device("cpu"))


@pytest.fixture(scope="session")
def make_case(device: torch.device) -> Callable[..., Case]:
    return partial(_make_case, device)


@pytest.fixture(scope="session")
def make_paged(device: torch.device) -> Callable[..., PagedCase]:
    return partial(_make_paged, device)


@pytest.fixture(scope="session", name="assert_close_to_oracle")
def assert_close_to_oracle_fixture() -> Callable[..., None]:
    return assert_close_to_oracle


@pytest.fixture(scope="session", name="assert_gradients_close_to_oracle")
def assert_gradients_close_to_oracle_fixture() -> Callable[..., None]:
    return assert_gradients_close_to_oracle
