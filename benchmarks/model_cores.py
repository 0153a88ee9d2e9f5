"""The attention of a layer, one implementation beside the other.

All sparse ones are the whole operator with all three branches. Compression (means of the rotated keys and of
the values), the sliding window and the gated sum are ours for all: the peers take their window from
flash_attn. Compressed attention, scores, top-k and selected attention are each one's own, by the calls that
its own nn.Module makes. The FSA reference has selected attention of its own alone (groups of up to 8 heads;
beyond, it falls back on NSA's); the rest is what it takes from NSA.

The importance of a block is defined alike in all of them. The peers round it to bfloat16 before their top-k,
so what is selected differs where blocks are nearly equal.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.model_layer import Core
from fsa_core.nsa.compression import MeanCompression, compressed_cu_seqlens
from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.functional import gated_sum, nsa_attention, sliding_window_attention

MOST_HEADS_OF_FSA = 8


def cores_of(config: NSAConfig, device: torch.device, peers: Path | None) -> dict[str, Core]:
    """Ours first. Raises FileNotFoundError when a peer is missing."""
    cores = {"ours": _ours(config)}
    if device.type == "cpu":
        return cores | {"dense causal": _dense_causal}
    if peers is not None:
        from benchmarks.peers import import_from

        import_from(peers)
        cores |= {"fsa": _peer(config, _fsa_selected), "nsa": _peer(config, _nsa_selected)}
    return cores | {"dense cuDNN": _dense_cudnn}


def _ours(config: NSAConfig) -> Core:
    mean = MeanCompression(config.kernel_size, config.stride)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return nsa_attention(q, k, v, gates, mean, mean, config=config)

    return attend


def _peer(config: NSAConfig, selected_attention: Callable[..., torch.Tensor]) -> Core:
    mean = MeanCompression(config.kernel_size, config.stride)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        from nsa_ref.ops import compressed_attention

        cu_seqlens = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
        k_cmp, v_cmp = mean(k, cu_seqlens).contiguous(), mean(v, cu_seqlens).contiguous()
        compressed, block_indices = compressed_attention(
            q,
            k_cmp,
            v_cmp,
            config.kernel_size,
            config.stride,
            config.block_size,
            config.top_k,
            cu_seqlens,
            compressed_cu_seqlens(cu_seqlens, config.kernel_size, config.stride),
            len(q),
            len(k_cmp),
            None,
            config.num_first_blocks,
            config.num_local_blocks,
            parallel_topk_compute=False,
        )
        selected = selected_attention(q, k, v, block_indices, config.block_size, cu_seqlens, None)
        window, _ = sliding_window_attention(q, k, v, config=config)
        return gated_sum((compressed, selected, window), gates)

    return attend


def _fsa_selected(q: torch.Tensor, k: torch.Tensor, *others: object) -> torch.Tensor:
    from fsa.ops import FSA_topk_sparse_attention

    if q.shape[1] > MOST_HEADS_OF_FSA * k.shape[1]:
        return _nsa_selected(q, k, *others)
    return FSA_topk_sparse_attention(q, k, *others)


def _nsa_selected(*operands: object) -> torch.Tensor:
    from nsa_ref.ops import topk_sparse_attention

    return topk_sparse_attention(*operands)


def _dense_cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """With K and V repeated for their query heads, inside the timer."""
    group_size = q.shape[1] // k.shape[1]
    q, k, v = (t.transpose(0, 1)[None] for t in (q, *(t.repeat_interleave(group_size, 1) for t in (k, v))))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)


def _dense_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def worst_error(
    out: torch.Tensor, operands: tuple[torch.Tensor, ...], config: NSAConfig, *, dense: bool
) -> float:
    """The largest relative error of a row, against float64, of the first top_k * block_size tokens.

    These select every block, so that the operator is defined without a choice: what is near a tie cannot
    differ. ``out`` and ``operands`` are of the whole length. Rows near zero are measured by the median row.
    """
    q, k, v, gates = (t[: config.top_k * config.block_size].double() for t in operands)
    truth = _softmax(q, k, v, _seen_keys(q, len(k))) if dense else _truth(q, k, v, gates, config)
    got = out[: len(q)].double()
    sizes = truth.norm(dim=-1)
    return ((got - truth).norm(dim=-1) / sizes.maximum(sizes.median())).max().item()


def _truth(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: torch.Tensor, config: NSAConfig
) -> torch.Tensor:
    k_cmp, v_cmp = (t.unfold(0, config.kernel_size, config.stride).mean(-1) for t in (k, v))
    query = torch.arange(len(q), device=q.device)[:, None]
    last_keys = torch.arange(len(k_cmp), device=q.device) * config.stride + config.kernel_size - 1
    causal = _seen_keys(q, len(k))
    window = causal & (torch.arange(len(k), device=q.device) > query - config.window)
    branches = (
        _softmax(q, k_cmp, v_cmp, last_keys <= query),
        _softmax(q, k, v, causal),
        _softmax(q, k, v, window),
    )
    return sum(gates[..., i, None] * branch for i, branch in enumerate(branches))


def _seen_keys(q: torch.Tensor, num_keys: int) -> torch.Tensor:
    return torch.ones(len(q), num_keys, dtype=torch.bool, device=q.device).tril()


def _softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    group_size = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group_size, 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
    # A token that sees nothing gives zeros.
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, v)
