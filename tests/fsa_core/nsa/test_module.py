"""The layer: parameters, training, and that serving in pieces gives what one pass gives."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fsa_core.errors import InputError
from fsa_core.nsa import module
from fsa_core.nsa.cache import NSACache
from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.module import COMPRESSIONS, NativeSparseAttention
from fsa_core.nsa.reference import compress_reference, nsa_attention_reference, pool_mean
from fsa_core.nsa.rope import rotate
from tests.fsa_core.nsa.conftest import SMALL, cumulative

HIDDEN = 48


@pytest.fixture
def make_layer(device):
    def make(**options):
        torch.manual_seed(0)
        options = {"head_dim": 16, "config": SMALL, "compression": "weighted", **options}
        return NativeSparseAttention(HIDDEN, 4, 2, **options).to(device)

    return make


def tokens(count, device):
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(1)).to(device)


def assert_same(got, expected):
    """Equal but for roundings, which pieces of other sizes may make otherwise."""
    bound = 64 * torch.finfo(expected.dtype).eps * expected.abs().amax()
    assert got.shape == expected.shape
    assert (got - expected).abs().amax() <= bound


def test_the_layer_is_the_operator_between_projections(make_layer, device):
    layer = make_layer(compression="mean")
    x, cu = tokens(103, device), cumulative((70, 33)).to(device)
    out = layer(x, cu)
    x64 = x.double()
    weight = {name: p.double() for name, p in layer.state_dict().items()}
    q, k, v = ((x64 @ weight[f"{name}_proj.weight"].T).unflatten(-1, (-1, 16)) for name in "qkv")
    gates = (x64 @ weight["gate_proj.weight"].T + weight["gate_proj.bias"]).sigmoid().unflatten(-1, (4, 3))
    position = torch.cat([torch.arange(70), torch.arange(33)]).to(device)
    window = torch.cat([torch.arange(16), torch.arange(7)]).to(device) * SMALL.stride
    k_cmp, v_cmp = (compress_reference(y, cu, SMALL, pool_mean) for y in (k, v))
    rotated = [rotate(y, p, 10000.0) for y, p in ((q, position), (k, position), (k_cmp, window))]
    attended = nsa_attention_reference(*rotated[:2], v, rotated[2], v_cmp, gates, cu, cu, SMALL, 0.25)
    assert_same(out, (attended.flatten(1) @ weight["o_proj.weight"].T).float())


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("pieces", ["whole", "chunks", "chunks, then token by token", "token by token"])
def test_serving_in_pieces_is_one_pass(make_layer, device, compression, pieces):
    layer = make_layer(compression=compression)
    x = tokens(100, device)
    sizes = {
        "whole": [100],
        "chunks": [33, 1, 30, 36],
        "chunks, then token by token": [64] + [1] * 36,
        "token by token": [1] * 100,
    }[pieces]
    cache = NSACache(1)
    parts = [layer(part, cache=cache) for part in x.split(sizes)]
    assert_same(torch.cat(parts), layer(x))
    assert cache.lengths == [100]


def test_sequences_of_a_batch_are_served_together(make_layer, device):
    """Prompts of several lengths, then a token of each a call, of one of them two, of one none."""
    layer = make_layer()
    sequences = [tokens(60, device)[:n] for n in (60, 31, 9, 20)]
    prompts, steps = (50, 20, 0, 12), 8
    cache = NSACache(4)
    parts = [[] for _ in sequences]
    done = [0, 0, 0, 0]

    def serve(counts):
        new = [x[at : at + n] for x, at, n in zip(sequences, done, counts, strict=True)]
        out = layer(torch.cat(new), cumulative(counts).to(device), cache)
        for i, part in enumerate(out.split(list(counts))):
            parts[i].append(part)
            done[i] += counts[i]

    serve(prompts)
    for _ in range(steps):
        serve((1, 1, 1, 0))
    serve((2, 3, 1, 8))
    assert cache.lengths == done == [60, 31, 9, 20]
    for sequence, served in zip(sequences, parts, strict=True):
        assert_same(torch.cat(served), layer(sequence))


def test_packed_sequences_do_not_see_one_another(make_layer, device):
    layer = make_layer(compression="mlp")
    x, cu = tokens(90, device), cumulative((40, 0, 17, 33)).to(device)
    out = layer(x, cu)
    for start, end in ((0, 40), (40, 57), (57, 90)):
        assert_same(out[start:end], layer(x[start:end]))
    x[57:] = torch.nan
    assert torch.equal(layer(x, cu)[:57], out[:57])


def test_no_token_sees_a_later_one(make_layer, device):
    layer, x = make_layer(), tokens(90, device)
    out = layer(x)
    x[50:] = 100 * torch.randn_like(x[50:])
    assert_same(layer(x)[:50], out[:50])


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_every_parameter_gets_a_gradient(make_layer, device, compression):
    layer = make_layer(compression=compression)
    layer(tokens(90, device), cumulative((60, 30)).to(device)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_the_layer_learns(make_layer, device):
    """To give the token of 20 before, out of reach of the window, that only a choice of blocks finds."""
    torch.manual_seed(0)
    layer = make_layer(config=replace(SMALL, window=4))
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x = tokens(60, device)
    losses = []
    for _ in range(30):
        loss = (layer(x)[20:] - x[:-20]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("compression", "expected"),
    [
        ("mean", {}),
        ("weighted", {"weight": (2, 8)}),
        ("linear", {"weight": (2, 8, 16, 16), "bias": (2, 16)}),
        (
            "mlp",
            {
                "position": (2, 8, 16),
                "weight_in": (2, 8, 16, 64),
                "bias_in": (2, 64),
                "weight_out": (2, 64, 16),
                "bias_out": (2, 16),
            },
        ),
    ],
)
def test_state_dict_is_as_documented(make_layer, compression, expected):
    compressions = {f"compress_{x}.{name}": shape for x in "kv" for name, shape in expected.items()}
    assert {name: tuple(p.shape) for name, p in make_layer(compression=compression).state_dict().items()} == {
        "q_proj.weight": (64, HIDDEN),
        "k_proj.weight": (32, HIDDEN),
        "v_proj.weight": (32, HIDDEN),
        "o_proj.weight": (HIDDEN, 64),
        "gate_proj.weight": (12, HIDDEN),
        "gate_proj.bias": (12,),
        **compressions,
    }


def test_compiled_it_is_the_same_with_attention_out_of_the_graph(make_layer, device):
    layer, x, cu = make_layer(), tokens(60, device), cumulative((40, 20)).to(device)
    compiled = torch.compile(layer, backend="eager")
    x.requires_grad_()
    out, compiled_out = layer(x, cu), compiled(x, cu)
    assert torch.equal(compiled_out, out)
    (grad,), (compiled_grad,) = (torch.autograd.grad(y.sum(), x) for y in (out, compiled_out))
    assert torch.equal(compiled_grad, grad)
    cache, compiled_cache = NSACache(2), NSACache(2)
    assert torch.equal(compiled(x, cu, compiled_cache), layer(x, cu, cache))
    torch.compiler.reset()
    whole = torch.compile(layer, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="depends on the contents of cu_seqlens"):
        whole(x, cu)


def test_half_precision_and_defaults(device):
    """The paper's sizes, at which a short sequence selects everything; a call is as good as its dtype."""
    torch.manual_seed(0)
    layer = NativeSparseAttention(64, 4, 1, compression="mean").to(device)
    assert layer.head_dim == 16
    assert layer.config == NSAConfig()
    x = torch.randn(150, 64, device=device)
    expected = layer(x)
    half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).abs().amax() < 4 * torch.finfo(
        torch.bfloat16
    ).eps * expected.abs().amax()


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_mixed_precision(make_layer, device, compression):
    """Parameters in float32, arithmetic in bfloat16, as a training loop has it; and the same to serve."""
    # Every block: what rounding selects otherwise is not the question.
    layer = make_layer(compression=compression, config=replace(SMALL, top_k=5))
    x = tokens(80, device)
    expected = layer(x)
    with torch.autocast(device.type, torch.bfloat16):
        out = layer(x)
        cached = layer(x, cache=NSACache(1))
    assert out.dtype == cached.dtype == torch.bfloat16
    bound = 0.05 * expected.abs().amax()
    assert (out.float() - expected).abs().amax() < bound
    assert (cached.float() - expected).abs().amax() < bound
    out.float().square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32


