"""What a call that selects and attends takes of a device's memory, against what admission plans for it."""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.selecting import select_and_attend, validate_selecting, workspace_bytes

CONFIG = NSAConfig(kernel_size=32, stride=16, block_size=64, top_k=4, window=64)


class TakenMemory(TorchDispatchMode):
    """Bytes of all storages that operations made and that are still there, and the most at any time."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self.bytes = self.most = 0
        # Views of what was there before take nothing.
        self._sizes = {x.untyped_storage()._cdata: 0 for x in given}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = function(*args, **(kwargs or {}))
        for x in tree_leaves(answer):
            if isinstance(x, torch.Tensor):
                self._note(x.untyped_storage())
        return answer

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.most = max(self.most, self.bytes)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize(
    ("lens", "q_heads", "kv_heads", "head_dim", "value_dim", "dtype"),
    [
        ((150,), 6, 1, 64, 32, torch.float32),
        ((40, 0, 90), 4, 2, 32, 32, torch.float16),
        ((120,), 8, 8, 32, 64, torch.float16),
    ],
)
def test_a_call_takes_no_more_than_is_planned_for_it(
    device: torch.device,
    lens: tuple[int, ...],
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    is_gated: bool,
) -> None:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(sum(lens), *shape, device=device).to(dtype)

    q, k, v = normal(q_heads, head_dim), normal(kv_heads, head_dim), normal(kv_heads, value_dim)
    gates = normal(q_heads, 3).sigmoid() if is_gated else None
    starts = torch.tensor((0, *lens), device=device).cumsum(0, dtype=torch.int32)
    problem = validate_selecting(
        q,
        k,
        v,
        gates,
        config=CONFIG,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        softmax_scale=None,
        causal=True,
    )
    given = (q, k, v, gates, starts, starts)
    memory = TakenMemory([x for x in given if x is not None])
    with memory:
        answer = select_and_attend(problem, *given, backend="triton")
    answers = [x for x in (answer.out, answer.lse, answer.block_indices) if x is not None]
    assert sum(x.nbytes for x in answers) < memory.most
    assert memory.most - sum(x.nbytes for x in answers) <= workspace_bytes(problem)
