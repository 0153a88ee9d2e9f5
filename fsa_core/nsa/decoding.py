"""The operator over a cache: the new tokens of all sequences attend to what their slots hold.

By kernels, a fixed number of launches whatever the number of sequences, and some for each prompt among them;
sequences in slots are packed sequences with gaps between them. In torch operations one sequence after the
other, each slot being one contiguous tensor.
"""

from itertools import accumulate, pairwise

import torch

from fsa_core.api import resolve_backend, selected_attention
from fsa_core.decode import paged_selected_attention
from fsa_core.nsa.cache import Slots
from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.functional import nsa_attention_from_compressed
from fsa_core.nsa.selection import spend_budget
from fsa_core.nsa.stages import MAX_REACH, add_branches
from fsa_core.nsa.steps import Step
from fsa_core.nsa.validation import Call
from fsa_core.plan import DEFAULT_WORKSPACE_BYTES
from fsa_core.problem import Problem
from fsa_core.validation import validate_dense


def attend_slots(
    slots: Slots, step: Step, q: torch.Tensor, gates: torch.Tensor, *, config: NSAConfig, backend: str
) -> torch.Tensor:
    """``nsa_attention`` of the step's tokens, at least one, which are in the slots already.

    q: [num_tokens, num_q_heads, head_dim], rotated; gates: [num_tokens, num_q_heads, 3]. Returns [num_tokens,
    num_q_heads, head_dim] in q's dtype. No gradients. Raises as ``nsa_attention`` does.
    """
    if resolve_backend(backend, q.device) == "triton":
        problem = validate_dense(
            q,
            slots.k.flatten(0, 1),
            slots.v.flatten(0, 1),
            cu_seqlens_q=step.cu_seqlens_q,
            cu_seqlens_k=step.cu_seqlens_k,
            softmax_scale=None,
            causal=True,
            check_values=False,
        )
        branches = _branches(slots, step, problem, q, config)
        if branches is not None:
            return add_branches(branches, gates, "auto")
    return _one_by_one(slots, step, q, gates, config=config, backend=backend)


def _branches(
    slots: Slots, step: Step, problem: Problem, q: torch.Tensor, config: NSAConfig
) -> tuple[torch.Tensor, ...] | None:
    """Compressed, selected and sliding-window attention by kernels; None where selection has none."""
    from fsa_core.kernels.compressed import compressed_attention_forward, window_attention_forward
    from fsa_core.kernels.selection import Blocks, select_blocks_forward, takes
    from fsa_core.kernels.windows import Windows

    starts = (step.cu_seqlens_q, step.cu_seqlens_k)
    windows = Windows(config.kernel_size, config.stride, *starts, slots.window_starts)
    blocks = Blocks(config.block_size, config.top_k, config.num_first_blocks, config.num_local_blocks)
    if not takes(problem, windows, blocks):
        return None
    k, v, k_cmp, v_cmp = (x.flatten(0, 1) for x in (slots.k, slots.v, slots.k_cmp, slots.v_cmp))
    compressed, _, shares = compressed_attention_forward(problem, windows, q, k_cmp, v_cmp)
    selection = select_blocks_forward(
        problem, windows, blocks, q, k_cmp, shares, with_importance=config.has_budget
    )
    block_indices = selection.ids
    if selection.importance is not None and selection.total is not None:
        key_starts = tuple(accumulate(step.lengths, initial=0))
        call = Call(config, *starts, key_starts, problem.softmax_scale, DEFAULT_WORKSPACE_BYTES)
        block_indices = spend_budget(call, block_indices, selection.importance, selection.total)
    selected = _selected(slots, step, q, block_indices, config.block_size)
    keys = Windows(1, 1, *starts, slots.key_starts, reach=min(config.window, MAX_REACH))
    window, _ = window_attention_forward(problem, keys, q, k, v)
    return compressed, selected, window


def _selected(
    slots: Slots, step: Step, q: torch.Tensor, block_indices: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Selected attention: of prompts one by one, of all other tokens at once, a slot being a run of pages."""
    if not step.prompts:
        return _decoded(slots, step, q, block_indices, block_size)
    out = q.new_empty(*q.shape[:2], slots.v.shape[-1])
    if step.num_decoded:
        tokens = step.decoded
        out[tokens] = _decoded(slots, step, q[tokens], block_indices[:, tokens], block_size)
    for prompt in step.prompts:
        keys, rows = (prompt.sequence, slice(prompt.length)), slice(prompt.start, prompt.end)
        out[rows], _ = selected_attention(
            q[rows],
            slots.k[keys],
            slots.v[keys],
            block_indices[:, rows],
            block_size=block_size,
            backend="triton",
            # The ids are right by construction.
            validate=False,
        )
    return out


def _decoded(
    slots: Slots, step: Step, q: torch.Tensor, block_indices: torch.Tensor, block_size: int
) -> torch.Tensor:
    k_pages, v_pages = (x.flatten(0, 1).unflatten(0, (-1, block_size)) for x in (slots.k, slots.v))
    out, _ = paged_selected_attention(
        q,
        k_pages,
        v_pages,
        slots.page_table,
        block_indices,
        step.seq_lens,
        block_size=block_size,
        cu_seqlens_q=None if step.is_token_each else step.cu_seqlens_decoded,
        backend="triton",
        validate=False,
    )
    return out


def _one_by_one(
    slots: Slots, step: Step, q: torch.Tensor, gates: torch.Tensor, *, config: NSAConfig, backend: str
) -> torch.Tensor:
    parts = []
    for sequence, (start, end) in enumerate(pairwise(step.starts)):
        num_keys = step.lengths[sequence]
        num_windows = max(num_keys - config.kernel_size + config.stride, 0) // config.stride
        parts.append(
            nsa_attention_from_compressed(
                q[start:end],
                slots.k[sequence, :num_keys],
                slots.v[sequence, :num_keys],
                slots.k_cmp[sequence, :num_windows],
                slots.v_cmp[sequence, :num_windows],
                gates[start:end],
                config=config,
                backend=backend,
            )
        )
    return torch.cat(parts)
