"""The library's goals, and which of them a file of results meets."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.cases import BREAK_EVEN_TOKENS, OPERATOR_GROUP_SIZES, TARGET_TOKENS, Case, as_recorded, suite
from benchmarks.host import AUTOGRAD, PYTHON
from benchmarks.measure import Ceilings
from benchmarks.results_file import Results, Row

SPARSE_PEERS = ("fsa", "nsa", "sfnsa")
RECORDED_TOKENS, RECORDED_SLOTS = 8192, 16
MAIN_LAYOUT = "h4-d128-64x16"
MIB = 1 << 20

Value = Callable[[Row], float | None]
Combine = Callable[[Sequence[float]], float]


@dataclass(frozen=True, slots=True)
class Goal:
    """``combine`` of ``value`` over ``cases`` is at least, or at most, ``bound``."""

    name: str
    cases: tuple[Case, ...]
    value: Value
    combine: Combine
    bound: float
    unit: str = "x"
    at_most: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """What ``measured`` of a goal's cases say of it. PARTLY: met by those, but the others are missing."""

    goal: Goal
    value: float
    measured: int

    @property
    def status(self) -> Literal["PASS", "MISS", "PARTLY"]:
        met = self.value <= self.goal.bound if self.goal.at_most else self.value >= self.goal.bound
        if not met:
            return "MISS"
        return "PASS" if self.measured == len(self.goal.cases) else "PARTLY"


def verdicts(results: Results) -> list[Verdict]:
    """Of every goal that something was measured of."""
    rows = {row.case: row for row in results.rows}
    found = []
    for goal in all_goals(results.ceilings):
        values = [goal.value(rows[case]) for case in goal.cases if case in rows]
        known = [value for value in values if value is not None]
        if known and not (goal.combine is _growth and len(known) < len(goal.cases)):
            found.append(Verdict(goal, goal.combine(known), len(known)))
    return found


def all_goals(ceilings: Ceilings | None = None) -> list[Goal]:
    return [
        *_ratio_goals(),
        *_dense_goals(),
        *_memory_goals(),
        *_growth_goals(),
        *_time_goals(),
        *_cpu_goals(),
        *_pattern_goals(),
        *_operator_goals(ceilings),
    ]


def _ratio_goals() -> list[Goal]:
    """The fastest sparse peer's time over ours, and the FSA reference's."""
    drawn = suite("targets")
    cases = drawn + as_recorded(drawn, RECORDED_TOKENS, RECORDED_SLOTS)
    peers = _times_faster(SPARSE_PEERS)
    goals = []
    for layout in dict.fromkeys(case.layout for case in cases):
        for kind, mean, least, least_g16, backward_mean in (
            ("real", 8.0, 3.0, 2.2, 5.0),
            ("recorded", 8.0, 3.0, 2.2, 5.0),
            ("random", 4.5, 1.8, 1.3, 3.0),
        ):
            cells = [case for case in cases if (case.layout, case.kind) == (layout, kind)]
            forward = [case for case in cells if case.stage == "forward"]
            backward = [case for case in cells if case.stage == "backward"]
            small = [case for case in forward if case.group_size < 16]
            g16 = [case for case in forward if case.group_size == 16]
            small_backward = [case for case in backward if case.group_size < 16]
            where = f"{kind} indices, {layout}, fastest peer / ours"
            goals += [
                _goal(f"forward, g to 8, {where}", small, peers, _geometric_mean, mean),
                _goal(f"forward, g to 8, {where}", small, peers, min, least),
                _goal(f"forward, g = 16, {where}", g16, peers, min, least_g16),
                # "The same cells" may be read as those of g to 8, or as all of them.
                _goal(f"backward, g to 8, {where}", small_backward, peers, _geometric_mean, backward_mean),
                _goal(f"backward, g to 8, {where}", small_backward, peers, min, 1.5),
            ]
            if len(small_backward) < len(backward):
                goals += [
                    _goal(f"backward, g to 16, {where}", backward, peers, _geometric_mean, backward_mean),
                    _goal(f"backward, g to 16, {where}", backward, peers, min, 1.5),
                ]
        all_forward = [case for case in drawn if (case.layout, case.stage) == (layout, "forward")]
        name = f"forward, {layout}, FSA reference / ours"
        goals.append(_goal(name, all_forward, _times_faster(("fsa",)), _geometric_mean, 12.0))
    return [goal for goal in goals if goal.cases]


