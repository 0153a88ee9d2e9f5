"""The operator's stages by the peers of benchmarks/peers.py; without a window none needs flash_attn.

The FSA reference and NSA Triton share compression, compressed attention and selection. FSA's own layer
attends with NSA Triton's kernel from groups of 9 heads on; here it is always FSA's.
"""

from collections.abc import Callable

import torch

from benchmarks.cases import Case, Stage
from benchmarks.contenders import Answer, Run
from benchmarks.inputs import Inputs
from benchmarks.operator_contenders import Attend, Stages, StagesOf, layer_by_layer, pages_of
from fsa_core.nsa.config import NSAConfig


def _fsa(x: Inputs, config: NSAConfig) -> Stages:
    from fsa.ops.FSA_topk_sparse_attention import FSA_topk_sparse_attention

    compress, select, _ = _nsa(x, config)
    return compress, select, _attend_by(FSA_topk_sparse_attention, x, config)


def _nsa(x: Inputs, config: NSAConfig) -> Stages:
    from nsa_ref.ops.compressed_attention import compressed_attention
    from nsa_ref.ops.topk_sparse_attention import topk_sparse_attention
    from nsa_ref.ops.weighted_pool import avgpool_compress

    windows = (config.kernel_size, config.stride)
    num_windows = (x.num_tokens - config.kernel_size) // config.stride + 1
    cu_seqlens_cmp = torch.tensor([0, num_windows], dtype=torch.int32, device=x.q.device)
    lengths = (x.cu_seqlens, cu_seqlens_cmp, x.num_tokens, num_windows)
    forced = (config.num_first_blocks, config.num_local_blocks)

    def select(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Answer:
        sizes = (*windows, config.block_size, config.top_k)
        return compressed_attention(q, k, v, *sizes, *lengths, x.softmax_scale, *forced)

    return (
        lambda t: avgpool_compress(t, None, x.cu_seqlens, *windows)[0],
        select,
        _attend_by(topk_sparse_attention, x, config),
    )


def _attend_by(attention: Callable[..., torch.Tensor], x: Inputs, config: NSAConfig) -> Attend:
    return lambda q, k, v, ids: attention(q, k, v, ids, config.block_size, x.cu_seqlens, x.softmax_scale)


def _sfnsa(x: Inputs, config: NSAConfig) -> Stages:
    from flash_nsa.ops.compress_attn import compress_attn
    from flash_nsa.ops.compress_kv import mean_pooling
    from flash_nsa.ops.select_attn import select_attn
    from flash_nsa.ops.topk import slc_topk_indices
    from flash_nsa.utils import NSAHelper

    NSAHelper.set_hyperparameters(block_size=config.block_size, top_n=config.top_k)
    # It keeps what it derived from equal cu_seqlens, even if the block size was another.
    NSAHelper.x_cu_seqlens = None
    NSAHelper.init_cu_seqlens(x.cu_seqlens)

    def select(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Answer:
        out, lse = compress_attn(q, k, v, x.softmax_scale)
        # As its own layer calls it.
        ids, _ = slc_topk_indices(
            q, k, lse, sm_scale=x.softmax_scale, maybe_efficient_version=True, scale_slc_p=True
        )
        return out, ids

    return mean_pooling, select, lambda q, k, v, ids: select_attn(q, k, v, ids, x.softmax_scale)


def _sfnsa_decoding(case: Case, x: Inputs, stage: Stage) -> Run:
    from flash_nsa.inference.select_attn import slc_attn_decode

    # Its pages are as large as blocks, too.
    k_cache, v_cache = (t.view(-1, case.block_size, *t.shape[1:]) for t in (x.k, x.v))
    table = pages_of(case, x)
    lengths = torch.full((case.batch,), case.num_tokens, dtype=torch.int32, device=x.q.device)

    def attend(ids: torch.Tensor) -> torch.Tensor:
        caches = (k_cache, v_cache, ids, table, lengths)
        sizes = {"block_size": case.block_size, "top_n": case.num_slots, "sm_scale": x.softmax_scale}
        return slc_attn_decode(x.q, *caches, **sizes)[0]

    return layer_by_layer(attend, case, x)


STAGES_OF_PEERS: dict[str, StagesOf] = {"fsa": _fsa, "nsa": _nsa, "sfnsa": _sfnsa}
DECODING_PEERS: dict[str, Callable[[Case, Inputs, Stage], Run]] = {"sfnsa": _sfnsa_decoding}
