"""The options of the demonstration, read before anything is started or loaded."""

import argparse
from pathlib import Path

CONTEXT = Path(__file__).resolve().parent.parent / "LICENSE"
PROMPT = "Why is the sky blue? Answer in two sentences."
QUESTION = "In one sentence, what does this text allow me to do?"
BLOCK_SIZES = (16, 32, 64, 128, 256)


def parser(description: str) -> argparse.ArgumentParser:
    """What to ask the model, and how sparse its attention is to be."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--prompt", default=PROMPT, help="of the full run")
    made.add_argument("--context", type=_file, default=CONTEXT, help="text file of the sparse run")
    made.add_argument("--question", default=QUESTION, help="about that text")
    made.add_argument("--max-new-tokens", type=_positive, default=32, metavar="N", help="of an answer")
    made.add_argument("--block-size", type=int, default=32, choices=BLOCK_SIZES, help="tokens")
    made.add_argument(
        "--blocks", type=_positive, default=16, metavar="N", help="that a token attends in the sparse run"
    )
    return made


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 on")
    return int(text)


def _file(text: str) -> Path:
    path = Path(text)
    try:
        path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise argparse.ArgumentTypeError(f"{text!r}: expected a text file ({reason})") from None
    return path
