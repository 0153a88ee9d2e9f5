"""Public implementations to measure beside ours, read from a folder of their checkouts.

    PEERS/fsa_ref   Relaxed-System-Lab/Flash-Sparse-Attention (FSA, and a copy of the NSA Triton kernels)
    PEERS/sfnsa     mdy666/Scalable-Flash-Native-Sparse-Attention

On Triton 3.6 the FSA reference compiles only after the tuple in fsa/ops/FSA_topk_sparse_attention.py,
``lse_ptrs = (lse_ptr + ...,)``, is made a plain sum.
"""

import sys
import types
from pathlib import Path

from benchmarks.cases import Stage
from benchmarks.contenders import Prepare, Run
from benchmarks.inputs import Inputs


def import_from(folder: Path) -> None:
    """Makes the peers importable from their checkouts. Raises FileNotFoundError when one is missing."""
    fsa, sfnsa = (folder.resolve() / name for name in ("fsa_ref", "sfnsa"))
    for checkout in (fsa, sfnsa):
        if not checkout.is_dir():
            raise FileNotFoundError(f"{checkout} is not there; benchmarks/peers.py says what belongs in it")
    if str(fsa) not in sys.path:
        sys.path.insert(0, str(fsa))
    # SFNSA's own __init__ imports flash_attn for the window branch, which selected attention does not need.
    package = types.ModuleType("flash_nsa")
    package.__path__ = [str(sfnsa / "flash_nsa")]
    sys.modules.setdefault("flash_nsa", package)
    if "pkg_resources" not in sys.modules:
        from packaging.version import parse

        sys.modules["pkg_resources"] = types.ModuleType("pkg_resources")
        sys.modules["pkg_resources"].parse_version = parse


def _fsa(x: Inputs, stage: Stage) -> Run:
    from fsa.ops.FSA_topk_sparse_attention import (
        _topk_sparse_attention_bwd_opt as backward,
    )
    from fsa.ops.FSA_topk_sparse_attention import (
        _topk_sparse_attention_fwd_opt as forward,
    )

    arguments = _arguments(x)
    if stage == "forward":
        return lambda: (forward(*arguments, causal=True)[0],)
    out, lse, permuted = forward(*arguments, causal=True)
    return lambda: backward(out, x.grad_out, lse, *arguments, permuted)


def _nsa(x: Inputs, stage: Stage) -> Run:
    from nsa_ref.ops.topk_sparse_attention import _topk_sparse_attention_bwd as backward
    from nsa_ref.ops.topk_sparse_attention import _topk_sparse_attention_fwd as forward

    arguments = _arguments(x)
    if stage == "forward":
        return lambda: (forward(*arguments)[0],)
    out, lse = forward(*arguments)
    return lambda: backward(out, x.grad_out, lse, *arguments)


def _arguments(x: Inputs) -> tuple[object, ...]:
    lengths = (x.cu_seqlens, x.cu_seqlens, x.num_tokens, x.num_tokens)
    return (x.q, x.k, x.v, x.block_indices, x.block_size, *lengths, x.softmax_scale)


def _sfnsa(x: Inputs, stage: Stage) -> Run:
    from flash_nsa.ops.select_attn import slc_attn_bwd, slc_attn_fwd
    from flash_nsa.utils import NSAHelper

    NSAHelper.set_hyperparameters(block_size=x.block_size, top_n=x.block_indices.shape[2])
    # It keeps what it derived from equal cu_seqlens, even if the block size was another.
    NSAHelper.x_cu_seqlens = None
    NSAHelper.init_cu_seqlens(x.cu_seqlens)
    # Its kernels take -1 for a block before the first; one after the last is masked.
    ids = x.block_indices.masked_fill(x.block_indices < 0, x.num_blocks)
    if stage == "forward":
        return lambda: (slc_attn_fwd(x.q, x.k, x.v, ids, x.softmax_scale)[0],)
    out, lse = slc_attn_fwd(x.q, x.k, x.v, ids, x.softmax_scale)
    # Without repeated gradients, as its own autograd function has it.
    return lambda: slc_attn_bwd(
        x.q, x.k, x.v, ids, out, lse, x.grad_out, sm_scale=x.softmax_scale, dkdv_repeat=False
    )


PEERS: dict[str, Prepare] = {"fsa": _fsa, "nsa": _nsa, "sfnsa": _sfnsa}
