"""Budgets: who is let in, who is told to come back, who never fits; and that nothing stays behind."""

import asyncio
import errno
import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.selecting import SelectingProblem
from fsa_core.plan import workspace_bytes
from fsa_core.problem import Problem
from service.admission import Admission, check_limits
from service.arena import ArenaPool
from service.config import Settings
from service.errors import FsaError
from service.job import Layout

MIB = 1 << 20
PROBLEM = Problem(
    num_q_tokens=4096,
    num_k_tokens=4096,
    num_sequences=1,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=64,
    value_dim=64,
    dtype=torch.float16,
    index_heads=2,
    num_slots=4,
    block_size=64,
    causal=True,
    softmax_scale=0.125,
)
HOST_BYTES = Layout.of(PROBLEM).total_bytes
DEFAULTS = Settings()


def admission(capacity_bytes: int = 64 * MIB, **settings: Any) -> Admission:
    arena = ArenaPool(capacity_bytes, segment_bytes=1 * MIB)
    return Admission(DEFAULTS.model_copy(update={"max_inflight_bytes": capacity_bytes, **settings}), arena)


def refusal(budget: Admission, problem: Problem = PROBLEM) -> FsaError:
    with pytest.raises(FsaError) as caught:
        asyncio.run(budget.admit(problem))
    return caught.value


BUDGETS = [
    ("max_inflight_requests", {"max_inflight_requests": 2}),
    ("max_workspace_bytes", {"max_workspace_bytes": 2 * workspace_bytes(PROBLEM)}),
    ("max_inflight_bytes", {"capacity_bytes": 3 * HOST_BYTES - 1}),
]


@pytest.mark.parametrize(("limit", "settings"), BUDGETS)
def test_over_a_budget_a_request_is_told_to_come_back_and_then_fits(
    limit: str, settings: dict[str, int]
) -> None:
    budget = admission(**settings)
    permits = [asyncio.run(budget.admit(PROBLEM)) for _ in range(2)]
    error = refusal(budget)
    assert (error.reason, error.metadata["limit"]) == ("BUDGET_EXHAUSTED", limit)
    assert error.retry_after_seconds is not None
    permits[0].release()
    asyncio.run(budget.admit(PROBLEM)).release()


def test_a_machine_without_memory_is_not_taken_for_a_budget_in_use(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_fd: int, _offset: int, _length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    budget = admission()
    error = refusal(budget)
    assert (error.reason, error.metadata["limit"]) == ("BUDGET_EXHAUSTED", "memory")
    assert error.message == "the machine has no memory for the request now; try again later"
    assert "No space left on device" in caplog.records[-1].detail
    assert (budget.num_requests, budget.host_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("limit", "settings"),
    [
        ("max_workspace_bytes", {"max_workspace_bytes": workspace_bytes(PROBLEM) - 1}),
        ("max_inflight_bytes", {"capacity_bytes": HOST_BYTES - 1}),
    ],
)
def test_a_request_that_never_fits_is_not_told_to_come_back(limit: str, settings: dict[str, int]) -> None:
    error = refusal(admission(**settings))
    assert (error.reason, error.metadata["limit"]) == ("LIMIT_EXCEEDED", limit)
    assert error.retry_after_seconds is None


@pytest.mark.parametrize(
    ("limit", "over"),
    [
        ("max_tokens", replace(PROBLEM, num_q_tokens=DEFAULTS.max_tokens + 1)),
        ("max_tokens", replace(PROBLEM, num_k_tokens=DEFAULTS.max_tokens + 1)),
        ("max_sequences", replace(PROBLEM, num_sequences=DEFAULTS.max_sequences + 1)),
        ("max_q_heads", replace(PROBLEM, num_q_heads=DEFAULTS.max_q_heads + 2)),
        ("max_slots", replace(PROBLEM, num_slots=DEFAULTS.max_slots + 1)),
    ],
)
def test_each_limit_of_one_request_is_named_with_its_value(limit: str, over: Problem) -> None:
    check_limits(PROBLEM, DEFAULTS)
    with pytest.raises(FsaError) as caught:
        check_limits(over, DEFAULTS)
    assert caught.value.reason == "LIMIT_EXCEEDED"
    assert caught.value.metadata["limit"] == limit
    assert int(caught.value.metadata["value"]) > int(caught.value.metadata["max"])


def test_what_selection_needs_besides_counts_as_workspace() -> None:
    """With a window a key, compressed keys are as many bytes as the keys."""
    config = NSAConfig(kernel_size=16, stride=1)
    by_branch = [SelectingProblem.of(PROBLEM, config, is_gated=is_gated) for is_gated in (False, True)]
    compressed_bytes = Layout.of(PROBLEM).k.num_bytes
    held = []
    for problem in by_branch:
        budget = admission()
        permit = asyncio.run(budget.admit(problem))
        held.append(budget.workspace_bytes)
        permit.release()
        assert budget.workspace_bytes == 0
    assert held[0] >= workspace_bytes(by_branch[0]) + compressed_bytes
    assert held[1] >= held[0] + compressed_bytes
    error = refusal(admission(max_workspace_bytes=held[0]), by_branch[1])
    assert (error.reason, error.metadata["limit"]) == ("LIMIT_EXCEEDED", "max_workspace_bytes")


def test_releasing_gives_everything_back_once() -> None:
    budget = admission()
    first, second = (asyncio.run(budget.admit(PROBLEM)) for _ in range(2))
    assert (budget.num_requests, budget.host_bytes) == (2, 2 * HOST_BYTES)
    assert budget.workspace_bytes == 2 * workspace_bytes(PROBLEM)
    first.release()
    first.release()
    assert (budget.num_requests, budget.host_bytes) == (1, HOST_BYTES)
    second.release()
    assert (budget.num_requests, budget.host_bytes, budget.workspace_bytes) == (0, 0, 0)


def test_a_refused_or_cancelled_request_leaves_nothing_behind() -> None:
    # Larger than a segment, so its memory is made in a thread, while the caller waits.
    budget = admission(capacity_bytes=HOST_BYTES + MIB)

    async def scenario() -> None:
        task = asyncio.create_task(budget.admit(PROBLEM))
        await asyncio.sleep(0)
        assert budget.num_requests == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert (budget.num_requests, budget.host_bytes, budget.workspace_bytes) == (0, 0, 0)
    asyncio.run(budget.admit(PROBLEM)).release()
