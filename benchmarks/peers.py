"""Public implementations to measure beside ours, read from a folder of their checkouts.

    PEERS/fsa_ref   Relaxed-System-Lab/Flash-Sparse-Attention (FSA, and a copy of the NSA Triton kernels)
    PEERS/sfnsa     mdy666/Scalable-Flash-Native-Sparse-Attention

On Triton 3.6 the FSA reference compiles only after the tuple in fsa/ops/FSA_topk_sparse_attention.py,
``lse_ptrs = (lse_ptr + ...,)``, is made a plain sum.
"""

import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import Inputs

Run = Callable[[], torch.Tensor]


def sparse_peers(folder: Path) -> dict[str, Callable[[Inputs], Run]]:
    """By name: what turns inputs into a call that returns out [tokens, heads, dim]."""
    sys.path[:0] = [str(folder / "fsa_ref"), str(folder / "sfnsa")]
    return {"fsa": _fsa, "nsa": _nsa, "sfnsa": _sfnsa}


def dense_cudnn(x: Inputs) -> Run:
    """Dense causal attention: what a user would run instead. Computes more than the sparse pattern."""
    q, k, v = (
        t.transpose(0, 1)[None]
        for t in (x.q, x.k.repeat_interleave(x.group_size, 1), x.v.repeat_interleave(x.group_size, 1))
    )

    def run() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out[0].transpose(0, 1)

    return run


def _fsa(x: Inputs) -> Run:
    from fsa.ops.FSA_topk_sparse_attention import _topk_sparse_attention_fwd_opt as forward

    return lambda: forward(*_arguments(x), causal=True)[0]


def _nsa(x: Inputs) -> Run:
    from nsa_ref.ops.topk_sparse_attention import _topk_sparse_attention_fwd as forward

    return lambda: forward(*_arguments(x))[0]


def _arguments(x: Inputs) -> tuple[object, ...]:
    lengths = (x.cu_seqlens, x.cu_seqlens, x.q.shape[0], x.q.shape[0])
    return (x.q, x.k, x.v, x.block_indices, x.block_size, *lengths, x.softmax_scale)


def _sfnsa(x: Inputs) -> Run:
    # Its package imports flash_attn for the window branch, which selected attention does not need.
    package = types.ModuleType("flash_nsa")
    package.__path__ = [str(Path(next(p for p in sys.path if p.endswith("sfnsa"))) / "flash_nsa")]
    sys.modules.setdefault("flash_nsa", package)
    if "pkg_resources" not in sys.modules:
        from packaging.version import parse

        sys.modules["pkg_resources"] = types.ModuleType("pkg_resources")
        sys.modules["pkg_resources"].parse_version = parse
    from flash_nsa.ops.select_attn import slc_attn_fwd
    from flash_nsa.utils import NSAHelper

    NSAHelper.set_hyperparameters(block_size=x.block_size, top_n=x.block_indices.shape[2])
    NSAHelper.init_cu_seqlens(x.cu_seqlens)
    return lambda: slc_attn_fwd(x.q, x.k, x.v, x.block_indices, x.softmax_scale)[0]
