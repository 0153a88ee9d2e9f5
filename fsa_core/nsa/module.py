"""The layer: projections, rotary positions, gates, compression and the operator, to train and to serve."""

import math
from collections.abc import Callable
from functools import lru_cache
from numbers import Real
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from fsa_core.api import BACKENDS
from fsa_core.errors import InputError, refuse, refuse_value
from fsa_core.nsa.cache import NSACache
from fsa_core.nsa.compression import (
    Compression,
    LinearCompression,
    MeanCompression,
    MLPCompression,
    WeightedCompression,
)
from fsa_core.nsa.config import NSAConfig, checked_size
from fsa_core.nsa.decoding import attend_slots
from fsa_core.nsa.functional import attend_checked
from fsa_core.nsa.rope import Turns, turn, turns_at
from fsa_core.nsa.steps import Step
from fsa_core.nsa.validation import Call, check_config, check_starts
from fsa_core.packing import place_queries, single_sequence
from fsa_core.plan import DEFAULT_WORKSPACE_BYTES
from fsa_core.problem import MAX_HEAD_DIM, MIN_HEAD_DIM
from fsa_core.validation import as_float, check_tensor

COMPRESSIONS = ("mean", "weighted", "linear", "mlp")

P = ParamSpec("P")
R = TypeVar("R")


def _graph_break(function: Callable[P, R]) -> Callable[P, R]:
    """Keep a function out of torch.compile's graphs, and say why."""
    reason = "what attention does depends on the contents of cu_seqlens"
    disabled: Callable[P, R] = torch.compiler.disable(function, reason=reason)
    return disabled


