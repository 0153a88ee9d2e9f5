"""The paths through query tiles against the oracle."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fsa_core.drawn_indices import causal_block_indices
from fsa_core.kernels import launch
from fsa_core.kernels.agreement import Agreement, agree, new_agreement
from fsa_core.kernels.forward import selected_attention_forward
from fsa_core.kernels.index import invert, new_inversion
from fsa_core.kernels.replay import Memory
from fsa_core.plan import MIXED, QUERY_TILE, TOKEN_MAJOR, groups, plan_forward
from fsa_core.problem import BLOCK_SIZES
from fsa_core.tiles import FEW_LEFT, QueryTile
from tests.fsa_core.conftest import DISTRIBUTIONS, Case


@pytest.fixture(params=[QUERY_TILE, MIXED, TOKEN_MAJOR])
def path(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def check(make_case: Callable, assert_close_to_oracle: Callable, path: str) -> Callable:
    def run(**options: object) -> Case:
        case = make_case(**options)
        assert_close_to_oracle(*selected_attention_forward(case.problem, *case.tensors, path=path), case)
        return case

    return run


# Tiles of 64, 21, 8 and 2 tokens.
@pytest.mark.parametrize("group_size", [1, 3, 8, 32])
def test_every_group_size(check: Callable, dtype: torch.dtype, group_size: int) -> None:
    check(q_lens=(33,), group_size=group_size, num_kv_heads=1, head_dim=32, dtype=dtype)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(80, 80), (192, 128), (16, 256)])
def test_head_dims_that_are_no_powers_of_two_and_values_of_another_width(
    check: Callable, dtype: torch.dtype, head_dim: int, value_dim: int
) -> None:
    check(q_lens=(33,), num_kv_heads=1, head_dim=head_dim, value_dim=value_dim, dtype=dtype)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size_with_a_short_last_block(
    check: Callable, dtype: torch.dtype, block_size: int
) -> None:
    check(q_lens=(20,), k_lens=(2 * block_size + 7,), num_kv_heads=1, block_size=block_size, dtype=dtype)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_way_to_choose_blocks(check: Callable, distribution: str) -> None:
    check(q_lens=(30, 13), distribution=distribution, dtype=torch.float16, head_dim=32)


def test_all_keys_of_the_blocks_without_a_causal_mask(check: Callable) -> None:
    check(q_lens=(30, 13), causal=False, dtype=torch.float16, head_dim=32)


@pytest.mark.parametrize("index_heads", [1, 6])
def test_blocks_chosen_for_all_heads_or_for_a_query_head(check: Callable, index_heads: int) -> None:
    check(q_lens=(30,), group_size=3, index_heads=index_heads, dtype=torch.float16, head_dim=32)


def test_packed_sequences_of_any_length(check: Callable) -> None:
    check(q_lens=(1, 0, 17, 5, 0), k_lens=(70, 9, 17, 64, 0), head_dim=32, dtype=torch.float16)


def test_queries_before_the_first_key_see_nothing(check: Callable) -> None:
    check(q_lens=(30,), k_lens=(17,), head_dim=32, dtype=torch.float16)


def test_large_logits_stay_finite_and_right(check: Callable, dtype: torch.dtype) -> None:
    check(q_lens=(33,), q_scale=16.0, dtype=dtype)


def test_float32(check: Callable) -> None:
    check(q_lens=(33,), dtype=torch.float32, head_dim=32)


def assert_tiles_list(
    agreement: Agreement, tile: QueryTile, ids: torch.Tensor, case: Case
) -> list[tuple[int, int]]:
    """That each tile lists what it should; how many blocks each lists and how many choices it leaves."""
    p, found = case.problem, []
    for start, end in case.cu_seqlens_q.unfold(0, 2, 1).tolist():
        num_blocks = -(-(end - start) // p.block_size)
        # A sequence's tiles begin behind as many as all before could fill.
        tile_number = start // tile.tokens + case.cu_seqlens_q.tolist().index(start)
        for number, first in enumerate(range(start, end, tile.tokens), tile_number):
            last = min(first + tile.tokens, end)
            rows = ids[0, first:last]
            chosen = Counter(block for block in rows.flatten().tolist() if 0 <= block < num_blocks)
            few = {block: count for block, count in chosen.items() if count < tile.min_tokens}
            if sum(few.values()) * FEW_LEFT < chosen.total() and len(chosen) <= tile.most_blocks:
                few = {}
            left = torch.tensor([[x if x in few else -1 for x in row] for row in rows.tolist()])
            got = agreement.leftover[0, first:last].cpu()
            assert torch.equal(got, left.int()), f"tokens from {first} on"
            shared = sorted(chosen.keys() - few.keys())
            num_whole = sum((block + 1) * p.block_size <= first - start + 1 for block in shared)
            assert agreement.counts[0, number].tolist() == [num_whole, len(shared)]
            assert agreement.blocks[0, number, : len(shared)].tolist() == shared
            masks = [sum(1 << t for t, row in enumerate(rows.tolist()) if x in row) for x in shared]
            listed = agreement.masks[0, number, : len(shared)].tolist()
            assert [mask % 2**64 for mask in listed] == masks
            found.append((len(shared), sum(few.values())))
    return found


@pytest.mark.usefixtures("language")
@pytest.mark.parametrize("most_blocks", [3, 64])
def test_a_tile_leaves_what_few_of_its_tokens_chose_unless_that_is_little(
    make_case: Callable, most_blocks: int
) -> None:
    case = make_case(
        q_lens=(64, 37), num_kv_heads=1, group_size=8, num_slots=4, dtype=torch.float16, head_dim=32
    )
    p, plan = case.problem, plan_forward(case.problem, path=MIXED)
    tile, (group,) = plan.query_tile, groups(p, plan)
    assert tile is not None
    tile = replace(tile, most_blocks=most_blocks)
    # All but one token of the first tile want the same four blocks, and that one another.
    ids = case.block_indices.clone()
    ids[0, : tile.tokens] = torch.tensor([0, 1, 2, 3])
    ids[0, 3, 1] = 2**31 - 1
    ids[0, 5, 2] = -1
    agreement = new_agreement(p, plan, tile, case.q)
    agree(agreement, p, plan, tile, group, ids, case.cu_seqlens_q, case.cu_seqlens_k, None)
    left_in_tiles = [left for _, left in assert_tiles_list(agreement, tile, ids, case)]
    assert 0 in left_in_tiles
    assert max(left_in_tiles) > 0


# Tiles of 64, 32 and 32 tokens.
@pytest.mark.usefixtures("language")
@pytest.mark.parametrize(("group_size", "num_slots"), [(1, 16), (2, 16), (2, 13)])
def test_tiles_whose_tokens_agree_and_those_whose_do_not(
    make_case: Callable, monkeypatch: pytest.MonkeyPatch, group_size: int, num_slots: int
) -> None:
    # As if there were many tiles, which the kernel for Hopper searches first.
    monkeypatch.setattr(launch, "_BUSY", 0)
    case = make_case(
        q_lens=(1500, 90), num_kv_heads=1, group_size=group_size, num_slots=num_slots, block_size=16,
        dtype=torch.float16, head_dim=32,
    )  # fmt: skip
    p, plan = case.problem, plan_forward(case.problem, path=MIXED)
    tile, (group,) = plan.query_tile, groups(p, plan)
    assert tile is not None
    generator = torch.Generator().manual_seed(group_size)
    agreed, random = (
        causal_block_indices(1500, 1, num_slots, 16, kind, generator) for kind in ("real", "random")
    )
    ids = torch.cat((agreed[:, :800], random[:, 800:], agreed[:, :90]), 1)
    # One that a row has twice, and some that are none.
    ids[0, 300, 1:3] = 4
    ids[0, 500, 2], ids[0, 501, 3], ids[0, 502] = 2**31 - 1, -(2**31), -1
    # What is missing in the end, as many as have nothing in a slot; or as have the least block.
    ids[0, 64, 1], ids[0, 65, 2] = ids[0, 64, 2], -1
    ids[0, 128:192, :2] = 0
    ids = ids.to(case.q.device)
    agreement = new_agreement(p, plan, tile, case.q)
    agree(agreement, p, plan, tile, group, ids, case.cu_seqlens_q, case.cu_seqlens_k, None)
    found = assert_tiles_list(agreement, tile, ids, case)
    assert any(left == 0 and listed > 8 for listed, left in found)
    assert any(left > 0 for _, left in found)


@pytest.mark.usefixtures("language")
@pytest.mark.parametrize("is_one_apart", [False, True])
def test_where_tiles_leave_nothing_nothing_is_indexed(make_case: Callable, is_one_apart: bool) -> None:
    case = make_case(
        q_lens=(600,), num_kv_heads=1, group_size=8, num_slots=2, dtype=torch.float16, head_dim=32
    )
    p, plan = case.problem, plan_forward(case.problem, path=MIXED)
    tile, (group,) = plan.query_tile, groups(p, plan)
    assert tile is not None
    assert tile.tokens == 16
    # Two blocks for all, but for the tokens of one tile, which agree on nothing.
    ids = torch.zeros_like(case.block_indices)
    ids[..., 1] = 1
    if is_one_apart:
        number = torch.arange(16, dtype=torch.int32, device=ids.device)
        ids[0, 496:512] = 1 + torch.stack((number % 7, (number + 3) % 7), 1)
    memory = Memory(case.q)
    agreement, inversion = new_agreement(p, plan, tile, memory), new_inversion(plan, p.num_slots, memory)
    # What a buffer holds that nobody has written.
    for x in (inversion.offsets, inversion.item_offsets, inversion.pairs, inversion.items):
        x.fill_(2**31 - 1)
    agree(agreement, p, plan, tile, group, ids, case.cu_seqlens_q, case.cu_seqlens_k, inversion)
    num_left = int((agreement.leftover[0, : p.num_q_tokens] >= 0).sum())
    assert num_left == 32 * is_one_apart
    invert(
        inversion, agreement.leftover, case.cu_seqlens_q, case.cu_seqlens_k, first_token=0,
        num_tokens=p.num_q_tokens, first_head=0, num_heads=1, chunk_tokens=plan.chunk_tokens,
        block_size=p.block_size, pairs_per_item=plan.tile.pairs_per_item, causal=p.causal, mark_unused=False,
        of_leftover=True,
    )  # fmt: skip
    num_items = inversion.item_offsets[:, -1]
    if is_one_apart:
        assert inversion.offsets[:, -1].sum() == num_left
        assert num_items.max() > 0
    else:
        assert num_items.tolist() == [0] * len(num_items)


def test_groups_that_cut_tiles_change_no_bit(make_case: Callable, device: torch.device, path: str) -> None:
    case = make_case(
        q_lens=(50, 13), num_kv_heads=1, group_size=3, num_slots=6, dtype=torch.float16, head_dim=32
    )
    whole = selected_attention_forward(case.problem, *case.tensors, path=path)
    plan = plan_forward(case.problem, 1, path)
    assert plan.group_tokens < case.problem.num_q_tokens
    assert plan.group_tokens % plan.query_tile.tokens != 0
    cut = selected_attention_forward(case.problem, *case.tensors, path=path, workspace_limit_bytes=1)
    for a, b in zip(whole, cut, strict=True):
        # Partials of other tokens share an item, which numpy's products notice.
        torch.testing.assert_close(a, b, rtol=0, atol=0 if device.type == "cuda" else 2e-3)


@pytest.mark.parametrize("agreed_tokens", [range(480), range(560, 640)])
def test_groups_of_which_some_leave_nothing(
    make_case: Callable, assert_close_to_oracle: Callable, device: torch.device, agreed_tokens: range
) -> None:
    case = make_case(
        q_lens=(640,), num_kv_heads=1, group_size=8, num_slots=8, block_size=16, dtype=torch.float16,
        head_dim=16,
    )  # fmt: skip
    # These choose the first block and their own, the others five more at random: tiles leave most of them,
    # from token 432 on.
    own = torch.arange(640) // 16
    agreed = torch.full((640, 8), -1)
    agreed[:, 0], agreed[:, 1] = 0, torch.where(own > 0, own, -1)
    ids = causal_block_indices(640, 1, 8, 16, "random", torch.Generator().manual_seed(1))[0]
    ids[agreed_tokens.start : agreed_tokens.stop] = agreed[agreed_tokens.start : agreed_tokens.stop].int()
    case = replace(case, block_indices=ids[None].to(device))
    limit_bytes = 2**17
    assert plan_forward(case.problem, limit_bytes, MIXED).group_tokens == 160
    whole = selected_attention_forward(case.problem, *case.tensors, path=MIXED)
    cut = selected_attention_forward(
        case.problem, *case.tensors, path=MIXED, workspace_limit_bytes=limit_bytes
    )  # fmt: skip
    assert_close_to_oracle(*cut, case)
    for a, b in zip(whole, cut, strict=True):
        # Partials of other tokens share an item, which numpy's products notice.
        torch.testing.assert_close(a, b, rtol=0, atol=0 if device.type == "cuda" else 2e-3)


def test_ids_that_no_validation_has_seen_read_no_foreign_memory(
    make_case: Callable, assert_close_to_oracle: Callable, path: str
) -> None:
    case = make_case(q_lens=(40, 24), distribution="ragged", dtype=torch.float16, head_dim=32)
    ids = case.block_indices
    wild = torch.tensor([2**31 - 1, -(2**31), -7, 4], dtype=torch.int32, device=ids.device)
    wild = wild[torch.arange(ids.numel(), device=ids.device) % 4].view_as(ids)
    tensors = (*case.tensors[:3], torch.where(ids == -1, wild, ids), *case.tensors[4:])
    assert_close_to_oracle(*selected_attention_forward(case.problem, *tensors, path=path), case)


def test_a_request_alone_gives_the_bits_it_has_in_company(
    make_case: Callable, device: torch.device, path: str
) -> None:
    if device.type == "cpu":
        pytest.skip("the interpreter multiplies with numpy, whose rows depend on their place in the matrix")
    lens = torch.randint(1, 300, (50,)).tolist()
    company = make_case(q_lens=lens, dtype=torch.bfloat16, distribution="local")
    out, lse = selected_attention_forward(company.problem, *company.tensors, path=path)
    starts = company.cu_seqlens_q.tolist()
    for i, length in enumerate(lens):
        rows = slice(starts[i], starts[i + 1])
        problem = replace(company.problem, num_q_tokens=length, num_k_tokens=length, num_sequences=1)
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=device)
        alone = selected_attention_forward(
            problem, company.q[rows], company.k[rows], company.v[rows],
            company.block_indices[:, rows].contiguous(), cu_seqlens, cu_seqlens, path=path,
        )  # fmt: skip
        assert torch.equal(alone[0], out[rows]), f"request {i}: {length} tokens"
        assert torch.equal(alone[1], lse[rows])