def _dense_goals() -> list[Goal]:
    dense = _times_faster(("dense cuDNN",))
    goals = []
    for kind, smallest_g, at_64k in (("real", 1, 14.0), ("random", 2, 7.0)):
        cells = [
            case
            for case in suite("targets")
            if (case.layout, case.stage, case.kind) == (MAIN_LAYOUT, "forward", kind)
            and case.group_size >= smallest_g
        ]
        longest = [case for case in cells if (case.num_tokens, case.group_size) == (TARGET_TOKENS[-1], 4)]
        where = f"{kind} indices, {MAIN_LAYOUT}, dense cuDNN / ours"
        goals += [
            _goal(f"forward, g from {smallest_g}, {where}", cells, dense, min, 1.0),
            _goal(f"forward, 64K, g = 4, {where}", longest, dense, min, at_64k),
        ]
    return goals


def _memory_goals() -> list[Goal]:
    return [
        _goal(f"extra memory, {name}", suite(name), _extra_mib, max, 256.0, "MiB", at_most=True)
        for name in ("targets", "lengths", "adversarial")
    ]


def _growth_goals() -> list[Goal]:
    def seconds_per_token(row: Row) -> float | None:
        seconds = row.seconds("ours")
        return None if seconds is None else seconds / row.case.num_tokens

    curves: dict[tuple[str, int], list[Case]] = {}
    for case in suite("lengths"):
        if case.num_tokens in (1 << 16, 1 << 20):
            curves.setdefault((case.stage, case.group_size), []).append(case)
    return [
        _goal(
            f"{stage}, g = {g}, time a token at 1M / at 64K",
            cases,
            seconds_per_token,
            _growth,
            1.1,
            at_most=True,
        )
        for (stage, g), cases in curves.items()
    ]


def _time_goals() -> list[Goal]:
    def microseconds(row: Row) -> float | None:
        seconds = row.seconds("ours")
        return None if seconds is None else seconds * 1e6

    def python_microseconds(row: Row) -> float | None:
        seconds = row.seconds(PYTHON)
        return None if seconds is None else (seconds - (row.seconds(AUTOGRAD) or 0.0)) * 1e6

    goals = [
        _goal("Python time of a call", suite("host"), python_microseconds, max, 60.0, "us", at_most=True),
    ]
    for tokens, bound in ((8192, 60.0), (65536, 150.0)):
        cases = [case for case in suite("index") if case.num_tokens == tokens]
        goals.append(
            _goal(f"inversion, {tokens} tokens", cases, microseconds, max, bound, "us", at_most=True)
        )
    return goals


def _operator_goals(ceilings: Ceilings | None) -> list[Goal]:
    def milliseconds(row: Row) -> float | None:
        seconds = row.seconds("ours")
        return None if seconds is None else seconds * 1e3

    def times_bytes(row: Row) -> float | None:
        """Our time over that of copying as many bytes as the step must read and write."""
        seconds = row.seconds("ours")
        if ceilings is None or seconds is None or row.work is None:
            return None
        return seconds * ceilings.bytes_per_second / row.work.bytes

    def cases(part: str, g: int, stage: str = "forward", tokens: Sequence[int] = (1 << 16,)) -> list[Case]:
        found = [case for case in suite("operator") if (case.part, case.group_size) == (part, g)]
        return [case for case in found if case.stage == stage and case.num_tokens in tokens]

    goals = []
    for g, bound in ((1, 2.5), (4, 4.0)):
        name = f"compressed attention and selection, 64K, g = {g}"
        goals.append(_goal(name, cases("selection", g), milliseconds, max, bound, "ms", at_most=True))
    name = "extra memory, compressed attention and selection, 64K, g = 4"
    goals.append(_goal(name, cases("selection", 4), _extra_mib, max, 200.0, "MiB", at_most=True))
    for stage, bounds in (("forward", (4.5, 8.5, 20.0)), ("backward", (8.0, 14.0, 35.0))):
        for g, bound in zip(OPERATOR_GROUP_SIZES, bounds, strict=True):
            name = f"operator without window, {stage}, 64K, g = {g}"
            goals.append(
                _goal(name, cases("operator", g, stage), milliseconds, max, bound, "ms", at_most=True)
            )
    dense = _times_faster(("dense cuDNN",))
    for g, bound in zip(OPERATOR_GROUP_SIZES, (1.5, 3.0, 5.0), strict=True):
        name = f"whole operator, forward, 64K, g = {g}, dense cuDNN / ours"
        goals.append(_goal(name, cases("windowed", g), dense, min, bound))
    for g, least in ((4, 12288), (16, 8192)):
        name = f"whole operator, forward, from {least} tokens on, g = {g}, dense cuDNN / ours"
        lengths = [tokens for tokens in BREAK_EVEN_TOKENS if tokens >= least]
        goals.append(_goal(name, cases("windowed", g, tokens=lengths), dense, min, 1.0))
    decode = [case for case in suite("operator") if (case.part, case.batch) == ("decode", 64)]
    goals.append(
        _goal("decode, batch 64 at 32K, ours / its bytes", decode, times_bytes, max, 1.25, at_most=True)
    )
    longest = cases("windowed", 4, tokens=(1 << 16, 1 << 18))
    name = "whole operator, forward, g = 4, memory a token at 256K / at 64K"
    return [*goals, _goal(name, longest, _extra_mib_per_token, _growth, 1.1, at_most=True)]