def test_a_cached_call_carries_no_gradient(make_layer, device):
    layer = make_layer()
    out = layer(tokens(20, device).requires_grad_(), cache=NSACache(1))
    assert not out.requires_grad, "training what comes behind attention alone would go unnoticed"


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((64, 4, 3), {}, "num_q_heads is 4: expected a multiple of 3 KV heads"),
        ((64, 0, 2), {}, "num_q_heads is 0: expected an integer of at least 1"),
        ((64, 4, 0), {}, "num_kv_heads is 0: expected an integer of at least 1"),
        ((64, -4, 2), {}, "num_q_heads is -4: expected an integer of at least 1"),
        ((64.0, 4, 2), {}, "hidden_dim is 64.0: expected an integer of at least 1"),
        ((64, 8, 2), {}, "head_dim is 8: expected an integer of at least 16, at most 256"),
        ((64, 4, 2), {"head_dim": 512}, "head_dim is 512: expected an integer of at least 16, at most 256"),
        ((64, 4, 2), {"head_dim": 17}, "head_dim is 17: expected an even number"),
        (
            (64, 4, 2),
            {"compression": "max"},
            "compression is 'max': expected one of mean, weighted, linear, mlp",
        ),
        (
            (64, 4, 2),
            {"backend": "bogus"},
            "backend is 'bogus': expected one of auto, triton, cpu, reference",
        ),
        ((64, 4, 2), {"rope_theta": 0}, "rope_theta is 0: expected a finite number of at least 1, or None"),
        ((64, 4, 2), {"rope_theta": -1e4}, "rope_theta is -10000.0: expected a finite number of at least 1"),
        (
            (64, 4, 2),
            {"rope_theta": float("inf")},
            "rope_theta is inf: expected a finite number of at least 1",
        ),
        ((64, 4, 2), {"rope_theta": "1e4"}, "rope_theta is '1e4': expected a finite number of at least 1"),
        ((64, 4, 2), {"config": {"window": 8}}, "config has type dict: expected NSAConfig"),
    ],
    ids=str,
)
def test_what_a_layer_cannot_be_made_of_is_refused_by_name(sizes, options, message):
    with pytest.raises(InputError, match=message) as error:
        NativeSparseAttention(*sizes, **options)
    assert error.value.field == message.split()[0]


