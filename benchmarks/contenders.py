"""What is measured beside what: ours, dense attention, and the peers that were fetched."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import MOST_PEER_TOKENS, Case, Stage
from benchmarks.gate import Reach
from benchmarks.inputs import Inputs
from fsa_core.api import selected_attention

Answer = tuple[torch.Tensor, ...]
# Gives (out,) [tokens, q heads, value dim], or (dq, dk, dv).
Run = Callable[[], Answer]
# Does what comes before the timer (a layout of its own, the backward stage's forward pass), gives the call.
Prepare = Callable[[Inputs, Stage], Run]

# Sound bfloat16 answers lie within 8e-3 of the truth, row by row; a block left out costs a tenth and more.
OUR_TOLERANCE = 2e-2
# Some peers round more often; what is compared is time, so a sound answer is enough.
PEER_TOLERANCE = 3e-2


def _as_it_is(answer: Answer) -> Answer:
    return answer


@dataclass(frozen=True, slots=True)
class Contender:
    """An implementation; what it attends by its ``reach`` is what it is checked against.

    ``settle`` brings an answer into the form that the gate checks, outside the timer.
    """

    name: str
    prepare: Prepare
    tolerance: float = PEER_TOLERANCE
    reach: Reach = "selected"
    settle: Callable[[Answer], Answer] = _as_it_is


def contenders_of(case: Case, device: torch.device, peers: Path | None) -> list[Contender]:
    """Ours first."""
    if case.stage == "index":
        # It imports triton's kernels, which the other stages reach through the public function.
        from benchmarks.inversion import prepare_inversion, segments_of_pairs

        return [Contender("ours", prepare_inversion, tolerance=0.0, settle=segments_of_pairs)]
    if case.part != "selected":
        return _of_operator(case, device, peers)
    ours = Contender("ours", prepare_ours, OUR_TOLERANCE, settle=_without_lse)
    if case.clock == "host" or case.num_tokens > MOST_PEER_TOKENS:
        return [ours]
    if device.type == "cpu":
        masked = Contender("dense masked", prepare_dense_masked)
        causal = Contender("dense causal", prepare_dense_causal, reach="causal")
        return [ours, masked, causal, *_of_pieces(case, {"torch": prepare_pieces_cpu})]
    sparse = []
    if peers is not None:
        from benchmarks.peers import PEERS, import_from

        import_from(peers)
        sparse = [Contender(name, prepare) for name, prepare in PEERS.items()]
    dense = [Contender("dense cuDNN", prepare_dense_cudnn, reach="causal")]
    if case.query_block_size > 1:
        dense.append(Contender("dense FlashAttention", prepare_dense_flash, reach="causal"))
    pieces = _of_pieces(case, {"cuDNN": prepare_pieces_cudnn, "FlashAttention": prepare_pieces_flash})
    return [ours, *sparse, *dense, *pieces]


def _of_pieces(case: Case, prepares: dict[str, Prepare]) -> list[Contender]:
    """Beside rows that queries share; none where the sequence ends in a shorter piece."""
    if case.query_block_size == 1 or case.num_tokens % case.keys_of_row:
        return []
    return [
        Contender(f"{name} at as many keys", prepare, reach="piece", settle=_joined)
        for name, prepare in prepares.items()
    ]


def _of_operator(case: Case, device: torch.device, peers: Path | None) -> list[Contender]:
    from benchmarks.operator_contenders import operator_contenders

    is_compared = case.num_tokens <= MOST_PEER_TOKENS
    with_peers = is_compared and peers is not None and device.type == "cuda"
    if with_peers:
        from benchmarks.peers import import_from

        import_from(peers)
    found = operator_contenders(case, with_peers=with_peers)
    if case.part in ("operator", "windowed") and is_compared:
        on_gpu = device.type == "cuda"
        name, prepare = ("cuDNN", prepare_dense_cudnn) if on_gpu else ("causal", prepare_dense_causal)
        found.append(Contender(f"dense {name}", prepare, reach="causal"))
    return found


def prepare_ours(x: Inputs, stage: Stage) -> Run:
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Answer:
        return selected_attention(
            q,
            k,
            v,
            x.rows,
            block_size=x.block_size,
            softmax_scale=x.softmax_scale,
            query_block_size=x.query_block_size,
            validate=False,
        )

    if stage == "forward":
        # With lse, which is an answer, not memory that the call needs besides.
        return lambda: forward(x.q, x.k, x.v)
    return _by_autograd(lambda *qkv: forward(*qkv)[0], (x.q, x.k, x.v), x.grad_out, stage)


def _without_lse(answer: Answer) -> Answer:
    """The output of (out, lse); gradients as they are."""
    return answer[:1] if len(answer) == 2 else answer


def _prepare_dense(x: Inputs, stage: Stage, *, backend: SDPBackend) -> Run:
    """Dense causal attention of torch's on a GPU: what a user would run instead."""
    return _unbatched(_prepare_by(backend, x, stage, x.num_tokens, is_causal=True))


