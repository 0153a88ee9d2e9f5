"""Who may come in: limits of one request, and budgets of all that are in flight."""

import logging
from dataclasses import dataclass
from typing import Protocol

from fsa_core.nsa import selecting
from fsa_core.nsa.selecting import SelectingProblem
from fsa_core.plan import workspace_bytes
from fsa_core.problem import Problem
from service.arena import ArenaFull, ArenaPool, Lease, MachineFull
from service.config import Settings
from service.errors import FsaError
from service.job import Layout

log = logging.getLogger("fsa.admission")

# A typical request is done by then; a client that comes back earlier only costs both sides work.
RETRY_AFTER_SECONDS = 0.1
# Of windows that the server selects by, in keys: each of their strides is an addition a query and block.
MAX_KERNEL_SIZE = 256


class Sizes(Protocol):
    """What a request's tensors say of its size: a Problem, or what is known before there is one."""

    @property
    def num_q_tokens(self) -> int: ...
    @property
    def num_k_tokens(self) -> int: ...
    @property
    def num_sequences(self) -> int: ...
    @property
    def num_q_heads(self) -> int: ...


class Permit:
    """One admitted request's share of the budgets, held until ``release``.

    ``lease`` is its memory in the arena: ``Layout.of(problem).total_bytes`` of it.
    """

    def __init__(self, admission: "Admission", cost: "Cost", lease: Lease) -> None:
        self.lease = lease
        self._admission = admission
        self._cost = cost
        self._released = False

    def answer(self, num_bytes: int) -> None:
        """Give back all but the ``num_bytes`` of an answer that is on its way."""
        self._admission._give_back(self._cost)
        self._cost = Cost(num_bytes, 0)
        self._admission._take(self._cost)
        self.lease.release()

    def release(self) -> None:
        """Give everything back. Idempotent."""
        if not self._released:
            self._released = True
            self._admission._give_back(self._cost)
            self.lease.release()


@dataclass(frozen=True, slots=True)
class Cost:
    """The bytes that one request holds while it is in flight, or its answer while that is sent."""

    host_bytes: int
    workspace_bytes: int


class Admission:
    """The budgets: requests, bytes of shared host memory, bytes of planned device workspace."""

    def __init__(self, settings: Settings, arena: ArenaPool) -> None:
        self._settings = settings
        self._arena = arena
        self.num_requests = 0
        self.host_bytes = 0
        self.workspace_bytes = 0

    async def admit(self, problem: Problem) -> Permit:
        """A permit for ``problem``, with its memory. Never waits for others to finish.

        Raises FsaError: LIMIT_EXCEEDED when the request can never be admitted, BUDGET_EXHAUSTED (with
        RetryInfo) when others must finish first.
        """
        check_limits(problem, self._settings)
        cost = Cost(Layout.of(problem).total_bytes, _workspace_bytes(problem))
        self._check_budgets(cost)
        self._take(cost)
        try:
            return Permit(self, cost, await self._arena.acquire(cost.host_bytes))
        except BaseException as error:
            self._give_back(cost)
            if isinstance(error, MachineFull):
                log.warning("no memory for a request", extra={"detail": str(error)})
                raise FsaError(
                    "BUDGET_EXHAUSTED",
                    "the machine has no memory for the request now; try again later",
                    metadata={"limit": "memory"},
                    retry_after_seconds=RETRY_AFTER_SECONDS,
                ) from error
            if isinstance(error, ArenaFull):
                raise _exhausted("max_inflight_bytes", self._settings) from error
            raise

    def check_sizes(self, sizes: Sizes) -> None:
        """Raises FsaError(LIMIT_EXCEEDED) naming the first of ``sizes`` that no request may have."""
        check_sizes(sizes, self._settings)

    def _check_budgets(self, cost: Cost) -> None:
        settings = self._settings
        _check("max_inflight_bytes", "bytes of host memory", cost.host_bytes, settings)
        _check("max_workspace_bytes", "bytes of device workspace", cost.workspace_bytes, settings)
        if self.num_requests >= settings.max_inflight_requests:
            raise _exhausted("max_inflight_requests", settings)
        if self.host_bytes + cost.host_bytes > settings.max_inflight_bytes:
            raise _exhausted("max_inflight_bytes", settings)
        if self.workspace_bytes + cost.workspace_bytes > settings.max_workspace_bytes:
            raise _exhausted("max_workspace_bytes", settings)

    def _take(self, cost: Cost) -> None:
        self.num_requests += 1
        self.host_bytes += cost.host_bytes
        self.workspace_bytes += cost.workspace_bytes

    def _give_back(self, cost: Cost) -> None:
        self.num_requests -= 1
        self.host_bytes -= cost.host_bytes
        self.workspace_bytes -= cost.workspace_bytes


def check_sizes(sizes: Sizes, settings: Settings) -> None:
    _check("max_tokens", "query tokens", sizes.num_q_tokens, settings)
    _check("max_tokens", "key tokens", sizes.num_k_tokens, settings)
    _check("max_sequences", "sequences", sizes.num_sequences, settings)
    _check("max_q_heads", "query heads", sizes.num_q_heads, settings)


def check_limits(problem: Problem, settings: Settings) -> None:
    """Raises FsaError(LIMIT_EXCEEDED) naming the first limit of one request that ``problem`` is over."""
    check_sizes(problem, settings)
    _check("max_slots", "slots in a row of block indices", problem.num_slots, settings)
    if isinstance(problem, SelectingProblem):
        size = problem.config.kernel_size
        if size > MAX_KERNEL_SIZE:
            what = f"the request has windows of {size} keys"
            raise limit_exceeded("max_kernel_size", what, size, MAX_KERNEL_SIZE)


def _workspace_bytes(problem: Problem) -> int:
    if isinstance(problem, SelectingProblem):
        return selecting.workspace_bytes(problem)
    return workspace_bytes(problem)


def _check(setting: str, what: str, size: int, settings: Settings) -> None:
    most = getattr(settings, setting)
    if size > most:
        raise limit_exceeded(setting, f"the request has {size} {what}", size, most)


def limit_exceeded(name: str, what: str, size: int, most: int) -> FsaError:
    """The refusal of a request that this server will never take, whenever it comes."""
    metadata = {"limit": name, "value": str(size), "max": str(most)}
    return FsaError("LIMIT_EXCEEDED", f"{what}; this server takes at most {most}", metadata=metadata)


def _exhausted(setting: str, settings: Settings) -> FsaError:
    most = getattr(settings, setting)
    return FsaError(
        "BUDGET_EXHAUSTED",
        f"{setting} ({most}) is used up by requests in flight; try again when some have finished",
        metadata={"limit": setting, "max": str(most)},
        retry_after_seconds=RETRY_AFTER_SECONDS,
    )