def test_numbers_of_other_kinds_become_plain_ones(device):
    sizes = (np.int64(64), np.int32(4), np.int64(2))
    layer = NativeSparseAttention(*sizes, config=SMALL, rope_theta=np.float32(1e4)).to(device)
    assert type(layer.num_q_heads) is type(layer.num_kv_heads) is type(layer.head_dim) is int
    assert type(layer.rope_theta) is float
    assert layer(torch.randn(20, 64, device=device)).isfinite().all()


def test_calls_that_do_not_fit_are_refused(make_layer, device):
    layer, x = make_layer(), tokens(20, device)
    for cache in (None, NSACache(1)):
        with pytest.raises(InputError, match="x has width 47: expected 48, the layer's hidden_dim"):
            layer(x[:, 1:], cache=cache)
        with pytest.raises(InputError, match=r"x has rank 3 \(shape \[1, 20, .*expected 2, \[num_tokens"):
            layer(x[None], cache=cache)
        with pytest.raises(InputError, match=r"cu_seqlens has type list: expected torch\.Tensor"):
            layer(x, [0, 20], cache)
    with pytest.raises(InputError, match=r"cu_seqlens\[1\] is 19: expected 20, the token count"):
        layer(x, cumulative((19,)).to(device))
    with pytest.raises(InputError, match=r"cu_seqlens\[2\] is 19: expected 20, the token count"):
        layer(x, cumulative((10, 9)).to(device), NSACache(2))
    with pytest.raises(InputError, match="the cache has 2 sequences, cu_seqlens 1"):
        layer(x, cache=NSACache(2))
    with pytest.raises(InputError, match="cache has type list: expected NSACache"):
        layer(x, cache=[1])


