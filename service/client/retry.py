"""When a call that got UNAVAILABLE is sent again: until its deadline, ever more slowly.

The channel's service config (service.client.connection) does the first of it, within a second. gRPC's own
retries end after five attempts, however much of the deadline is left, do not know when the server said that
waiting helps, and take no large requests.
"""

import random
import time

from service.client.errors import Unavailable

FIRST_PAUSE_SECONDS = 0.2
MAX_PAUSE_SECONDS = 5.0
PAUSE_GROWTH = 1.5
# Of a pause, at most: those whom one loss sent away must not all come back at once.
JITTER = 0.25
# What the channel's own attempts take at most. Were the deadline to pass meanwhile, the caller would not be
# told what was wrong.
CHANNEL_SECONDS = 1.0


class Attempts:
    """The attempts of one call, and the time it has for all of them together."""

    def __init__(self, timeout_seconds: float, *, retry: bool) -> None:
        """Without ``retry`` there is one attempt."""
        self._deadline = time.monotonic() + timeout_seconds
        self._retry = retry
        self._least_seconds = FIRST_PAUSE_SECONDS

    @property
    def left_seconds(self) -> float:
        """Until the deadline; what the next attempt may take."""
        return self._deadline - time.monotonic()

    def pause_after(self, error: Unavailable) -> float | None:
        """Seconds to wait before the next attempt; None: there is none, or no time for one.

        At least what the server asked for, and at least 0.2 s, growing by half with each attempt to 5 s.
        """
        asked_seconds = error.retry_after_seconds or 0.0
        pause = max(self._least_seconds, asked_seconds) * random.uniform(1.0, 1.0 + JITTER)
        self._least_seconds = min(PAUSE_GROWTH * self._least_seconds, MAX_PAUSE_SECONDS)
        return pause if self._retry and pause + CHANNEL_SECONDS < self.left_seconds else None
