"""The operator's parts, as ours and the peers compute them.

K and V are compressed by means, before the timer in the part "selection" and within it in the others. Without
a window the two branches are added up without gates, by one torch operation, for every contender. Peers run
their public autograd functions. Blocks count alike in all (the paper's sizes, the first and the last two
forced), but SFNSA ranks float16 powers of importance and NSA Triton bfloat16 sums: of near ties they may
choose others. A run gives its block ids behind its answer, for the gate.
"""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.cases import Case, Stage
from benchmarks.contenders import OUR_TOLERANCE, PEER_TOLERANCE, Answer, Contender, Run
from benchmarks.inputs import Inputs
from benchmarks.operator_gate import config_of
from fsa_core.api import selected_attention
from fsa_core.decode import paged_selected_attention
from fsa_core.nsa.compression import MeanCompression
from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.functional import nsa_attention, select_blocks
from fsa_core.nsa.stages import attend_and_choose
from fsa_core.nsa.validation import Call
from fsa_core.plan import DEFAULT_WORKSPACE_BYTES

# Of q, compressed k and v: out and block ids; of q, k, v and ids: out; of k or v: its means.
Select = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Compress = Callable[[torch.Tensor], torch.Tensor]
Stages = tuple[Compress, Select, Attend]
# The stages for these inputs.
StagesOf = Callable[[Inputs, NSAConfig], Stages]

# Gradients of compressed K pass a bfloat16 of their own.
BACKWARD_TOLERANCE = 4e-2


def operator_contenders(case: Case, *, with_peers: bool) -> list[Contender]:
    """Ours first; ``with_peers``: those of benchmarks/operator_peers.py, which are importable then."""
    peers: dict[str, StagesOf] = {}
    if with_peers:
        from benchmarks.operator_peers import DECODING_PEERS, STAGES_OF_PEERS

        if case.part == "decode":
            return [_decoding("ours", prepare_ours_decoding, case)] + [
                _decoding(name, prepare, case) for name, prepare in DECODING_PEERS.items()
            ]
        peers = STAGES_OF_PEERS if case.part in ("selection", "operator") else {}
    if case.part == "decode":
        return [_decoding("ours", prepare_ours_decoding, case)]
    slack = BACKWARD_TOLERANCE if case.stage == "backward" else 0.0
    ours = Contender("ours", partial(prepare_windowed, case), OUR_TOLERANCE)
    if case.part != "windowed":
        ours = Contender("ours", partial(prepare_stages, case, stages_of_ours), max(OUR_TOLERANCE, slack))
    theirs = max(PEER_TOLERANCE, slack)
    return [ours] + [Contender(n, partial(prepare_stages, case, of), theirs) for n, of in peers.items()]


def stages_of_ours(x: Inputs, config: NSAConfig) -> Stages:
    starts = (x.cu_seqlens, x.cu_seqlens, tuple(x.cu_seqlens.tolist()))
    call = Call(config, *starts, x.softmax_scale, DEFAULT_WORKSPACE_BYTES)
    compress = MeanCompression(config.kernel_size, config.stride)

    def select(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Answer:
        (out, _), ids = attend_and_choose(call, q, k, v, "auto")
        return out, ids

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        sizes = {"block_size": config.block_size, "softmax_scale": x.softmax_scale}
        return selected_attention(q, k, v, ids, **sizes, validate=False)[0]

    return (
        lambda t: compress(t, call.key_starts),
        select,
        attend,
    )


def prepare_stages(case: Case, stages_of: StagesOf, x: Inputs, stage: Stage) -> Run:
    """The parts "selection" and "operator"."""
    compress, select, attend = stages_of(x, config_of(case))
    if case.part == "selection":
        k_cmp, v_cmp = compress(x.k), compress(x.v)
        return lambda: select(x.q, k_cmp, v_cmp)

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Answer:
        out, ids = select(q, compress(k), compress(v))
        return out + attend(q, k, v, ids), ids

    if stage == "forward":
        return lambda: forward(x.q, x.k, x.v)
    leaves = tuple(t.detach().requires_grad_() for t in (x.q, x.k, x.v))
    out, ids = forward(*leaves)
    return lambda: (*torch.autograd.grad(out, leaves, x.grad_out, retain_graph=True), ids)


def prepare_windowed(case: Case, x: Inputs, stage: Stage) -> Run:
    """The public function, every gate 1."""
    config = config_of(case)
    compress = MeanCompression(config.kernel_size, config.stride)
    gates = torch.ones(*x.q.shape[:2], 3, dtype=x.q.dtype, device=x.q.device)
    ids = select_blocks(x.q, compress(x.k, x.cu_seqlens), config=config)
    return lambda: (nsa_attention(x.q, x.k, x.v, gates, compress, compress, config=config), ids)


def prepare_ours_decoding(case: Case, x: Inputs, stage: Stage) -> Run:
    """Of pages of a block."""
    k_cache, v_cache = (t.view(-1, case.block_size, *t.shape[1:]) for t in (x.k, x.v))
    table = pages_of(case, x)
    lengths = torch.full((case.batch,), case.num_tokens, dtype=torch.int32, device=x.q.device)

    def attend(ids: torch.Tensor) -> torch.Tensor:
        tensors = (x.q, k_cache, v_cache, table, ids, lengths)
        return paged_selected_attention(*tensors, block_size=case.block_size, validate=False)[0]

    return layer_by_layer(attend, case, x)


def layer_by_layer(attend: Callable[[torch.Tensor], torch.Tensor], case: Case, x: Inputs) -> Run:
    """A step of all layers, each with blocks of its own; the answer is the first one's.

    On a GPU replayed from a CUDA graph, as a server would, without Python's time.
    """
    num_blocks = case.num_tokens // case.block_size
    layers = [(x.block_indices + 29 * layer) % num_blocks for layer in range(case.calls)]

    def run() -> Answer:
        first, *_ = [attend(ids) for ids in layers]
        return first, x.block_indices

    return replayed(run, x)


def pages_of(case: Case, x: Inputs) -> torch.Tensor:
    """int32 [batch, pages of a sequence]"""
    pages = case.batch * case.num_tokens // case.block_size
    return torch.arange(pages, dtype=torch.int32, device=x.q.device).view(case.batch, -1)


def replayed(run: Run, x: Inputs) -> Run:
    if x.q.device.type == "cpu":
        return run
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # The call is kept as well: the graph reads its tensors where they lie.
        captured = run, run()

    def replay() -> Answer:
        graph.replay()
        return captured[1]

    return replay


def _decoding(name: str, prepare: Callable[[Case, Inputs, Stage], Run], case: Case) -> Contender:
    tolerance = OUR_TOLERANCE if name == "ours" else PEER_TOLERANCE
    return Contender(name, partial(prepare, case), tolerance)