@pytest.mark.parametrize("num_sequences", [0, -1, 1.0, True])
def test_a_cache_is_of_at_least_one_sequence(num_sequences):
    with pytest.raises(
        InputError, match=f"num_sequences is {num_sequences}: expected an integer of at least 1"
    ):
        NSACache(num_sequences)


@pytest.mark.parametrize("failing", ["a refusal", "attention", "the output"])
@pytest.mark.parametrize("retried", [[10, 20], [1] * 30], ids=["as it was", "token by token"])
@pytest.mark.usefixtures("poisoned_memory")
def test_a_call_that_raises_adds_nothing_to_the_cache(make_layer, device, monkeypatch, failing, retried):
    """Its tokens are NaN, and more than a window has: what is left of them would show."""
    layer, x, cache = make_layer(), tokens(60, device), NSACache(1)
    parts = [layer(x[:30], cache=cache)]

    def fail(*_args, **_options):
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as patch:
        match failing:
            case "a refusal":
                patch.setattr(layer, "backend", "bogus")
            case "attention":
                patch.setattr(module, "attend_slots", fail)
            case "the output":
                patch.setattr(layer.o_proj, "forward", fail)
        with pytest.raises((ValueError, torch.OutOfMemoryError)):
            layer(torch.full_like(x[:10], torch.nan), cache=cache)
    assert cache.lengths == [30]
    parts += [layer(part, cache=cache) for part in x[30:].split(retried)]
    assert_same(torch.cat(parts), layer(x))


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_a_cache_goes_on_in_inference_mode_and_out_of_it(make_layer, device, first):
    layer, x, cache = make_layer(), tokens(60, device), NSACache(1)
    second = torch.no_grad if first is torch.inference_mode else torch.inference_mode
    parts = []
    # The slots grow in the fourth call.
    for i, part in enumerate(x.split([10, 10, 5, 15, 20])):
        with (first, second)[i % 2]():
            parts.append(layer(part, cache=cache))
    assert_same(torch.cat(parts), layer(x))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"config": replace(SMALL, window=21)}, "config NSAConfig.* window=20.*: expected .* window=21"),
        ({"num_kv_heads": 4}, "num_kv_heads 2: expected 4, that of this call"),
        ({"head_dim": 32}, "head_dim 16: expected 32, that of this call"),
        ({"dtype": torch.bfloat16}, "dtype torch.float32: expected torch.bfloat16, that of this call"),
    ],
    ids=str,
)
def test_a_cache_of_another_layer_is_refused_by_name_unless_it_is_empty(make_layer, device, other, message):
    x, cache = tokens(20, device), NSACache(1)
    make_layer()(x, cache=cache)
    sizes = {"num_kv_heads": 2, "head_dim": 16, "config": SMALL, "dtype": torch.float32, **other}
    dtype = sizes.pop("dtype")
    layer = NativeSparseAttention(HIDDEN, 4, **sizes, compression="mean").to(device, dtype)
    with pytest.raises(InputError, match=f"cache has {message}") as error:
        layer(x[:1].to(dtype), cache=cache)
    assert (error.value.reason, error.value.field) == ("INVALID_CACHE", "cache")
    assert cache.lengths == [20]
    cache.forget(0)
    assert torch.equal(layer(x.to(dtype), cache=cache), layer(x.to(dtype), cache=NSACache(1)))


def test_a_cache_on_another_device_is_refused(make_layer, device):
    x, cache = tokens(20, device), NSACache(1)
    make_layer()(x, cache=cache)
    k = torch.empty(1, 2, 16, device="meta")
    with pytest.raises(InputError, match=f"cache has device {device}.*: expected meta, that of this call"):
        cache.begin((0, 1), k, k, SMALL)


def test_storage_of_the_cache_doubles(make_layer, device):
    """One copy for each doubling, not for each token."""
    layer, cache, storages = make_layer(), NSACache(1), set()
    with pytest.raises(IndexError, match="nothing was appended yet"):
        _ = cache.slots
    for x in tokens(100, device).split(1):
        layer(x, cache=cache)
        storages.add(cache.slots.k.data_ptr())
    assert cache.lengths == [100]
    assert cache.capacity == 128
    assert len(storages) <= 4
