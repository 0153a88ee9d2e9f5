import pytest
import torch

from fsa_core.cpu import selected_attention_cpu
from fsa_core.cpu_threads import share

TWO_THREADS = pytest.mark.parametrize("threads", [2], indirect=True)


@TWO_THREADS
@pytest.mark.usefixtures("threads")
def test_every_item_is_worked_on_once_with_one_of_torchs_threads_each():
    seen = []

    def work(items):
        seen.extend((item, torch.get_num_threads(), torch.is_grad_enabled()) for item in items)

    share(range(50), work)
    assert sorted(seen) == [(item, 1, False) for item in range(50)]
    assert torch.get_num_threads() == 2


@TWO_THREADS
@pytest.mark.usefixtures("threads")
def test_an_error_of_a_thread_reaches_the_caller_and_leaves_the_threads_as_they_were():
    def work(items):
        raise ValueError(f"cannot do {next(items)}")

    with pytest.raises(ValueError, match="cannot do 0"):
        share([0], work)
    with pytest.raises(ValueError, match=r"cannot do [01]"):
        share([0, 1, 2], work)
    assert torch.get_num_threads() == 2


@TWO_THREADS
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_an_answer_does_not_depend_on_the_threads_or_on_autograds_mode(case_on_cpu, mode):
    case = case_on_cpu(q_lens=(300, 40), num_kv_heads=3, group_size=3)
    case.q.requires_grad_()
    with mode():
        got = selected_attention_cpu(case.problem, *case.tensors, workspace_limit_bytes=100_000)
    case.q.requires_grad_(False)
    torch.set_num_threads(1)
    expected = selected_attention_cpu(case.problem, *case.tensors, workspace_limit_bytes=100_000)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
