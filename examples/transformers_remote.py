"""A transformers model whose attention is computed by the service.

    python examples/transformers_remote.py --target 127.0.0.1:50051

SmolLM2-135M runs here, on the CPU; every layer sends its q, k and v to the server. Two runs:

- full: every block of the context is selected, so the text and the logits must be those of local attention;
- sparse: a long context, of which each token attends the first block, its own, the one before, and those
  whose mean key fits its query best.

Exits 1 when the full run disagrees with local attention.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import attention_hook
import options
import smollm2
import stages
import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from service.client import AttentionClient, AttentionError

NAME = "fsa_remote"
# Two correct float32 implementations differ by rounding alone: that is how far transformers' own eager and
# SDPA attention are apart. Another order of summation may reach a few times that, and a wrong block,
# mask or scale is off by orders of magnitude.
ROUNDING_FACTOR = 8.0

console = Console()

Select = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def all_blocks(q: torch.Tensor, k: torch.Tensor, block_size: int) -> torch.Tensor:
    """Every block up to the token's own: q [Tq, Hq, D], k [Tk, Hkv, D] -> int32 [1, Tq, blocks]."""
    own = _own_blocks(q, k, block_size)
    blocks = torch.arange(int(own[-1]) + 1)
    return torch.where(blocks <= own[:, None], blocks, -1).to(torch.int32)[None]


def best_blocks(num_blocks: int) -> Select:
    """At most ``num_blocks`` a token and KV head, without training.

    Forced: the first block, the token's own and the one before it. The others by the dot product of their
    mean key with the sum of the queries that share the KV head.
    """

    def select(q: torch.Tensor, k: torch.Tensor, block_size: int) -> torch.Tensor:
        own = _own_blocks(q, k, block_size)[:, None]
        starts = range(0, len(k), block_size)
        mean_keys = torch.stack([k[start : start + block_size].mean(0) for start in starts])
        queries = q.unflatten(1, (k.shape[1], -1)).sum(2)
        scores = torch.einsum("thd,bhd->htb", queries, mean_keys)
        blocks = torch.arange(len(mean_keys))
        forced = (blocks == 0) | (blocks >= own - 1)
        scores.masked_fill_(forced, torch.inf).masked_fill_(blocks > own, -torch.inf)
        best, indices = scores.topk(min(num_blocks, len(mean_keys)))
        return indices.masked_fill(best == -torch.inf, -1).sort().values.to(torch.int32)

    return select


def _own_blocks(q: torch.Tensor, k: torch.Tensor, block_size: int) -> torch.Tensor:
    """The block that each query token lies in; the queries are the last tokens of the sequence."""
    return torch.arange(len(k) - len(q), len(k)) // block_size


