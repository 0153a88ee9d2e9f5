"""Measures the paths and the sizes of the forward pass for a shape, and with them its gradients' paths.

A choice must not depend on lengths (see ``fsa_core.dispatch``), so what wins for a shape is what has the
least geometric mean of times over short and long calls with indices of both kinds.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from fsa_core.autograd import Answer, Gradients
from fsa_core.drawn_indices import DrawnKind, causal_block_indices
from fsa_core.packing import single_sequence
from fsa_core.plan import KV_MAJOR, MIXED, QUERY_TILE, TOKEN_MAJOR
from fsa_core.problem import Problem
from fsa_core.tiles import MIN_ROWS, PartialTuning, SharedTuning, Tuning, default_tuning
from fsa_core.timing import Timer
from fsa_core.tuning_table import Entry, Shape

KINDS: tuple[DrawnKind, ...] = ("random", "real")
# Two sound bfloat16 answers lie within 1.6e-2 of one another, row by row; a block left out costs a tenth.
TOLERANCE = 2e-2
RUNS = 9
# No kernel makes gradients token by token.
BACKWARD_PATHS = (KV_MAJOR, QUERY_TILE, MIXED)


@dataclass(frozen=True, slots=True)
class Grid:
    """What is tried: sizes of partials, sizes of query tiles, and then how shared a block must be."""

    partial: Sequence[PartialTuning]
    shared: Sequence[SharedTuning]
    shared_by: Sequence[int]

    def num_candidates(self, problem: Problem) -> int:
        leaving = len(_leaving_paths(problem))
        of_forward = len(self.partial) + (1 + leaving) * len(self.shared) + leaving * len(self.shared_by)
        return of_forward + len(BACKWARD_PATHS)


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
    """``is_backward``: of the gradients alone."""

    path: str
    tuning: Tuning
    is_backward: bool = False


# The geometric mean of a candidate's times in seconds, or None if it does not run or answers wrongly.
Measure = Callable[[Candidate], float | None]


class NothingRuns(Exception):
    """No sizes of the KV-major path, which takes everything, ran and answered rightly."""


def tune(problem: Problem, measure: Measure, grid: Grid = GRID) -> Entry:
    """The entry of the problem's shape: of each path the best sizes, one kind after the other; the best path.

    The sizes of partials are found on the KV-major path and kept for the mixed one, which attends its
    leftovers by them. An entry's ``shared`` is of the path that won; of the mixed one if it was KV-major.
    Gradients are timed with the sizes of the entry, on each path that ran.

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
    times = {one: measure(Candidate(one, tuning, is_backward=True)) for one in BACKWARD_PATHS if one in best}
    backward = {one: seconds for one, seconds in times.items() if seconds is not None}
    return Entry(
        Shape.of(problem),
        path,
        tuning,
        {one: seconds for one, (seconds, _) in best.items()},
        min(backward, key=lambda one: backward[one], default=None),
        backward,
    )


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
            what = "gradients are" if candidate.is_backward else "a row is"
            raise _WrongAnswer(f"{what} off by {error:.1e} of the norm")
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
    """Tensors of selected attention, and what the KV-major path answers with its default sizes.

    ``gradients`` are those of q, k and v for ``grad_out``, of that answer.
    """

    problem: Problem
    tensors: tuple[torch.Tensor, ...]
    grad_out: torch.Tensor
    expected: Answer
    gradients: Gradients

    @classmethod
    def drawn(cls, problem: Problem, kind: DrawnKind, device: torch.device) -> "_Call":
        p = problem
        generator = torch.Generator(device).manual_seed(p.num_q_tokens)
        q, k, v, grad_out = (
            torch.randn(tokens, heads, dim, device=device, generator=generator, dtype=p.dtype)
            for tokens, heads, dim in (
                (p.num_q_tokens, p.num_q_heads, p.head_dim),
                (p.num_k_tokens, p.num_kv_heads, p.head_dim),
                (p.num_k_tokens, p.num_kv_heads, p.value_dim),
                (p.num_q_tokens, p.num_q_heads, p.value_dim),
            )
        )
        ids = causal_block_indices(p.num_q_tokens, p.index_heads, p.num_slots, p.block_size, kind, generator)
        starts = single_sequence(p.num_q_tokens, device)
        tensors = (q, k, v, ids, starts, starts)
        plain = Candidate(KV_MAJOR, default_tuning(p))
        expected = _forward(p, tensors, plain)
        return cls(p, tensors, grad_out, expected, _backward(p, tensors, expected, grad_out, plain))

    def run(self, candidate: Candidate) -> tuple[torch.Tensor, ...]:
        if candidate.is_backward:
            return _backward(self.problem, self.tensors, self.expected, self.grad_out, candidate)
        return _forward(self.problem, self.tensors, candidate)

    def error_of(self, answer: tuple[torch.Tensor, ...]) -> float:
        """NaN if there is any.

        The largest relative error of a row of out, or absolute one of lse; of gradients, the largest relative
        error of one of them.
        """
        if len(answer) == len(self.gradients):
            pairs = zip(answer, self.gradients, strict=True)
            return torch.stack([(x - y).float().norm() / y.float().norm() for x, y in pairs]).max().item()
        (out, lse), (expected_out, expected_lse) = answer, self.expected
        norms = expected_out.float().norm(dim=-1)
        errors = (out.float() - expected_out.float()).norm(dim=-1) / norms.maximum(norms.median())
        return torch.stack([errors.max(), (lse - expected_lse).abs().max()]).max().item()


def _forward(problem: Problem, tensors: tuple[torch.Tensor, ...], candidate: Candidate) -> Answer:
    from fsa_core.kernels.forward import selected_attention_forward

    answer: Answer = selected_attention_forward(
        problem, *tensors, path=candidate.path, tuning=candidate.tuning
    )
    return answer


def _backward(
    problem: Problem,
    tensors: tuple[torch.Tensor, ...],
    answer: Answer,
    grad_out: torch.Tensor,
    candidate: Candidate,
) -> Gradients:
    from fsa_core.kernels.backward import selected_attention_backward

    q, k, v, ids, q_starts, k_starts = tensors
    return selected_attention_backward(
        problem, q, k, v, ids, q_starts, k_starts, *answer, grad_out, None, path=candidate.path,
        tuning=candidate.tuning,
    )  # fmt: skip
