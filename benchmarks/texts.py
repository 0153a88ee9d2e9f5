"""Real texts that are on any machine that runs the benchmarks, and how a model reads their beginning."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Text:
    """``source`` is for the reader of results. ``copies`` of the beginning follow one another."""

    source: str
    read: Callable[[], str]
    copies: int = 1


def token_ids(text: Text, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> torch.Tensor:
    """int64 [num_tokens]: the beginning of the text, or copies of a shorter one.

    Raises ValueError when the text is too short.
    """
    ids = tokenizer(text.read(), return_tensors="pt", verbose=False)["input_ids"][0]
    wanted = -(-num_tokens // text.copies)
    if len(ids) < wanted:
        raise ValueError(f"{text.source} has {len(ids)} tokens, {wanted} are wanted")
    return ids[:wanted].repeat(text.copies)[:num_tokens]


def _code() -> str:
    return Path(argparse.__file__).read_text(encoding="utf-8")


def _documentation() -> str:
    return topics["specialnames"]


def _licences() -> str:
    files = distribution("numpy").files or []
    whole = min((f for f in files if f.name == "LICENSE.txt"), key=lambda f: len(f.parts))
    return whole.read_text(encoding="utf-8")


TEXTS = {
    "code": Text("argparse.py of Python's standard library", _code),
    "documentation": Text("Special method names, of Python's language reference", _documentation),
    "licences": Text("the licences in numpy's wheel", _licences),
    # What was read once is to be found again: the best that choosing blocks can do for a model.
    "repeated": Text("the beginning of documentation, twice", _documentation, copies=2),
}
