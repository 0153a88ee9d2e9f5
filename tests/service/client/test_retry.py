"""When an unavailable server is asked again."""

import grpc

from service.client.errors import Unavailable
from service.client.retry import (
    CHANNEL_SECONDS,
    FIRST_PAUSE_SECONDS,
    JITTER,
    MAX_PAUSE_SECONDS,
    PAUSE_GROWTH,
    Attempts,
)


def unavailable(retry_after_seconds: float | None = None) -> Unavailable:
    return Unavailable(grpc.StatusCode.UNAVAILABLE, "", "", retry_after_seconds=retry_after_seconds)


def pauses(attempts: Attempts, count: int, error: Unavailable) -> list[float]:
    found = [attempts.pause_after(error) for _ in range(count)]
    return [pause for pause in found if pause is not None]


def test_pauses_grow_to_a_limit_and_never_end_before_the_deadline() -> None:
    found = pauses(Attempts(3600, retry=True), 100, unavailable())
    assert len(found) == 100
    for number, pause in enumerate(found):
        least = min(FIRST_PAUSE_SECONDS * PAUSE_GROWTH**number, MAX_PAUSE_SECONDS)
        assert least <= pause <= least * (1 + JITTER)


def test_the_server_is_not_asked_before_it_said_that_waiting_helps() -> None:
    asked = 3.0
    found = pauses(Attempts(3600, retry=True), 20, unavailable(asked))
    assert min(found) >= asked
    assert max(found) > MAX_PAUSE_SECONDS >= asked


def test_many_who_were_sent_away_together_come_back_apart() -> None:
    found = [pauses(Attempts(3600, retry=True), 1, unavailable(1.0))[0] for _ in range(20)]
    assert len(set(found)) == len(found)


def test_no_attempt_is_waited_for_that_the_deadline_does_not_leave_time_for() -> None:
    assert Attempts(CHANNEL_SECONDS + FIRST_PAUSE_SECONDS, retry=True).pause_after(unavailable()) is None
    assert Attempts(CHANNEL_SECONDS + 2.0, retry=True).pause_after(unavailable(2.0)) is None


def test_without_retries_there_is_one_attempt() -> None:
    assert Attempts(3600, retry=False).pause_after(unavailable()) is None
