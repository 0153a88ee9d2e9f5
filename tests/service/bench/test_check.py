"""A benchmark does not measure wrong answers: the check tells them from right ones."""

import numpy as np
import pytest
import torch

from fsa_core.api import selected_attention
from service.bench.check import WrongAnswer, check_answer
from service.bench.workload import Request, Shape, make_request
from service.client import BlockIndices

SHAPE = Shape(128, 4, 2, 32, block_size=16, slots=3, dtype="float16")


@pytest.fixture
def request_and_answer() -> tuple[Request, np.ndarray]:
    request = make_request(SHAPE, seed=0)
    assert isinstance(request.pattern, BlockIndices)
    q, k, v = (torch.from_numpy(array) for array in (request.q, request.k, request.v))
    out, _ = selected_attention(
        q, k, v, torch.from_numpy(request.pattern.indices), block_size=16, backend="cpu"
    )
    return request, out.numpy()


def test_a_right_answer_passes(request_and_answer: tuple[Request, np.ndarray]) -> None:
    check = check_answer(SHAPE, *request_and_answer)
    assert check.against == "oracle"
    assert check.max_row_error is not None
    assert 0 < check.max_row_error < 2e-3


def test_one_wrong_row_is_found(request_and_answer: tuple[Request, np.ndarray]) -> None:
    request, out = request_and_answer
    out[100, 3] = out[101, 3]
    with pytest.raises(WrongAnswer, match="a row of the answer is off"):
        check_answer(SHAPE, request, out)


def test_a_value_that_is_not_finite_is_found_in_any_shape(
    request_and_answer: tuple[Request, np.ndarray],
) -> None:
    request, out = request_and_answer
    huge = Shape(10**6, 4, 2, 32, block_size=16, slots=3, dtype="float16")
    assert check_answer(huge, request, out).against == "finite"
    out[5, 0, 0] = np.inf
    with pytest.raises(WrongAnswer, match="not finite"):
        check_answer(huge, request, out)