def _extra_mib(row: Row) -> float | None:
    ours = row.contenders.get("ours")
    return None if ours is None or ours.extra_bytes is None else ours.extra_bytes / MIB


def _extra_mib_per_token(row: Row) -> float | None:
    extra = _extra_mib(row)
    return None if extra is None else extra / row.case.num_tokens


def break_even(results: Results, group_size: int) -> float | None:
    """The length from which the whole operator is faster than dense cuDNN, forward; None: not measured.

    Between the lengths that were measured, the ratio is taken as a power of the length.
    """
    dense = _times_faster(("dense cuDNN",))
    curve = [
        (math.log2(row.case.num_tokens), math.log(ratio))
        for row in sorted(results.rows, key=lambda row: row.case.num_tokens)
        if (row.case.part, row.case.group_size) == ("windowed", group_size) and (ratio := dense(row))
    ]
    for (x0, y0), (x1, y1) in reversed(list(itertools.pairwise(curve))):
        if y0 < 0 <= y1:
            return 2 ** (x0 - y0 * (x1 - x0) / (y1 - y0))
    return None


def _cpu_goals() -> list[Goal]:
    masked = _times_faster(("dense masked",))
    goals = []
    for tokens, bound in ((8192, 1.0), (32768, 3.0)):
        cases = [case for case in suite("cpu") if case.num_tokens == tokens]
        name = f"CPU, {tokens} tokens, dense with a mask / ours"
        goals.append(_goal(name, cases, masked, min, bound))
    cases = [case for case in suite("cpu") if case.num_tokens == 8192]
    name = "CPU, 8192 tokens, time of an attended key, ours / dense causal"
    return [*goals, _goal(name, cases, _key_times("dense causal", _causal_pairs), max, 3.0, at_most=True)]


def _pattern_goals() -> list[Goal]:
    """Beside rivals that attend as many keys as we do, and beside dense ones.

    A dense call spreads what it takes besides its keys over more of them, the longer it is.
    """
    goals = []
    for rival, pairs in (
        ("dense cuDNN", _causal_pairs),
        ("dense FlashAttention", _causal_pairs),
        ("cuDNN at as many keys", _piece_pairs),
        ("FlashAttention at as many keys", _piece_pairs),
    ):
        for shared in (64, 128):
            cases = [case for case in suite("patterns") if case.query_block_size == shared]
            name = f"rows shared by {shared} queries, time of an attended key, ours / {rival}"
            goals.append(_goal(name, cases, _key_times(rival, pairs), max, 1.0, at_most=True))
    return goals


def _causal_pairs(case: Case) -> int:
    """(query head, key) pairs of dense causal attention."""
    return case.num_kv_heads * case.group_size * case.num_tokens * (case.num_tokens + 1) // 2


def _piece_pairs(case: Case) -> int:
    """(query head, key) pairs where every token attends a whole piece, the first ones and itself included."""
    return case.num_kv_heads * case.group_size * case.num_tokens * case.keys_of_row


def _key_times(rival: str, rival_pairs: Callable[[Case], int]) -> Value:
    """Our time of an attended (query head, key) pair over the rival's, which attends ``rival_pairs``.

    Our rows attend a little less than all their slots: at the beginning of the sequence, and in a token's own
    block.
    """

    def value(row: Row) -> float | None:
        ours, theirs = row.seconds("ours"), row.seconds(rival)
        if ours is None or theirs is None or row.work is None:
            return None
        return (ours / row.work.pairs) / (theirs / rival_pairs(row.case))

    return value


def _goal(
    name: str,
    cases: Iterable[Case],
    value: Value,
    combine: Combine,
    bound: float,
    unit: str = "x",
    *,
    at_most: bool = False,
) -> Goal:
    return Goal(name, tuple(cases), value, combine, bound, unit, at_most)


def _times_faster(rivals: Sequence[str]) -> Value:
    """How often ours fits into the time of the fastest of ``rivals``; None where either has no time."""

    def value(row: Row) -> float | None:
        ours = row.seconds("ours")
        theirs = [seconds for rival in rivals if (seconds := row.seconds(rival)) is not None]
        return min(theirs) / ours if ours and theirs else None

    return value


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _growth(values: Sequence[float]) -> float:
    """Of the last over the first."""
    return values[-1] / values[0]
