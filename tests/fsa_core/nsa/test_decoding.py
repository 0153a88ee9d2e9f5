"""Serving several sequences from one cache: by kernels at once, and in torch operations one by one."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fsa_core.nsa.cache import NSACache
from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.module import NativeSparseAttention
from tests.fsa_core.nsa.conftest import SMALL, assert_error, cumulative

HIDDEN = 48
# New tokens of each sequence, a call a row: prompts beside decoded tokens, a first token, none, windows
# completed at once and a token later, and a sequence that outgrows its slot.
CALLS = [
    (35, 10, 0, 7, 3),
    (1, 1, 1, 1, 1),
    (2, 0, 5, 0, 1),
    (0, 0, 0, 0, 0),
    (11, 33, 1, 0, 0),
    (1, 1, 1, 1, 1),
]


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def make_layer(device):
    def make(**options):
        torch.manual_seed(0)
        options = {"head_dim": 16, "config": SMALL, "compression": "weighted", **options}
        return NativeSparseAttention(HIDDEN, 2, 1, **options).to(device)

    return make


def tokens(count, device):
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(count)).to(device)


# In the interpreter on a machine without a GPU.
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize(
    "options",
    [{}, {"compression": "mean", "rope_theta": None, "config": replace(SMALL, top_p=0.8)}],
    ids=["weighted", "mean, no positions, a budget"],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_steps_of_ragged_batches_are_one_pass_of_each_sequence(make_layer, device, backend, options):
    """In slots whose gaps hold NaN."""
    layer = make_layer(backend=backend, **options)
    lens = [sum(counts) for counts in zip(*CALLS, strict=True)]
    sequences = [tokens(n, device) for n in lens]
    cache, parts, done = NSACache(len(lens)), [[] for _ in lens], [0] * len(lens)
    capacities = set()
    for counts in CALLS:
        new = [x[at : at + n] for x, at, n in zip(sequences, done, counts, strict=True)]
        # Starts on the CPU, which nothing waits for, and on the device.
        starts = cumulative(counts) if 0 in counts else cumulative(counts).to(device)
        out = layer(torch.cat(new), starts, cache)
        for part, some in zip(parts, out.split(list(counts)), strict=True):
            part.append(some)
        done = [at + n for at, n in zip(done, counts, strict=True)]
        assert cache.lengths == done
        capacities.add(cache.capacity)
    assert len(capacities) == 2, "sequences are copied when the longest outgrows its slot"
    whole = make_layer(**options)
    for sequence, served in zip(sequences, parts, strict=True):
        expected = whole(sequence)
        assert_error(torch.cat(served), expected, expected.double(), torch.float32, "served", roundings=64)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_slot_that_is_forgotten_serves_the_next_sequence(make_layer, device, backend):
    """Beside one that goes on; of what was there, NaN, nothing is left."""
    layer, cache = make_layer(backend=backend), NSACache(2)
    staying, gone, next_one = tokens(20, device), tokens(30, device), tokens(13, device)
    gone[5:] = torch.nan
    parts = [layer(torch.cat([gone, staying[:9]]), cumulative((30, 9)), cache)[30:]]
    cache.forget(0)
    assert cache.lengths == [0, 9]
    parts.append(layer(staying[9:12], cumulative((0, 3)), cache))
    served = layer(torch.cat([next_one[:11], staying[12:]]), cumulative((11, 8)), cache)
    last = layer(next_one[11:], cumulative((2, 0)), cache)
    assert cache.lengths == [13, 20]
    pairs = ((next_one, [served[:11], last]), (staying, [*parts, served[11:]]))
    for sequence, got in pairs:
        expected = make_layer()(sequence)
        assert_error(torch.cat(got), expected, expected.double(), torch.float32, "served", roundings=64)
    for missing in (-1, 2):
        with pytest.raises(IndexError, match=f"sequence is {missing}: expected one of the 2 of the cache"):
            cache.forget(missing)


def test_a_step_costs_as_many_launches_whatever_the_number_of_sequences(make_layer, device):
    fill, layer = (make_layer(backend=backend, compression="mlp") for backend in ("auto", "triton"))

    def operations_of_a_step(num_sequences):
        cache = NSACache(num_sequences)
        starts = torch.arange(num_sequences + 1, dtype=torch.int32)
        fill(tokens(11 * num_sequences, device), 11 * starts, cache)
        with Operations() as operations:
            # The twelfth token completes a window.
            layer(tokens(num_sequences, device), starts, cache)
        return operations.count

    assert operations_of_a_step(2) == operations_of_a_step(5)


def test_a_step_waits_for_nothing(make_layer, device):
    if device.type == "cpu":
        pytest.skip("nothing to wait for")
    layer, cache = make_layer(), NSACache(3)
    starts = torch.arange(4, dtype=torch.int32)
    x = tokens(3, device)
    # Kernels are compiled, room is made and windows are completed.
    for _ in range(12):
        layer(x, starts, cache)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            layer(x, starts, cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.lengths == [16, 16, 16]


def test_half_precision(make_layer, device):
    """Two orders of the same sums in bfloat16, of a query that selects all blocks."""
    if device.type == "cpu":
        pytest.skip("tl.dot on bfloat16 is wrong in the Triton interpreter")
    layer = make_layer(config=replace(SMALL, top_k=5)).bfloat16()
    x = tokens(80, device).bfloat16()
    cache = NSACache(1)
    served = torch.cat([layer(part, cache=cache) for part in x.split([60, *[1] * 20])])
    expected = layer.float()(x.float())
    assert served.dtype == torch.bfloat16
    assert (served.float() - expected).abs().amax() < 0.05 * expected.abs().amax()


def test_a_choice_without_a_kernel_is_refused_by_name_and_else_made_in_torch(make_layer, device):
    config = NSAConfig(kernel_size=8, stride=4, block_size=16, top_k=300, window=20)
    x = tokens(20, device)
    with pytest.raises(ValueError, match="backend 'triton' does not select 300 blocks"):
        make_layer(backend="triton", config=config)(x, cache=NSACache(1))
    layer, cache = make_layer(config=config), NSACache(2)
    served = layer(torch.cat([x, x[:7]]), cumulative((20, 7)), cache)
    expected = torch.cat([layer(x), layer(x[:7])])
    assert_error(served, expected, expected.double(), torch.float32, "served", roundings=64)
