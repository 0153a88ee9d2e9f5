"""What the attention hook hands on, and what it refuses."""

import attention_hook
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface


def registered(attend: attention_hook.Attend) -> tuple:
    attention_hook.register("of_a_test", attend)
    return AttentionInterface()["of_a_test"], AttentionMaskInterface()["of_a_test"]


def test_heads_and_tokens_change_places_and_back() -> None:
    seen = []

    def attend(q, k, v, softmax_scale):
        seen.extend((q, k, v, softmax_scale))
        return 2 * q

    attention, _ = registered(attend)
    query, key, value = torch.randn(1, 6, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    out, weights = attention(None, query, key, value, None, scaling=0.25, dropout=0.0)
    q, k, v, softmax_scale = seen
    assert torch.equal(q, query[0].transpose(0, 1))
    assert torch.equal(k, key[0].transpose(0, 1))
    assert torch.equal(v, value[0].transpose(0, 1))
    assert softmax_scale == 0.25
    assert torch.equal(out, 2 * query.transpose(1, 2))
    assert weights is None


def test_batches_and_padding_are_refused() -> None:
    attention, mask = registered(lambda q, k, v, softmax_scale: q)
    batch = torch.zeros(2, 1, 3, 8)
    with pytest.raises(ValueError, match="one sequence at a time, not 2"):
        attention(None, batch, batch, batch, None)
    with pytest.raises(ValueError, match="padded"):
        mask(attention_mask=torch.tensor([[0, 1, 1]]))
    assert mask(attention_mask=torch.ones(1, 3)) is None
