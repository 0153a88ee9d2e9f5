"""Is the server's answer right? A benchmark of wrong answers says nothing."""

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from service.bench.workload import Request, Shape
from service.client import BlockIndices

# Scores that the oracle may compute: a second or two.
_MAX_SCORES = 64_000_000
_EPSILON = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 2**-23}


class WrongAnswer(Exception):
    """The server answered, and not with the attention of the request."""


@dataclass(frozen=True, slots=True)
class Check:
    """How an answer was checked: "oracle" or "finite"; the error is that of the worst row, relative."""

    against: str
    max_row_error: float | None


def check_answer(shape: Shape, request: Request, out: NDArray[np.generic]) -> Check:
    """Checks one answer: against the float64 oracle where fsa_core is installed and the shape is small,
    for finite numbers always. Raises WrongAnswer."""
    answer = out.astype(np.float32)
    if not np.isfinite(answer).all():
        raise WrongAnswer("the answer has values that are not finite")
    if shape.tokens**2 * shape.q_heads > _MAX_SCORES or find_spec("torch") is None:
        return Check("finite", None)
    expected = _oracle(shape, request)
    error = np.linalg.norm(answer - expected, axis=-1)
    worst = float((error / np.linalg.norm(expected, axis=-1)).max())
    # Rounding of the answer and of the probabilities; float32 may be computed in TF32.
    allowed = 4 * max(_EPSILON[shape.dtype], 2**-10)
    if worst > allowed:
        raise WrongAnswer(f"a row of the answer is off by {worst:.2g} of its norm; {allowed:.2g} is allowed")
    return Check("oracle", worst)


def _oracle(shape: Shape, request: Request) -> NDArray[np.float32]:
    import torch

    from fsa_core.api import dense_attention, selected_attention

    q, k, v = (torch.from_numpy(array.astype(np.float32)) for array in (request.q, request.k, request.v))
    if isinstance(request.pattern, BlockIndices):
        indices = torch.from_numpy(request.pattern.indices)
        out, _ = selected_attention(q, k, v, indices, block_size=shape.block_size, backend="reference")
    else:
        out, _ = dense_attention(q, k, v, backend="reference")
    return np.asarray(out.float())
