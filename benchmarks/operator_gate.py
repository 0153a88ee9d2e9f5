"""The correctness gate of the operator's parts: float64 on sampled tokens, for the blocks that were chosen.

Near ties may be decided either way, so a choice is measured by its importance in float64, beside that of the
best blocks of the same token. Attention to the chosen blocks is then exact, and so are its gradients: those
of the last block of keys come from the tokens of that block and no others.
"""

import torch

from benchmarks.cases import Case
from benchmarks.gate import Sample, worst_error
from benchmarks.inputs import Inputs
from fsa_core.nsa.config import NSAConfig

RANDOM_TOKENS = 6
Attended = tuple[torch.Tensor, torch.Tensor]


def config_of(case: Case) -> NSAConfig:
    """The paper's sizes but for what the case says."""
    return NSAConfig(block_size=case.block_size, top_k=case.num_slots)


def operator_error(case: Case, x: Inputs, answer: tuple[torch.Tensor, ...]) -> float:
    """The worst of: a row's relative error, and the share of importance that a row's choice misses.

    answer: (out, ids) or (dq, dk, dv, ids), ids [kv heads, tokens, slots]; no visible block: unused.
    """
    *parts, ids = answer
    if case.part == "decode":
        return max(_decode_error(case, x, parts[0], row) for row in {0, case.batch // 2, case.batch - 1})
    tokens = _sampled_tokens(case, x)
    leaves = tuple(t.double().requires_grad_(case.stage == "backward") for t in (x.q[tokens], x.k, x.v))
    chosen = _blocks_mask(ids[:, tokens], x.num_blocks, tokens // x.block_size)
    out, importance = _operator(case, x, leaves, tokens, chosen)
    if case.stage == "forward":
        samples = [_sample(0, tokens, out)]
    else:
        grads = torch.autograd.grad(out, leaves, x.grad_out[tokens].double())
        last = torch.arange((x.num_blocks - 1) * x.block_size, x.num_tokens, device=x.q.device)
        samples = [_sample(0, tokens, grads[0])]
        samples += [_sample(number, last, grads[number][last]) for number in (1, 2)]
    missed = _missed_importance(case, importance.detach(), chosen, tokens // x.block_size)
    return max(worst_error(tuple(parts), samples), missed)


def _operator(
    case: Case, x: Inputs, qkv: tuple[torch.Tensor, ...], tokens: torch.Tensor, chosen: torch.Tensor
) -> Attended:
    """out float64 of the case's part at ``tokens``, importance [kv heads, tokens, blocks]."""
    q, k, v = qkv
    config, device = config_of(case), x.q.device
    k_cmp, v_cmp = (t.unfold(0, config.kernel_size, config.stride).mean(-1) for t in (k, v))
    first_key = torch.arange(len(k_cmp), device=device) * config.stride
    seen = first_key + config.kernel_size - 1 <= tokens[:, None]
    out, weights = _attended(q, k_cmp, v_cmp, seen[None], x.softmax_scale)
    importance = weights.sum(2) @ _shared_strides(first_key, x.num_blocks, config)
    if case.part == "selection":
        return out, importance
    key = torch.arange(x.num_tokens, device=device)
    past = key <= tokens[:, None]
    selected, _ = _attended(q, k, v, chosen[..., key // x.block_size] & past, x.softmax_scale)
    out = out + selected
    if case.part == "windowed":
        near = past & (key > tokens[:, None] - config.window)
        out = out + _attended(q, k, v, near[None], x.softmax_scale)[0]
    return out, importance


def _attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float
) -> Attended:
    """out [tokens, q heads, dim], weights [heads, tokens, group, keys]; visible [1 | heads, tokens, keys]."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("thgd,shd->htgs", grouped, k) * scale
    weights = scores.masked_fill(~visible[:, :, None], -torch.inf).softmax(-1)
    return torch.einsum("htgs,shd->thgd", weights, v).flatten(1, 2), weights


def _shared_strides(first_key: torch.Tensor, num_blocks: int, config: NSAConfig) -> torch.Tensor:
    """float64 [windows, blocks]: how many strides they share (the paper's equation 9)."""
    first = first_key[:, None]
    start = torch.arange(num_blocks, device=first_key.device) * config.block_size
    end = (start + config.block_size).minimum(first + config.kernel_size)
    return (end - start.maximum(first)).clamp(min=0).double() / config.stride


def _missed_importance(
    case: Case, importance: torch.Tensor, chosen: torch.Tensor, own: torch.Tensor
) -> float:
    config = config_of(case)
    block = torch.arange(importance.shape[-1], device=own.device)
    forced = (block < config.num_first_blocks) | (block > own[:, None] - config.num_local_blocks)
    # Importance of a group's heads is at most twice their number, each key lying in two windows.
    rank = importance + forced * 4.0 * case.group_size
    rank = rank.masked_fill(block > own[:, None], 0.0)
    best = rank.topk(min(case.num_slots, len(block)), dim=-1).values.sum(-1)
    return (1 - (rank * chosen).sum(-1) / best).max().item()


def _blocks_mask(ids: torch.Tensor, num_blocks: int, own: torch.Tensor) -> torch.Tensor:
    """bool [kv heads, tokens, blocks] of ids [kv heads, tokens, slots], unused ones left out."""
    ids = ids.long()
    used = (ids >= 0) & (ids <= own[:, None])
    mask = torch.zeros(*ids.shape[:2], num_blocks + 1, dtype=torch.bool, device=ids.device)
    return mask.scatter_(2, ids.where(used, num_blocks), True)[..., :-1]


def _sampled_tokens(case: Case, x: Inputs) -> torch.Tensor:
    """Some that see a window, and the last block's: all of them, or for the forward stage its last."""
    generator = torch.Generator().manual_seed(case.num_tokens)
    least, last_block = config_of(case).kernel_size - 1, (x.num_blocks - 1) * x.block_size
    drawn = torch.randint(least, last_block, (RANDOM_TOKENS,), generator=generator).tolist()
    last = range(last_block, x.num_tokens) if case.stage == "backward" else [x.num_tokens - 1]
    return torch.tensor(sorted({least, *drawn, *last}), device=x.q.device)


def _sample(number: int, rows: torch.Tensor, values: torch.Tensor) -> Sample:
    heads = torch.arange(values.shape[1], device=values.device)
    return Sample(number, rows, heads, values.detach(), values.detach().norm(dim=-1))


def _decode_error(case: Case, x: Inputs, out: torch.Tensor, row: int) -> float:
    """Of one sequence's token."""
    keys = slice(row * case.num_tokens, (row + 1) * case.num_tokens)
    own = torch.tensor([case.num_tokens // case.block_size - 1], device=x.q.device)
    chosen = _blocks_mask(x.block_indices[:, row : row + 1], int(own) + 1, own)
    visible = chosen.repeat_interleave(case.block_size, dim=2)
    q, k, v = (t.double() for t in (x.q[row : row + 1], x.k[keys], x.v[keys]))
    truth = _attended(q, k, v, visible, x.softmax_scale)[0]
    return worst_error((out,), [_sample(0, torch.tensor([row], device=x.q.device), truth)])