def _prepare_pieces(x: Inputs, stage: Stage, *, backend: SDPBackend | list[SDPBackend]) -> Run:
    """Each token attends all of its piece of the sequence: as many keys as a row of indices has room for.

    The answer is [pieces, heads, tokens, dim]: to join it copies, which is no part of the time.
    """
    return _prepare_by(backend, x, stage, x.keys_of_row, is_causal=False)


def _prepare_by(
    backend: SDPBackend | list[SDPBackend], x: Inputs, stage: Stage, length: int, *, is_causal: bool
) -> Run:
    """torch's attention of sequences of ``length`` tokens, [sequences, heads, length, dim].

    K and V are repeated for their query heads before the timer; the backward pass adds their gradients up.
    """
    q, k, v, grad_out = (_heads_first(t, length) for t in (x.q, x.k, x.v, x.grad_out))
    if stage == "forward":
        k, v = (t.repeat_interleave(x.group_size, 1) for t in (k, v))

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if k.shape[1] < q.shape[1]:
            k, v = (t.repeat_interleave(x.group_size, 1) for t in (k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=x.softmax_scale)

    return _by_autograd(forward, (q, k, v), grad_out, stage)


prepare_dense_cudnn = partial(_prepare_dense, backend=SDPBackend.CUDNN_ATTENTION)
prepare_dense_flash = partial(_prepare_dense, backend=SDPBackend.FLASH_ATTENTION)
prepare_pieces_cudnn = partial(_prepare_pieces, backend=SDPBackend.CUDNN_ATTENTION)
prepare_pieces_flash = partial(_prepare_pieces, backend=SDPBackend.FLASH_ATTENTION)
# torch's kernel for a CPU wants values as wide as keys; of others it takes plain operations.
prepare_pieces_cpu = partial(_prepare_pieces, backend=[SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])


def prepare_dense_causal(x: Inputs, stage: Stage) -> Run:
    """torch's attention of a CPU, every key up to the token's own."""
    q, k, v = _batched(x)

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=x.softmax_scale, enable_gqa=True)

    return _unbatched(_by_autograd(forward, (q, k, v), _heads_first(x.grad_out), stage))


def prepare_dense_masked(x: Inputs, stage: Stage) -> Run:
    """torch's attention with the selection as a mask: the same answer, without a kernel for it."""
    q, k, v = _batched(x)
    masks = [_mask(x, kv_head) for kv_head in range(x.k.shape[1])]

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # One KV head at a time: torch makes a float of every element of a mask.
        heads = zip(q.split(x.group_size, 1), k.split(1, 1), v.split(1, 1), masks, strict=True)
        return torch.cat(
            [
                F.scaled_dot_product_attention(*qkv, attn_mask=mask, scale=x.softmax_scale, enable_gqa=True)
                for *qkv, mask in heads
            ],
            dim=1,
        )

    return _unbatched(_by_autograd(forward, (q, k, v), _heads_first(x.grad_out), stage))


def _by_autograd(
    forward: Callable[..., torch.Tensor], qkv: tuple[torch.Tensor, ...], grad_out: torch.Tensor, stage: Stage
) -> Run:
    if stage == "forward":
        return lambda: (forward(*qkv),)
    leaves = tuple(t.detach().requires_grad_() for t in qkv)
    out = forward(*leaves)
    return lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)


def _batched(x: Inputs) -> tuple[torch.Tensor, ...]:
    return tuple(_heads_first(t) for t in (x.q, x.k, x.v))


def _heads_first(t: torch.Tensor, length: int | None = None) -> torch.Tensor:
    """As torch's attention takes it: [sequences of so many tokens, or 1 of all, heads, length, dim]."""
    return t.unflatten(0, (-1, length or len(t))).transpose(1, 2).contiguous()


def _unbatched(run: Run) -> Run:
    return lambda: tuple(t[0].transpose(0, 1) for t in run())


def _joined(answer: Answer) -> Answer:
    """[tokens, heads, dim] of what `_heads_first` cut."""
    return tuple(t.transpose(1, 2).flatten(0, 1) for t in answer)


def _mask(x: Inputs, kv_head: int) -> torch.Tensor:
    """bool [tokens, keys]"""
    chosen = torch.zeros(x.num_tokens, x.num_blocks + 1, dtype=torch.bool, device=x.q.device)
    ids = x.block_indices[kv_head].long()
    chosen.scatter_(1, ids.where(ids >= 0, x.num_blocks), True)
    keys = chosen[:, :-1].repeat_interleave(x.block_size, dim=1)[:, : x.num_tokens]
    return keys.tril_()
