"""Measures the paths of the forward pass and their sizes for a shape, on the GPU that is there.

A choice must not depend on lengths (see ``fsa_core.dispatch``), so what wins for a shape is what has the
least geometric mean of times over short and long calls with indices of both kinds.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from fsa_core.autograd import Answer
from fsa_core.drawn_indices import DrawnKind, causal_block_indices
from fsa_core.packing import single_sequence
from fsa_core.plan import (
    KV_MAJOR,
    MIN_ROWS,
    MIXED,
    QUERY_TILE,
    TOKEN_MAJOR,
    PartialTuning,
    SharedTuning,
    Tuning,
    default_tuning,
)
from fsa_core.problem import Problem
from fsa_core.timing import Timer
from fsa_core.tuning_table import Entry, Shape

KINDS: tuple[DrawnKind, ...] = ("random", "real")
# Two sound bfloat16 answers lie within 1.6e-2 of one another, row by row; a block left out costs a tenth.
TOLERANCE = 2e-2
RUNS = 9


@dataclass(frozen=True, slots=True)
class Grid:
    """What is tried: sizes of partials, sizes of query tiles, and then how shared a block must be."""

    partial: Sequence[PartialTuning]
    shared: Sequence[SharedTuning]
    shared_by: Sequence[int]

    def num_candidates(self, problem: Problem) -> int:
        leaving = len(_leaving_paths(problem))
        return len(self.partial) + (1 + leaving) * len(self.shared) + leaving * len(self.shared_by)


# Rows, warps, registers and stages that belong together: what lies far off lost whenever it was tried.
GRID = Grid(
    partial=[
        PartialTuning(rows, tiles_per_item, num_warps, max_registers)
        for rows, num_warps, max_registers in ((64, 4, 128), (64, 4, 144), (64, 4, 168), (128, 8, 128))
        for tiles_per_item in (4, 8)
    ],
    shared=[
        SharedTuning(rows, num_warps, max_registers, num_stages, shared_by=3)
        for rows, num_warps, max_registers, num_stages in (
            (64, 4, 255, 2),
            (64, 4, 255, 3),
            (64, 4, 168, 1),
            (64, 4, 168, 2),
            (128, 8, 255, 2),
            (128, 8, 255, 3),
            (128, 8, 128, 1),
            (128, 8, 128, 2),
        )
    ],
    shared_by=(2, 4),
)


@dataclass(frozen=True, slots=True)
class Candidate:
    path: str
    tuning: Tuning


# The geometric mean of a candidate's times in seconds, or None if it does not run or answers wrongly.
Measure = Callable[[Candidate], float | None]


class NothingRuns(Exception):
    """No sizes of the KV-major path, which takes everything, ran and answered rightly."""


def tune(problem: Problem, measure: Measure, grid: Grid = GRID) -> Entry:
    """The entry of the problem's shape: of each path the best sizes, one kind after the other; the best path.

    The sizes of partials are found on the KV-major path and kept for the mixed one, which attends its
    leftovers by them. An entry's ``shared`` is of the path that won; of the mixed one if it was KV-major.

    Raises:
        NothingRuns: see there.
    """
    best: dict[str, tuple[float, Tuning]] = {}

    def consider(path: str, tuning: Tuning) -> None:
        seconds = measure(Candidate(path, tuning))
        if seconds is not None and (path not in best or seconds < best[path][0]):
            best[path] = seconds, tuning

    base = default_tuning(problem)
    for partial in grid.partial:
        consider(KV_MAJOR, replace(base, partial=partial))
    if KV_MAJOR not in best:
        raise NothingRuns(f"no sizes of path {KV_MAJOR} run and answer rightly for {Shape.of(problem)}")
    base = best[KV_MAJOR][1]
    leaving = _leaving_paths(problem)
    for path in (QUERY_TILE, *leaving):
        for shared in grid.shared:
            consider(path, replace(base, shared=shared))
    for path in leaving:
        if path in best:
            found = best[path][1]
            for shared_by in grid.shared_by:
                consider(path, replace(found, shared=replace(found.shared, shared_by=shared_by)))
    path = min(best, key=lambda path: best[path][0])
    tuning = best[MIXED if path == KV_MAJOR and MIXED in best else path][1]
    return Entry(Shape.of(problem), path, tuning, {path: seconds for path, (seconds, _) in best.items()})


def _leaving_paths(problem: Problem) -> tuple[str, ...]:
    """Those worth timing on which query tiles leave something."""
    # With fewer heads a token alone leaves most of a matrix product empty.
    return (MIXED, TOKEN_MAJOR) if 2 * problem.heads_per_pair >= MIN_ROWS else (MIXED,)


class Bench:
    """Runs and times candidates on drawn calls; is the ``Measure`` of a real device.

    ``rejected`` says which did not run or answered wrongly, and how.
    """

    def __init__(self, problems: Sequence[Problem], device: torch.device, timer: Timer) -> None:
        """One call a problem and kind of indices; each problem is one causal sequence."""
        self.rejected: list[tuple[Candidate, str]] = []
        self._timer = timer
        self._calls = [_Call.drawn(problem, kind, device) for problem in problems for kind in KINDS]

    def __call__(self, candidate: Candidate) -> float | None:
        try:
            seconds = [self._seconds(call, candidate) for call in self._calls]
        except _WrongAnswer as error:
            self.rejected.append((candidate, str(error)))
            return None
        # Whatever a compiler or a launch raises says that these sizes are not for this device.
        except Exception as error:
            self.rejected.append((candidate, _reason(error)))
            return None
        return statistics.geometric_mean(seconds)

    def _seconds(self, call: "_Call", candidate: Candidate) -> float:
        error = call.error_of(call.run(candidate))
        # Not "more than": a NaN is an error, too.
        if not error <= TOLERANCE:
            raise _WrongAnswer(f"a row is off by {error:.1e} of its norm")
        return statistics.median(self._timer(lambda: call.run(candidate), RUNS))


class _WrongAnswer(Exception):
    """How wrong."""


def _reason(error: BaseException) -> str:
    """What went wrong, in a line."""
    # The compiler's errors say where; why, the error says that they were raised for.
    while error.__cause__ is not None:
        error = error.__cause__
    # A compiler quotes the whole kernel before it says what is wrong with it.
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[-1]}"


@dataclass(frozen=True, slots=True)
class _Call:
    """Tensors of selected attention, and what the KV-major path answers with its default sizes."""

    problem: Problem
    tensors: tuple[torch.Tensor, ...]
    expected: Answer

    @classmethod
    def drawn(cls, problem: Problem, kind: DrawnKind, device: torch.device) -> "_Call":
        p = problem
        generator = torch.Generator(device).manual_seed(p.num_q_tokens)
        q, k, v = (
            torch.randn(tokens, heads, dim, device=device, generator=generator, dtype=p.dtype)
            for tokens, heads, dim in (
                (p.num_q_tokens, p.num_q_heads, p.head_dim),
                (p.num_k_tokens, p.num_kv_heads, p.head_dim),
                (p.num_k_tokens, p.num_kv_heads, p.value_dim),
            )
        )
        ids = causal_block_indices(p.num_q_tokens, p.index_heads, p.num_slots, p.block_size, kind, generator)
        starts = single_sequence(p.num_q_tokens, device)
        tensors = (q, k, v, ids, starts, starts)
        return cls(p, tensors, _run(p, tensors, Candidate(KV_MAJOR, default_tuning(p))))

    def run(self, candidate: Candidate) -> Answer:
        return _run(self.problem, self.tensors, candidate)

    def error_of(self, answer: Answer) -> float:
        """The largest relative error of a row of out, or absolute one of lse; NaN if there is any."""
        (out, lse), (expected_out, expected_lse) = answer, self.expected
        norms = expected_out.float().norm(dim=-1)
        errors = (out.float() - expected_out.float()).norm(dim=-1) / norms.maximum(norms.median())
        return torch.stack([errors.max(), (lse - expected_lse).abs().max()]).max().item()


def _run(problem: Problem, tensors: tuple[torch.Tensor, ...], candidate: Candidate) -> Answer:
    from fsa_core.kernels.forward import selected_attention_forward

    answer: Answer = selected_attention_forward(
        problem, *tensors, path=candidate.path, tuning=candidate.tuning
    )
    return answer