class RemoteAttention:
    """Attention that asks the service, and counts what was attended."""

    def __init__(self, client: AttentionClient, select: Select, block_size: int) -> None:
        self._client = client
        self._select = select
        self._block_size = block_size
        self.on_call: Callable[[], object] = lambda: None
        self.last_blocks = 0.0  # mean over the rows of the last call: one row a KV head when decoding
        self.last_context_blocks = 0

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float | None
    ) -> torch.Tensor:
        """q [Tq, Hq, D], k and v [Tk, Hkv, D], the cache included -> [Tq, Hq, D]."""
        indices = self._select(q, k, self._block_size)
        result = self._client.selected_attention(
            q, k, v, indices, block_size=self._block_size, softmax_scale=softmax_scale
        )
        self.last_blocks = (indices >= 0).sum(-1).float().mean().item()
        self.last_context_blocks = -(-len(k) // self._block_size)
        self.on_call()
        return result.out


@dataclass(frozen=True)
class Generation:
    """What greedy decoding gave. ``logits``: [new tokens, vocabulary]."""

    tokens: torch.Tensor
    logits: torch.Tensor
    seconds: float

    def apart(self, other: "Generation") -> tuple[float, int]:
        """Largest absolute difference of logits, and over how many steps: those with the same input."""
        steps = min(len(self.tokens), len(other.tokens))
        differs = (self.tokens[:steps] != other.tokens[:steps]).nonzero()
        steps = int(differs[0]) + 1 if len(differs) else steps
        return (self.logits[:steps] - other.logits[:steps]).abs().max().item(), steps


@dataclass(frozen=True)
class Chat:
    """A model, its tokenizer and how many tokens an answer may have."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int

    def encode(self, text: str) -> torch.Tensor:
        """The prompt of one user message: int64 [1, tokens]."""
        messages = [{"role": "user", "content": text}]
        encoded = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return encoded["input_ids"]

    def answer(self, prompt: torch.Tensor, attention: str) -> Generation:
        """Greedy decoding with the attention function of that name."""
        self.model.set_attn_implementation(attention)
        start = time.perf_counter()
        output = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens, logits = output.sequences[0, prompt.shape[1] :], torch.cat(output.logits)
        return Generation(tokens, logits, time.perf_counter() - start)

    def remote_answer(self, prompt: torch.Tensor, remote: RemoteAttention, title: str) -> Generation:
        """The same with every layer's attention computed by the service."""
        attention_hook.register(NAME, remote)
        with progress_bar(title, self.max_new_tokens * self.model.config.num_hidden_layers) as advance:
            remote.on_call = advance
            return self.answer(prompt, NAME)

    def panel(self, title: str, generation: Generation) -> Panel:
        """The text as it is shown."""
        text = Text(self.tokenizer.decode(generation.tokens, skip_special_tokens=True).strip())
        return Panel(text, title=f"{title}, {generation.seconds:.1f} s", title_align="left")


def compare_full(chat: Chat, client: AttentionClient, question: str, block_size: int) -> bool:
    """Full selection against local attention: prints both, says whether they agree."""
    prompt = chat.encode(question)
    with step("Local attention: eager and SDPA, for the scale of rounding"):
        local, eager = chat.answer(prompt, "sdpa"), chat.answer(prompt, "eager")
    remote = chat.remote_answer(
        prompt, RemoteAttention(client, all_blocks, block_size), "Remote attention, all blocks"
    )
    error, steps = remote.apart(local)
    rounding, _ = eager.apart(local)
    bound = ROUNDING_FACTOR * rounding
    agree = error <= bound  # not for a NaN

    console.print(chat.panel("local attention", local), chat.panel("remote attention", remote))
    table = Table("logits, largest absolute difference", "", title_justify="left")
    table.add_row(f"remote - local SDPA, over {steps} steps", f"{error:.2e}")
    table.add_row("local eager - local SDPA: rounding", f"{rounding:.2e}")
    table.add_row(f"bound: {ROUNDING_FACTOR:g} x rounding", f"{bound:.2e}")
    table.add_row("largest logit", f"{local.logits.abs().max():.1f}")
    console.print(table)
    console.print("[green]Full selection and local attention agree." if agree else "[bold red]They disagree.")
    return agree


def show_sparse(chat: Chat, client: AttentionClient, text: str, block_size: int, num_blocks: int) -> None:
    """A long context of which only some blocks are attended: prints the answer and how many."""
    prompt = chat.encode(text)
    with step(f"Local attention over {prompt.shape[1]} tokens"):
        local = chat.answer(prompt, "sdpa")
    attention = RemoteAttention(client, best_blocks(num_blocks), block_size)
    remote = chat.remote_answer(prompt, attention, f"Remote attention over {prompt.shape[1]} tokens, sparse")
    console.print(chat.panel("local, all blocks", local), chat.panel("remote, sparse", remote))
    distance = (remote.logits[0] - local.logits[0]).abs().max().item()
    console.print(
        f"Each new token attended {attention.last_blocks:.0f} of the {attention.last_context_blocks} blocks "
        f"of {block_size} tokens; the logits of the first one are {distance:.2f} apart."
    )


@contextmanager
def step(title: str) -> Iterator[None]:
    """A spinner with the time while the block runs, a line with its time after."""
    start = time.perf_counter()
    if not console.is_terminal:
        console.print(f"{title} ...")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(title)
        yield
    console.print(f"{title}: {time.perf_counter() - start:.1f} s")


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar over the attention calls; an answer that ends early leaves it short of the total."""
    if not console.is_terminal:
        console.print(f"{title} ...")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


def main(arguments: list[str] | None = None) -> int:
    parser = options.parser(__doc__.splitlines()[0])
    parser.add_argument("--target", default="127.0.0.1:50051", help="the server's gRPC address")
    parser.add_argument("--metrics-url", default="http://127.0.0.1:9464/metrics", help="its metrics")
    given = parser.parse_args(arguments)

    with AttentionClient(given.target) as client:
        first_time = "" if smollm2.cache_folder().exists() else ", converting it this once: half a minute"
        with step(f"Loading SmolLM2-135M{first_time}"):
            chat = Chat(*smollm2.load(), given.max_new_tokens)
        try:
            agree = compare_full(chat, client, given.prompt, given.block_size)
            context = given.context.read_text()
            show_sparse(chat, client, f"{context}\n\n{given.question}", given.block_size, given.blocks)
        except AttentionError as error:
            console.print(f"{given.target}: {error}", style="bold red", markup=False)
            return 1
    console.print(stages.table(stages.read(given.metrics_url)))
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