class NativeSparseAttention(nn.Module):
    """A causal attention layer with Native Sparse Attention (arXiv 2502.11089) and grouped queries.

    Keys are compressed before they are rotated, and a compressed key is rotated to the position of its
    window's first token; so compression sees content alone.

    Args:
        hidden_dim: width of the layer's input and output.
        num_q_heads, num_kv_heads: the former a multiple of the latter.
        head_dim: 16 to 256, even if positions are rotated; default hidden_dim // num_q_heads.
        config: windows, blocks and budget; None: the paper's.
        compression: "mean", "weighted", "linear" or "mlp" (the paper's), of K and of V each with their own.
        rope_theta: base of the rotary frequencies, at least 1; None leaves positions out.
        backend: of selected attention, as in ``fsa_core.api``; each call says whether it can run there.

    state_dict, D for head_dim, in torch's layout [out, in] where a key belongs to a linear map:
        q_proj.weight [num_q_heads * D, hidden_dim]
        k_proj.weight, v_proj.weight [num_kv_heads * D, hidden_dim]
        o_proj.weight [hidden_dim, num_q_heads * D]
        gate_proj.weight [num_q_heads * 3, hidden_dim], gate_proj.bias [num_q_heads * 3]: for each head the
            gates of the compressed, the selected and the window branch, before the sigmoid
        compress_k.*, compress_v.*: none for "mean", else as the classes in fsa_core.nsa.compression name them

    Raises InputError, a ValueError, for sizes that do not fit and unknown names. Under torch.compile the
    attention itself is a graph break, since what it does depends on the contents of cu_seqlens; projections,
    gates and output are compiled.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_q_heads: int,
        num_kv_heads: int,
        *,
        head_dim: int | None = None,
        config: NSAConfig | None = None,
        compression: str = "mlp",
        rope_theta: float | None = 10000.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        hidden_dim = checked_size("hidden_dim", hidden_dim)
        num_q_heads = checked_size("num_q_heads", num_q_heads)
        num_kv_heads = checked_size("num_kv_heads", num_kv_heads)
        if num_q_heads % num_kv_heads:
            refuse_value("num_q_heads", num_q_heads, f"a multiple of {num_kv_heads} KV heads")
        head_dim = hidden_dim // num_q_heads if head_dim is None else head_dim
        head_dim = checked_size("head_dim", head_dim, MIN_HEAD_DIM, MAX_HEAD_DIM)
        if head_dim % 2 and rope_theta is not None:
            refuse_value("head_dim", head_dim, "an even number, for pairs to rotate")
        if backend not in BACKENDS:
            refuse_value("backend", backend, f"one of {', '.join(BACKENDS)}")
        config = NSAConfig() if config is None else config
        check_config(config)
        self.hidden_dim = hidden_dim
        self.num_q_heads = num_q_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.config = config
        self.rope_theta = _checked_theta(rope_theta)
        self.backend = backend
        self.q_proj = nn.Linear(hidden_dim, num_q_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_dim, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_dim, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_q_heads * head_dim, hidden_dim, bias=False)
        self.gate_proj = nn.Linear(hidden_dim, num_q_heads * 3)
        self.compress_k = self._compression(compression)
        self.compress_v = self._compression(compression)

    def forward(
        self,
        x: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        cache: NSACache | None = None,
    ) -> torch.Tensor:
        """Attend packed tokens to those before them in their sequences.

        Args:
            x: [num_tokens, hidden_dim], the tokens of all sequences, one sequence after the other.
            cu_seqlens: int32 [num_sequences + 1], where each sequence's tokens start; None: one sequence.
                It may lie on the CPU: then reading it does not wait for the GPU.
            cache: what was seen before these tokens, and where they are added: a prompt whole or in chunks,
                and then one or a few tokens of each sequence a call (of some sequences none). A call with a
                cache carries no gradient, and one that raises adds nothing: it may be made again. None: the
                tokens are whole sequences.

        Returns:
            [num_tokens, hidden_dim].

        Raises:
            InputError: x is no [num_tokens, hidden_dim], cu_seqlens break the contract of ``fsa_core.api``,
                or the cache has another number of sequences or holds tokens of a layer of another kind.
            ValueError: the backend is unknown or cannot run on these tensors.
        """
        check_tensor("x", x, "[num_tokens, hidden_dim], sequences packed", 2)
        if x.shape[1] != self.hidden_dim:
            expected = f"{self.hidden_dim}, the layer's hidden_dim"
            refuse("INVALID_HIDDEN_DIM", "x", "width", x.shape[1], expected)
        q = self.q_proj(x).unflatten(-1, (self.num_q_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        gates = self.gate_proj(x).sigmoid().unflatten(-1, (self.num_q_heads, 3))
        if cache is None:
            projected: torch.Tensor = self.o_proj(self._attend(q, k, v, gates, cu_seqlens).flatten(1))
            return projected
        if cu_seqlens is None:
            cu_seqlens = single_sequence(len(x), torch.device("cpu"))
        out, step = self._attend_cached(q, k, v, gates, cu_seqlens, cache)
        projected = self.o_proj(out.flatten(1)).detach()
        _commit(cache, step, k)
        return projected

    @_graph_break
    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gates: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
    ) -> torch.Tensor:
        call = self._call(len(q), cu_seqlens, q.device)
        k_cmp, v_cmp = self.compress_k(k, call.key_starts), self.compress_v(v, call.key_starts)
        turns = self._turns(_positions(call.cu_seqlens_q, len(q)))
        first_keys = _positions(call.cu_seqlens_cmp, len(k_cmp)) * self.config.stride
        q, k, k_cmp = _rotated(q, turns), _rotated(k, turns), _rotated(k_cmp, self._turns(first_keys))
        return attend_checked(call, q, k, v, k_cmp, v_cmp, gates, self.backend)

    def _call(self, num_tokens: int, cu_seqlens: torch.Tensor | None, device: torch.device) -> Call:
        """cu_seqlens are read here and nowhere else: on a GPU that waits for it."""
        if cu_seqlens is None:
            starts = [0, num_tokens]
            cu_seqlens = single_sequence(num_tokens, device)
        else:
            starts = check_starts("cu_seqlens", cu_seqlens, num_tokens)
            cu_seqlens = cu_seqlens.to(device)
        scale = self.head_dim**-0.5
        return Call(self.config, cu_seqlens, cu_seqlens, tuple(starts), scale, DEFAULT_WORKSPACE_BYTES)

    @_graph_break
    @torch.no_grad()
    def _attend_cached(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gates: torch.Tensor,
        cu_seqlens: torch.Tensor,
        cache: NSACache,
    ) -> tuple[torch.Tensor, Step | None]:
        """What the tokens attend to, and the step that they are, which is still to be committed."""
        if not isinstance(cache, NSACache):
            refuse("INVALID_TYPE", "cache", "type", type(cache).__name__, "NSACache")
        # Read once: on a GPU this waits for it.
        starts = check_starts("cu_seqlens", cu_seqlens, len(q))
        if len(starts) - 1 != cache.num_sequences:
            message = f"the cache has {cache.num_sequences} sequences, cu_seqlens {len(starts) - 1}"
            raise InputError("INVALID_CACHE", "cache", message)
        if len(q) == 0:
            return q, None
        step = cache.begin(tuple(starts), k, v, self.config)
        if step.num_windows:
            k_cmp = self.compress_k.at(torch.cat([k, cache.slots.k_raw.flatten(0, 1)]), step.raw_rows)
        turns, window_turns = self._turns_of(step)
        cache.append(step, _rotated(k, turns), v)
        if step.num_windows:
            v_cmp = self.compress_v.at(cache.slots.v.flatten(0, 1), step.value_rows)
            cache.append_windows(step, _rotated(k_cmp, window_turns), v_cmp)
        q = _rotated(q, turns)
        out = attend_slots(cache.slots, step, q, gates, config=self.config, backend=self.backend)
        return out, step

    def _turns(self, position: torch.Tensor) -> Turns | None:
        return None if self.rope_theta is None else turns_at(position, self.head_dim, self.rope_theta)

    def _turns_of(self, step: Step) -> tuple[Turns | None, Turns | None]:
        """Of the step's tokens, and of its windows."""
        if self.rope_theta is None:
            return None, None
        # Those of prompts are too large to keep.
        find = _turns_of.__wrapped__ if step.prompts else _turns_of
        return find(step, self.head_dim, self.rope_theta)

    def _compression(self, kind: str) -> Compression:
        windows = (self.config.kernel_size, self.config.stride)
        match kind:
            case "mean":
                return MeanCompression(*windows)
            case "weighted":
                return WeightedCompression(*windows, self.num_kv_heads)
            case "linear":
                return LinearCompression(*windows, self.num_kv_heads, self.head_dim)
            case "mlp":
                return MLPCompression(*windows, self.num_kv_heads, self.head_dim)
        refuse_value("compression", kind, f"one of {', '.join(COMPRESSIONS)}")


