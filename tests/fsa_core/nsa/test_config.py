import numpy as np
import pytest

from fsa_core.errors import InputError
from fsa_core.nsa.config import NSAConfig


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"kernel_size": 24}, "kernel_size is 24: expected a multiple of stride, 16"),
        ({"stride": 24, "kernel_size": 48}, "block_size is 64: expected a multiple of stride, 24"),
        ({"block_size": 48}, "block_size is 48: expected one of 16, 32, 64, 128, 256"),
        ({"stride": 0}, "stride is 0: expected an integer of at least 1"),
        ({"window": True}, "window is True: expected an integer of at least 1"),
        ({"num_local_blocks": -1}, "num_local_blocks is -1: expected an integer of at least 0"),
        ({"window": 2**63}, f"window is {2**63}: expected an integer of at least 1, at most {2**63 - 1}"),
        (
            {"top_k": 2**70},
            f"top_k is {2**70}: expected an integer of at least 1, at most {2**63 - 1}",
        ),
        ({"top_k": 2}, "top_k is 2: expected from 3, the number of forced blocks, to 4096"),
        ({"top_p": "0.9"}, "top_p is '0.9': expected above 0 and at most 1, or None"),
        ({"top_p": 0.0}, "top_p is 0.0: expected above 0 and at most 1, or None"),
        ({"min_share": 1.5}, "min_share is 1.5: expected above 0 and at most 1, or None"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused_by_field(sizes, message):
    with pytest.raises(InputError, match=message) as error:
        NSAConfig(**sizes)
    field = message.split()[0]
    assert error.value.field == field
    assert error.value.reason == f"INVALID_{field.upper()}"


def test_integers_of_other_kinds_become_plain_ones():
    config = NSAConfig(block_size=np.int64(64), top_k=np.int32(16))
    assert type(config.block_size) is type(config.top_k) is int
    assert config == NSAConfig()
