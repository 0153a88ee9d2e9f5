"""The choice of a path: from the request's own shape and the table of the device, with its reason."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fsa_core import dispatch, tuning_table
from fsa_core.dispatch import AUTO, choose
from fsa_core.plan import KV_MAJOR, MIXED, PATHS, QUERY_TILE
from fsa_core.problem import Problem
from fsa_core.tiles import PartialTuning, SharedTuning, Tuning, default_tuning
from fsa_core.tuning_table import ENVIRONMENT_VARIABLE, Entry, Shape, Table

DEVICE = "Test GPU"
PROBLEM = Problem(
    num_q_tokens=100,
    num_k_tokens=200,
    num_sequences=1,
    num_q_heads=8,
    num_kv_heads=2,
    head_dim=128,
    value_dim=128,
    dtype=torch.bfloat16,
    index_heads=2,
    num_slots=16,
    block_size=64,
    causal=True,
    softmax_scale=0.1,
)
SHAPE = Shape.of(PROBLEM)
TUNING = Tuning(PartialTuning(128, 2, 8, 200), SharedTuning(32, 2, 160, 3, 8))


@pytest.fixture(autouse=True)
def _no_tables_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tables are read once a process; a test has its own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    for cached in (dispatch.choose, dispatch._nearest, tuning_table.table_for):
        cached.cache_clear()
    yield
    for cached in (dispatch.choose, dispatch._nearest, tuning_table.table_for):
        cached.cache_clear()


@pytest.fixture
def use_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def use(*entries: Entry) -> None:
        file = tmp_path / "table.json"
        file.write_text(Table("test-gpu", entries, {}).to_json())
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(file))

    return use


def test_a_device_without_a_table_goes_kv_major_with_the_defaults_and_says_so() -> None:
    choice = choose(PROBLEM, "Unheard-of 9000")
    assert (choice.path, choice.tuning) == (KV_MAJOR, default_tuning(PROBLEM))
    assert choice.reason == "no table for Unheard-of 9000: defaults"


def test_the_entry_of_the_shape_decides_path_and_sizes(use_table) -> None:
    use_table(
        Entry(replace(SHAPE, heads_per_pair=8), QUERY_TILE, default_tuning(PROBLEM)),
        Entry(SHAPE, MIXED, TUNING),
    )
    choice = choose(PROBLEM, DEVICE)
    assert (choice.path, choice.tuning) == (MIXED, TUNING)
    assert choice.reason.startswith("table test-gpu, entry g=4 D=128 16-bit up to 16 blocks of 64")


def test_gradients_have_a_path_of_their_own_unless_one_is_asked_for(use_table) -> None:
    use_table(Entry(SHAPE, KV_MAJOR, TUNING, backward_path=MIXED))
    assert (choose(PROBLEM, DEVICE).path, choose(PROBLEM, DEVICE).backward_path) == (KV_MAJOR, MIXED)
    assert choose(PROBLEM, DEVICE, KV_MAJOR).backward_path == KV_MAJOR
    # More keys than tiles have numbers for, and queries that share a row.
    assert choose(replace(PROBLEM, num_k_tokens=2**28), DEVICE).backward_path == KV_MAJOR
    assert choose(replace(PROBLEM, query_block_size=64), DEVICE).backward_path == QUERY_TILE


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"num_q_heads": 2}, QUERY_TILE),
        ({"num_q_heads": 4}, MIXED),
        ({"num_q_heads": 32}, MIXED),
        ({"num_slots": 70}, MIXED),
        ({"head_dim": 96, "value_dim": 100}, MIXED),
        ({"index_heads": 8}, QUERY_TILE),
        ({"dtype": torch.float16}, MIXED),
    ],
    ids=str,
)
def test_between_entries_the_nearest_decides(use_table, changes: dict, path: str) -> None:
    """One is for 1 query head a row of indices, one for 4."""
    one_head = Entry(replace(SHAPE, heads_per_pair=1), QUERY_TILE, default_tuning(PROBLEM))
    use_table(one_head, Entry(SHAPE, MIXED, TUNING))
    assert choose(replace(PROBLEM, **changes), DEVICE).path == path


@pytest.mark.parametrize("changes", [{"head_dim": 64}, {"value_dim": 256}, {"dtype": torch.float32}], ids=str)
def test_sizes_are_not_carried_over_to_tiles_of_another_width(use_table, changes: dict) -> None:
    use_table(Entry(SHAPE, MIXED, TUNING))
    problem = replace(PROBLEM, **changes)
    choice = choose(problem, DEVICE)
    assert (choice.path, choice.tuning) == (KV_MAJOR, default_tuning(problem))
    assert "no entry" in choice.reason


def test_company_changes_no_choice(use_table) -> None:
    """What packing changes: lengths, sequences, and slots up to the longest row of a class."""
    entries = [
        Entry(replace(SHAPE, max_slots=slots), path, TUNING)
        for slots, path in ((32, KV_MAJOR), (16, QUERY_TILE), (64, MIXED))
    ]
    use_table(*entries)
    packed = replace(PROBLEM, num_q_tokens=10**7, num_k_tokens=10**7, num_sequences=500)
    assert choose(packed, DEVICE) == choose(PROBLEM, DEVICE)
    for num_slots, path in ((1, QUERY_TILE), (16, QUERY_TILE), (17, KV_MAJOR), (32, KV_MAJOR), (33, MIXED)):
        assert choose(replace(packed, num_slots=num_slots), DEVICE).path == path


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        # The 32 rows of a tile hold 8 tokens of 4 heads, or 10 of 3; tiles of 7 and of 8 are more than half.
        ({"query_block_size": 8}, QUERY_TILE),
        ({"query_block_size": 7}, QUERY_TILE),
        ({"query_block_size": 4}, MIXED),
        ({"query_block_size": 11}, MIXED),
        ({"query_block_size": 64, "num_q_heads": 6}, QUERY_TILE),
        # More than a program sorts: a row needs no sorting.
        ({"query_block_size": 64, "num_slots": 4096}, QUERY_TILE),
        # A token fills a tile by itself.
        ({"query_block_size": 1, "num_q_heads": 64}, MIXED),
        ({"query_block_size": 2, "num_q_heads": 64}, QUERY_TILE),
        ({"query_block_size": 64, "num_k_tokens": 2**28}, KV_MAJOR),
    ],
    ids=str,
)
def test_query_tiles_take_the_queries_that_share_a_row_and_fill_them(
    use_table, changes: dict, path: str
) -> None:
    use_table(Entry(SHAPE, MIXED, TUNING))
    problem = replace(PROBLEM, **changes)
    choice = choose(problem, DEVICE)
    assert (choice.path, choice.tuning) == (path, TUNING)
    shared = f"{problem.query_block_size} queries share a row; sizes: table test-gpu"
    assert choice.reason.startswith(shared) == (path == QUERY_TILE)
    assert choose(problem, DEVICE, MIXED).path == MIXED


@pytest.mark.parametrize("path", PATHS)
def test_a_named_path_is_kept_with_the_sizes_of_the_shape(use_table, path: str) -> None:
    use_table(Entry(SHAPE, MIXED, TUNING))
    choice = choose(PROBLEM, DEVICE, path)
    assert (choice.path, choice.tuning) == (path, TUNING)
    assert choice.reason.startswith("asked for; sizes: table test-gpu")


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(
        ValueError, match="path is 'union': expected one of auto, kv_major, query_tile, mixed"
    ):
        choose(PROBLEM, DEVICE, "union")


def test_where_query_tiles_cannot_number_the_blocks_auto_goes_kv_major(use_table) -> None:
    use_table(Entry(SHAPE, MIXED, TUNING))
    choice = choose(replace(PROBLEM, num_k_tokens=2**28), DEVICE, AUTO)
    assert choice.path == KV_MAJOR
    assert choice.reason.startswith("too many keys for mixed")


@pytest.mark.parametrize("group_size", [1, 4, 16])
def test_an_h200_has_a_shipped_table(group_size: int) -> None:
    choice = choose(replace(PROBLEM, num_q_heads=2 * group_size), "NVIDIA H200")
    assert choice.reason.startswith("table nvidia-h200, ")
