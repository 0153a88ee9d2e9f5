"""Who is timed how often."""

from benchmarks.measure import ROUNDS, SLOW_SECONDS, take_turns


def test_a_slow_call_is_timed_once_and_the_others_in_turns() -> None:
    seconds = {"fast": 0.1, "slow": SLOW_SECONDS + 1}
    times = take_turns(
        {name: lambda name=name: name for name in seconds},
        lambda run, count: [seconds[run()]] * count,
        seconds_each=0.8,
    )
    assert (times["slow"].runs, times["slow"].median_seconds) == (1, SLOW_SECONDS + 1)
    assert times["fast"].runs == 2 * ROUNDS
