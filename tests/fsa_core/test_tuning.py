"""Tuning: the fastest right candidate wins, path by path; and real kernels are measured and checked."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fsa_core.plan import KV_MAJOR, MIXED, PATHS, QUERY_TILE, TOKEN_MAJOR, plan_forward
from fsa_core.problem import Problem
from fsa_core.tiles import PartialTuning, SharedTuning, Tuning, default_tuning
from fsa_core.timing import timer_for
from fsa_core.tuning import BACKWARD_PATHS, GRID, Bench, Candidate, Grid, NothingRuns, tune
from fsa_core.tuning_table import Shape

PROBLEM = Problem(
    num_q_tokens=20,
    num_k_tokens=20,
    num_sequences=1,
    num_q_heads=2,
    num_kv_heads=1,
    head_dim=16,
    value_dim=16,
    dtype=torch.float16,
    index_heads=1,
    num_slots=2,
    block_size=16,
    causal=True,
    softmax_scale=0.25,
)
WIDE, NARROW = PartialTuning(64, 4, 4, 128), PartialTuning(32, 2, 4, 128)
STAGED, PLAIN = SharedTuning(64, 4, 255, 2, 4), SharedTuning(32, 4, 255, 1, 4)
SMALL = Grid(partial=(WIDE, NARROW), shared=(STAGED, PLAIN), shared_by=(2, 8))


def scripted(seconds_of: Callable[[Candidate], float | None]) -> tuple[Callable, list[Candidate]]:
    asked: list[Candidate] = []

    def measure(candidate: Candidate) -> float | None:
        asked.append(candidate)
        return seconds_of(candidate)

    return measure, asked


def test_the_best_sizes_of_each_path_are_found_and_the_best_path_wins() -> None:
    def seconds_of(candidate: Candidate) -> float:
        base = {KV_MAJOR: 5.0, QUERY_TILE: 4.0, MIXED: 3.0}[candidate.path]
        partial, shared = candidate.tuning.partial, candidate.tuning.shared
        return base - (partial == NARROW) - 0.5 * (shared.rows == 32) - 0.1 * (shared.shared_by == 8)

    measure, asked = scripted(seconds_of)
    entry = tune(PROBLEM, measure, SMALL)
    assert entry.shape == Shape.of(PROBLEM)
    assert (entry.path, entry.tuning) == (MIXED, Tuning(NARROW, replace(PLAIN, shared_by=8)))
    assert entry.seconds == pytest.approx({KV_MAJOR: 4.0, QUERY_TILE: 2.5, MIXED: 1.4})
    assert len(asked) == SMALL.num_candidates(PROBLEM)


def test_tokens_by_themselves_are_timed_where_their_heads_fill_half_of_a_product() -> None:
    measure, asked = scripted(lambda candidate: 1.0 + (candidate.path != TOKEN_MAJOR))
    problem = replace(PROBLEM, num_q_heads=8, num_kv_heads=1, index_heads=1)
    entry = tune(problem, measure, SMALL)
    assert (entry.path, entry.seconds[TOKEN_MAJOR]) == (TOKEN_MAJOR, 1.0)
    assert len(asked) == SMALL.num_candidates(problem)
    assert tune(PROBLEM, measure, SMALL).path != TOKEN_MAJOR


def test_gradients_take_the_path_that_is_fastest_for_them_with_the_sizes_of_the_entry() -> None:
    def seconds_of(candidate: Candidate) -> float | None:
        if candidate.is_backward:
            return {KV_MAJOR: None, QUERY_TILE: 7.0, MIXED: 6.0}[candidate.path]
        return 1.0 + (candidate.path != KV_MAJOR)

    measure, asked = scripted(seconds_of)
    entry = tune(PROBLEM, measure, SMALL)
    assert (entry.path, entry.backward_path) == (KV_MAJOR, MIXED)
    assert entry.backward_seconds == {QUERY_TILE: 7.0, MIXED: 6.0}
    assert {x.tuning for x in asked if x.is_backward} == {entry.tuning}
    assert len(asked) == SMALL.num_candidates(PROBLEM)


def test_where_kv_major_wins_who_asks_for_mixed_gets_its_best_sizes() -> None:
    def seconds_of(candidate: Candidate) -> float:
        return PATHS.index(candidate.path) + 1 + (candidate.tuning.shared.rows == 64)

    entry = tune(PROBLEM, scripted(seconds_of)[0], SMALL)
    assert (entry.path, entry.tuning) == (KV_MAJOR, Tuning(WIDE, PLAIN))


def test_what_does_not_run_or_is_wrong_wins_nothing() -> None:
    fast_and_wrong = {WIDE: None, NARROW: 7.0}

    def seconds_of(candidate: Candidate) -> float | None:
        return fast_and_wrong[candidate.tuning.partial] if candidate.path == KV_MAJOR else None

    measure, asked = scripted(seconds_of)
    entry = tune(PROBLEM, measure, SMALL)
    assert (entry.path, entry.tuning.partial, entry.seconds) == (KV_MAJOR, NARROW, {KV_MAJOR: 7.0})
    # Nothing is refined that did not run.
    assert not {candidate.tuning.shared.shared_by for candidate in asked} & set(SMALL.shared_by)


def test_a_device_on_which_nothing_runs_has_no_entry() -> None:
    with pytest.raises(NothingRuns, match="kv_major"):
        tune(PROBLEM, lambda candidate: None, SMALL)


def test_real_candidates_are_checked_and_timed_on_every_kind_of_indices(device: torch.device) -> None:
    timed = []

    def timer(run: Callable[[], object], count: int) -> list[float]:
        timed.append(run)
        return [1.0, 4.0 if len(timed) % 2 else 1.0, 4.0]

    bench = Bench([PROBLEM], device, timer)
    candidates = [Candidate(path, Tuning(NARROW, PLAIN)) for path in PATHS]
    candidates += [Candidate(path, Tuning(NARROW, PLAIN), is_backward=True) for path in BACKWARD_PATHS]
    for candidate in candidates:
        # Of the medians 4 and 1.
        assert bench(candidate) == pytest.approx(2.0)
    assert bench.rejected == []
    assert len(timed) == len(candidates) * 2


def test_real_candidates_that_fail_or_answer_wrongly_are_rejected_with_the_reason(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsa_core.kernels import backward, forward

    bench = Bench([PROBLEM], device, timer_for(device))
    tuning = default_tuning(PROBLEM)
    # Rows of a tile must be a power of two.
    assert bench(Candidate(KV_MAJOR, replace(tuning, partial=replace(WIDE, rows=48)))) is None
    # A softmax of twice the scale stands for a kernel that is wrong.
    right = forward.selected_attention_forward
    monkeypatch.setattr(
        forward,
        "selected_attention_forward",
        lambda problem, *tensors, **sizes: right(replace(problem, softmax_scale=0.5), *tensors, **sizes),
    )
    assert bench(Candidate(KV_MAJOR, tuning)) is None
    # So does a gradient of twice what was asked for.
    backwards = backward.selected_attention_backward
    monkeypatch.setattr(
        backward,
        "selected_attention_backward",
        lambda *tensors, **sizes: tuple(2 * grad for grad in backwards(*tensors, **sizes)),
    )
    assert bench(Candidate(KV_MAJOR, tuning, is_backward=True)) is None
    (_, failure), (_, error), (_, error_of_gradients) = bench.rejected
    assert "power of" in failure
    assert error.startswith("a row is off by ")
    assert error_of_gradients == "gradients are off by 1.0e+00 of the norm"


def test_every_candidate_of_the_grid_has_a_plan() -> None:
    for partial in GRID.partial:
        for shared in GRID.shared:
            for path in PATHS:
                assert plan_forward(PROBLEM, path=path, tuning=Tuning(partial, shared)).path == path
