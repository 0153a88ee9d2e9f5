"""What a forward pass keeps for its gradients, against gradients that find it themselves."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fsa_core.api import selected_attention
from fsa_core.kernels import query_gradients
from fsa_core.kernels.backward import selected_attention_backward
from fsa_core.kernels.keeping import selected_attention_keeping
from fsa_core.kernels.kept import kept_agreement
from fsa_core.plan import DEFAULT_WORKSPACE_BYTES, KV_MAJOR, MIXED, QUERY_TILE, TOKEN_MAJOR, plan_forward
from fsa_core.tiles import SharedTuning, default_tuning
from tests.fsa_core.conftest import Case

TILES = SharedTuning(128, num_warps=8, max_registers=128, num_stages=2, shared_by=3)
SIZES = {
    "q_lens": (70, 1, 0, 33), "k_lens": (200, 90, 0, 64), "block_size": 64, "head_dim": 64,
    "dtype": torch.float16, "num_kv_heads": 1, "num_slots": 3,
}  # fmt: skip


def assert_same_bits(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(got, expected, strict=True))


def options_of(case: Case, path: str) -> dict[str, Any]:
    tuning = default_tuning(case.problem)
    return {"tuning": tuning, "path": path, "workspace_limit_bytes": DEFAULT_WORKSPACE_BYTES}


def keep(case: Case, path: str, **others: Any) -> tuple[torch.Tensor, ...]:
    options = options_of(case, path) | {"backward_path": path} | others
    return selected_attention_keeping(case.problem, *case.tensors, **options)


@pytest.mark.parametrize("path", [MIXED, QUERY_TILE, TOKEN_MAJOR])
@pytest.mark.parametrize(
    "options",
    [
        # Tiles two by two where kernels for Hopper run, that leave nothing, and some or all of it.
        {"group_size": 1, "distribution": "same"},
        {"group_size": 1, "num_slots": 6, "q_lens": (300,), "k_lens": (900,)},
        {"group_size": 2, "distribution": "local", "index_heads": 1, "num_kv_heads": 2},
        {"group_size": 4, "distribution": "ragged", "q_lens": (90, 40), "k_lens": (500, 40)},
    ],
    ids=str,
)
def test_gradients_of_what_was_kept_have_the_same_bits(
    make_case: Callable, monkeypatch: pytest.MonkeyPatch, language: str, path: str, options: dict
) -> None:
    case = make_case(**SIZES | options)
    call = options_of(case, path)
    if language == "gluon" and case.problem.group_size == 4:
        # Tiles as large as those of the gradients there.
        call["tuning"] = replace(call["tuning"], shared=TILES)
    out, lse, kept = selected_attention_keeping(case.problem, *case.tensors, backward_path=path, **call)
    given = (*case.tensors, out, lse, *case.output_gradients())
    expected = selected_attention_backward(case.problem, *given, **call)

    def found_again(*_: object) -> None:
        raise AssertionError("lists were made again")

    monkeypatch.setattr(query_gradients, "agree", found_again)
    # Twice, since nothing that was kept may be used up.
    for _ in range(2):
        got = selected_attention_backward(case.problem, *given, kept, **call)
        assert_same_bits(got, expected)


def test_nothing_is_kept_that_gradients_would_list_otherwise(make_case: Callable) -> None:
    case = make_case(**SIZES | {"group_size": 2, "q_lens": (300,), "k_lens": (300,)})
    whole = keep(case, MIXED)
    assert len(whole) == 3
    # In groups of tokens each one's lists take the place of those before.
    assert len(keep(case, MIXED, workspace_limit_bytes=1 << 14)) == 2
    for path, backward_path in ((KV_MAJOR, MIXED), (MIXED, KV_MAJOR)):
        assert len(keep(case, path, backward_path=backward_path)) == 2
    # Nor too much of it.
    limit = 4 * whole[2].nbytes
    assert len(keep(case, QUERY_TILE, workspace_limit_bytes=limit - 1)) == 2


def test_what_leaves_nothing_has_no_place_to_say_so(make_case: Callable) -> None:
    """One launch less, and the kernel of calls that keep nothing."""
    case = make_case(**SIZES | {"group_size": 2})
    plan = plan_forward(case.problem, path=QUERY_TILE)
    piece = keep(case, QUERY_TILE)[2]
    assert kept_agreement(case.problem, plan, piece, is_new=False).kept_left is None


def test_autograd_keeps_it_for_as_long_as_gradients_may_be_asked_for(
    make_case: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(**SIZES | {"group_size": 2})
    q, k, v, *rest = case.tensors
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    names = ("block_indices", "cu_seqlens_q", "cu_seqlens_k")
    others = dict(zip(names, rest, strict=True)) | {"block_size": case.problem.block_size}
    saved: list[torch.Tensor] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out, lse = selected_attention(*leaves, **others, backend="triton", path=MIXED)
    (kept,) = [x for x in saved if x.dtype == torch.uint8]
    expected = keep(case, MIXED)[2]
    assert kept.shape == expected.shape
    given = case.output_gradients()
    monkeypatch.setattr(query_gradients, "agree", None)
    grads = torch.autograd.grad((out, lse), leaves, given, retain_graph=True)
    assert_same_bits(grads, torch.autograd.grad((out, lse), leaves, given))
    saved.clear()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        selected_attention(*leaves, **others, backend="triton", path=MIXED)
    assert not saved
