"""Who may come in: limits of one request, and budgets of all that are in flight."""

from dataclasses import dataclass

from fsa_core.plan import workspace_bytes
from fsa_core.problem import Problem
from service.arena import ArenaFull, ArenaPool, Lease
from service.config import Settings
from service.errors import FsaError
from service.job import Layout

# A typical request is done by then; a client that comes back earlier only costs both sides work.
RETRY_AFTER_SECONDS = 0.1


class Permit:
    """One admitted request's share of the budgets, held until ``release``.

    ``lease`` is its memory in the arena: ``Layout.of(problem).total_bytes`` of it.
    """

    def __init__(self, admission: "Admission", planned_workspace_bytes: int, lease: Lease) -> None:
        self.lease = lease
        self._admission = admission
        self._workspace_bytes = planned_workspace_bytes
        self._released = False

    def release(self) -> None:
        """Give everything back. Idempotent."""
        if not self._released:
            self._released = True
            self._admission._give_back(self._workspace_bytes)
            self.lease.release()


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for; the names are those of the wire's Limits."""

    max_tokens: int
    max_sequences: int
    max_q_heads: int
    max_slots: int
    max_message_bytes: int

    def check(self, problem: Problem) -> None:
        """Raises FsaError(LIMIT_EXCEEDED) naming the first limit that ``problem`` is over."""
        answer_bytes = Layout.of(problem)
        sizes = (
            ("max_tokens", "query tokens", problem.num_q_tokens),
            ("max_tokens", "key tokens", problem.num_k_tokens),
            ("max_sequences", "sequences", problem.num_sequences),
            ("max_q_heads", "query heads", problem.num_q_heads),
            ("max_slots", "slots in a row of block indices", problem.num_slots),
            ("max_message_bytes", "bytes of answer", answer_bytes.out.num_bytes + answer_bytes.lse.num_bytes),
        )
        for name, what, size in sizes:
            if size > (most := getattr(self, name)):
                raise limit_exceeded(name, f"the request has {size} {what}", size, most)


class Admission:
    """The budgets: requests, bytes of shared host memory, bytes of planned device workspace."""

    def __init__(self, settings: Settings, arena: ArenaPool) -> None:
        self._limits = Limits(
            settings.max_tokens,
            settings.max_sequences,
            settings.max_q_heads,
            settings.max_slots,
            settings.max_message_bytes,
        )
        self._arena = arena
        self._max_requests = settings.max_inflight_requests
        self._max_workspace_bytes = settings.max_workspace_bytes
        self.num_requests = 0
        self.workspace_bytes = 0

    async def admit(self, problem: Problem) -> Permit:
        """A permit for ``problem``, with its memory.

        Raises FsaError: LIMIT_EXCEEDED when the request can never be admitted, BUDGET_EXHAUSTED (with
        RetryInfo) when others must finish first. It never waits for others.
        """
        self._limits.check(problem)
        host, workspace = Layout.of(problem).total_bytes, workspace_bytes(problem)
        self._check_fits("max_inflight_bytes", "bytes of host memory", host, self._arena.capacity_bytes)
        self._check_fits("max_workspace_bytes", "bytes of device workspace", workspace, self._max_workspace_bytes)
        if self.num_requests >= self._max_requests:
            raise _budget_exhausted("max_inflight_requests", "requests in flight", self._max_requests)
        if self.workspace_bytes + workspace > self._max_workspace_bytes:
            raise _budget_exhausted("max_workspace_bytes", "bytes of workspace", self._max_workspace_bytes)
        self.num_requests += 1
        self.workspace_bytes += workspace
        try:
            return Permit(self, workspace, await self._arena.acquire(host))
        except BaseException as error:
            self._give_back(workspace)
            if isinstance(error, ArenaFull):
                raise _budget_exhausted(
                    "max_inflight_bytes", "bytes of host memory", self._arena.capacity_bytes
                ) from error
            raise

    def _check_fits(self, name: str, what: str, size: int, most: int) -> None:
        if size > most:
            raise limit_exceeded(name, f"the request needs {size} {what}", size, most)

    def _give_back(self, planned_workspace_bytes: int) -> None:
        self.num_requests -= 1
        self.workspace_bytes -= planned_workspace_bytes


def limit_exceeded(name: str, what: str, size: int, most: int) -> FsaError:
    """The refusal of a request that this server will never take, whenever it comes."""
    metadata = {"limit": name, "value": str(size), "max": str(most)}
    return FsaError("LIMIT_EXCEEDED", f"{what}; this server takes at most {most}", metadata=metadata)


def _budget_exhausted(name: str, what: str, most: int) -> FsaError:
    return FsaError(
        "BUDGET_EXHAUSTED",
        f"all {most} {what} are in use; try again when others have finished",
        metadata={"limit": name, "max": str(most)},
        retry_after_seconds=RETRY_AFTER_SECONDS,
    )
