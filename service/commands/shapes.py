"""Shapes of selected attention as the command line names them: ``q_heads=16,kv_heads=4,head_dim=128,...``."""

from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.failures import WrongUsage

if TYPE_CHECKING:
    from fsa_core.problem import Problem

SHAPE_METAVAR = "q_heads=N,kv_heads=N,head_dim=N,block_size=N,slots=N[,dtype=NAME][,...]"

# No size is larger, and torch's own are 64 bits, several of them multiplied.
MOST = 1 << 30

Tokens = Annotated[str, typer.Option(help="Lengths of the sequence, with commas between.")]


@dataclass(frozen=True, slots=True)
class CallShape:
    """Everything of a call but its length. ``value_dim`` and ``index_heads`` 0: head_dim and kv_heads.

    ``query_block_size``: queries that share a row of indices.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    slots: int
    dtype: str = "bfloat16"
    value_dim: int = 0
    index_heads: int = 0
    query_block_size: int = 1

    @classmethod
    def parse(cls, text: str) -> "CallShape":
        """Raises WrongUsage."""
        known = {field.name: field for field in fields(cls)}
        given: dict[str, int | str | None] = {}
        for part in text.split(","):
            name, _, value = part.partition("=")
            if name not in known:
                raise WrongUsage(f"--shape has {part!r}; it takes {', '.join(known)}, each as name=value")
            given[name] = value if name == "dtype" else _number(value)
            if given[name] is None:
                raise WrongUsage(f"--shape has {name}={value}; it must be a number up to {MOST}")
        missing = [name for name, field in known.items() if field.default is MISSING and name not in given]
        if missing:
            raise WrongUsage(f"--shape has no {', '.join(missing)}")
        return cls(**given)  # type: ignore[arg-type]

    def problem(self, num_tokens: int) -> "Problem":
        """One causal sequence of this shape. Raises WrongUsage where it breaks the library's contract."""
        import torch

        from fsa_core.validation import InputError, validate_selected

        dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
        if self.dtype not in dtypes:
            raise WrongUsage(f"--shape has dtype={self.dtype}; it can be {', '.join(dtypes)}")

        def tensor(*shape: int, dtype: torch.dtype = dtypes[self.dtype]) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        # A query_block_size of 0 is refused below.
        num_rows = -(-num_tokens // max(self.query_block_size, 1))
        try:
            return validate_selected(
                tensor(num_tokens, self.q_heads, self.head_dim),
                tensor(num_tokens, self.kv_heads, self.head_dim),
                tensor(num_tokens, self.kv_heads, self.value_dim or self.head_dim),
                tensor(self.index_heads or self.kv_heads, num_rows, self.slots, dtype=torch.int32),
                block_size=self.block_size,
                cu_seqlens_q=None,
                cu_seqlens_k=None,
                softmax_scale=None,
                causal=True,
                query_block_size=self.query_block_size,
                check_values=False,
            )
        except InputError as error:
            raise WrongUsage(f"--shape: {error}") from error
        except RuntimeError as error:
            # How torch says so.
            raise WrongUsage(f"--shape: no tensor of {num_tokens} tokens can be that large") from error


def parse_tokens(text: str) -> list[int]:
    """Raises WrongUsage."""
    values = [_number(part) or 0 for part in text.split(",")]
    if min(values) < 1:
        raise WrongUsage(
            f"--tokens is {text!r}; it must be positive integers up to {MOST}, such as 8192,65536"
        )
    return values


def _number(text: str) -> int | None:
    """None where it is none, or more than MOST; Python refuses to read thousands of digits."""
    is_number = text.isdecimal() and len(text) <= 20 and int(text) <= MOST
    return int(text) if is_number else None
