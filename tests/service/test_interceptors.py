"""What is told of calls whose clients went."""

import pytest

from service.interceptors import reason_of_cancel


@pytest.mark.parametrize(
    ("seconds", "remaining", "reason"),
    [
        (0.31, 0.3, "DEADLINE_EXCEEDED"),
        # The client's clock began before the request was sent.
        (0.28, 0.3, "DEADLINE_EXCEEDED"),
        (59.99, 60.0, "DEADLINE_EXCEEDED"),
        (0.1, 0.3, "CANCELLED"),
        (59.0, 60.0, "CANCELLED"),
        (59.0, None, "CANCELLED"),
    ],
)
def test_a_client_that_goes_at_its_deadline_was_late(
    seconds: float, remaining: float | None, reason: str
) -> None:
    assert reason_of_cancel(seconds, remaining) == reason
