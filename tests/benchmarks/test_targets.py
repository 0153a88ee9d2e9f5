"""Goals are met by what was measured, and not by what was left out."""

import pytest

from benchmarks.cases import Case, suite
from benchmarks.inputs import Work
from benchmarks.measure import Ceilings
from benchmarks.results_file import Measured, Results, Row
from benchmarks.targets import Verdict, all_goals, break_even, verdicts

MIB = 1 << 20


def results_of(cases: list[Case], **seconds: float) -> Results:
    contenders = {
        name.replace("_", " "): Measured(median_seconds=value, extra_bytes=100 * MIB)
        for name, value in seconds.items()
    }
    return Results({}, "", rows=[Row(case, contenders=dict(contenders)) for case in cases])


def verdict_of(results: Results, *words: str) -> Verdict:
    (found,) = [
        v for v in verdicts(results) if all(word in f"{v.goal.name} {v.goal.bound}" for word in words)
    ]
    return found


def test_the_fastest_peer_counts_and_ratios_are_averaged_geometrically() -> None:
    cases = [case for case in suite("targets") if case.stage == "forward"]
    results = results_of(cases, ours=1e-3, fsa=40e-3, nsa=16e-3, sfnsa=30e-3)
    fast = [row for row in results.rows if row.case.num_tokens == 8192]
    for row in fast:
        row.contenders["ours"] = Measured(median_seconds=4e-3)
    # 16, 16 and 4 times: 16 * 4 ** (-1 / 3).
    verdict = verdict_of(results, "forward, g to 8, real indices, h4-d128-64x16", "8.0")
    assert verdict.value == pytest.approx(10.0794, rel=1e-4)
    assert (verdict.measured, verdict.status) == (12, "PASS")
    least = verdict_of(results, "forward, g to 8, real indices, h4-d128-64x16", "3.0")
    assert least.value == pytest.approx(4.0)
    assert verdict_of(results, "forward, h4-d128-64x16, FSA reference").value == pytest.approx(
        25.198, rel=1e-4
    )


def test_a_goal_that_some_cases_are_missing_of_is_not_passed() -> None:
    cases = [case for case in suite("targets") if case.num_tokens == 8192]
    verdict = verdict_of(
        results_of(cases, ours=1e-3, nsa=1.0), "backward, g to 16, real indices, h4-d128-64x16", "5.0"
    )
    assert (verdict.measured, verdict.status) == (5, "PARTLY")


def test_a_red_case_counts_as_not_measured() -> None:
    cases = suite("index")
    results = results_of(cases, ours=50e-6)
    results.rows[0] = Row(cases[0], red="wrong by 1.0")
    assert verdict_of(results, "inversion, 8192").status == "PARTLY"
    assert verdict_of(results, "inversion, 65536").status == "PASS"


@pytest.mark.parametrize(("extra_mib", "status"), [(256, "PASS"), (257, "MISS")])
def test_memory_is_bounded_by_its_largest_case(extra_mib: int, status: str) -> None:
    results = results_of(suite("adversarial"), ours=1.0)
    results.rows[-1].contenders["ours"] = Measured(median_seconds=1.0, extra_bytes=extra_mib * MIB)
    assert verdict_of(results, "extra memory, adversarial").status == status


def test_growth_compares_the_time_of_a_token_and_needs_both_lengths() -> None:
    results = results_of(suite("lengths"), ours=1.0)
    for row in results.rows:
        row.contenders["ours"] = Measured(median_seconds=row.case.num_tokens * 1e-9)
    growth = verdict_of(results, "forward, g = 4, time a token")
    assert (growth.value, growth.status) == (pytest.approx(1.0), "PASS")
    results.rows = [row for row in results.rows if row.case.num_tokens < 1 << 20]
    assert not [v for v in verdicts(results) if "time a token" in v.goal.name]


def test_every_goal_is_stated_for_cases_and_under_a_name_of_its_own() -> None:
    goals = all_goals()
    assert all(goal.cases for goal in goals)
    assert len({(goal.name, goal.combine) for goal in goals}) == len(goals)


def test_the_time_of_an_attended_key_counts_the_keys_of_each() -> None:
    cases = [case for case in suite("cpu") if case.num_tokens == 8192]
    results = results_of(cases, ours=0.5, dense_causal=1.0)
    assert not [v for v in verdicts(results) if "attended key" in v.goal.name]
    dense_pairs = 9 * 8192 * 8193 // 2
    results.rows = [
        Row(row.case, Work(pairs=dense_pairs // 4, flops=0, bytes=0), row.contenders) for row in results.rows
    ]
    verdict = verdict_of(results, "attended key")
    assert verdict.value == pytest.approx(2.0)
    assert verdict.status == "PASS"


@pytest.mark.parametrize("shared", [64, 128])
@pytest.mark.parametrize("rival", ["cuDNN", "FlashAttention"])
def test_shared_rows_are_compared_with_a_rival_of_as_many_keys(rival: str, shared: int) -> None:
    cases = [case for case in suite("patterns") if case.query_block_size == shared]
    results = results_of(cases, **{"ours": 0.9, f"dense {rival}": 1.0, f"{rival} at as many keys": 1.0})
    results.rows = [
        # Nine tenths of all slots in nine tenths of the time: an attended key takes as long.
        Row(case, Work(case.num_tokens * 4 * case.group_size * 1024 * 9 // 10, 0, 0), row.contenders)
        for case, row in zip(cases, results.rows, strict=True)
    ]
    verdict = verdict_of(results, f"shared by {shared} queries", f"ours / {rival} at as many keys")
    assert verdict.value == pytest.approx(1.0)
    assert verdict.measured == len(cases)
    # The dense rival attends up to 32 times as many keys in the same time.
    dense = verdict_of(results, f"shared by {shared} queries", f"ours / dense {rival}")
    assert dense.value == pytest.approx(32, rel=1e-3)


def test_break_even_lies_where_the_ratio_passes_one() -> None:
    cases = [
        case for case in suite("operator") if case.part == "windowed" and case.num_tokens in (4096, 16384)
    ]
    results = results_of([case for case in cases if case.group_size == 4], ours=1.0)
    for row in results.rows:
        row.contenders["dense cuDNN"] = Measured(median_seconds=0.5 if row.case.num_tokens == 4096 else 2.0)
    assert break_even(results, 4) == pytest.approx(8192)
    assert break_even(results, 16) is None


def test_decode_is_compared_with_the_copy_of_its_bytes() -> None:
    results = results_of([case for case in suite("operator") if case.part == "decode"], ours=3.0)
    results.rows = [Row(row.case, Work(pairs=1, flops=1, bytes=10), row.contenders) for row in results.rows]
    assert not [v for v in verdicts(results) if "decode" in v.goal.name]
    results.ceilings = Ceilings("bfloat16", 1.0, 5.0)
    verdict = verdict_of(results, "decode, batch 64")
    assert (verdict.value, verdict.status) == (pytest.approx(1.5), "MISS")