@_graph_break
@torch.no_grad()
def _commit(cache: NSACache, step: Step | None, k_raw: torch.Tensor) -> None:
    if step is not None:
        cache.commit(step, k_raw)


# All layers of a model ask for the same, one after the other.
@lru_cache(maxsize=1)
def _turns_of(step: Step, head_dim: int, theta: float) -> tuple[Turns, Turns]:
    num_tokens = len(step.key_row)
    cos, sin = turns_at(step.positions, head_dim, theta)
    return (cos[:num_tokens], sin[:num_tokens]), (cos[num_tokens:], sin[num_tokens:])


def _checked_theta(theta: float | None) -> float | None:
    if theta is None:
        return None
    if not isinstance(theta, Real) or isinstance(theta, bool) or not 1 <= as_float(theta) < math.inf:
        refuse_value("rope_theta", theta, "a finite number of at least 1, or None")
    return float(theta)


def _positions(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """int64 [num_tokens]: the place of each packed token in its sequence."""
    if len(cu_seqlens) == 2:
        return torch.arange(num_tokens, device=cu_seqlens.device)
    return place_queries(cu_seqlens, cu_seqlens, num_tokens, causal=True).position


def _rotated(x: torch.Tensor, turns: Turns | None) -> torch.Tensor:
    return x if turns is None else turn(x, turns)
