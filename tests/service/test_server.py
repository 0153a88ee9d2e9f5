"""The whole way of a request through a real server process, against the oracle."""

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from fsa_core.patterns import from_vertical_slash
from service.malloc import ENVIRONMENT
from service.metrics import STAGE_FIELDS
from service.pb.fsa.v1 import attention_pb2
from tests import pattern_messages
from tests.pattern_messages import block_csr, block_mask, vertical_slash
from tests.serving import (
    Refusal,
    ServerProcess,
    eventually,
    refusal_of,
    request_of,
    running_server,
    tensor_message,
    tensor_of,
)

Case = Any
MakeCase = Callable[..., Case]

SHAPES: dict[str, dict[str, Any]] = {
    "fp16": {"dtype": torch.float16},
    "bf16": {"dtype": torch.bfloat16},
    "fp32": {"dtype": torch.float32},
    "dense": {"dense": True, "dtype": torch.float16},
    "dense, chunked": {"dense": True, "q_lens": (3, 20), "k_lens": (50, 21)},
    "not causal": {"causal": False, "distribution": "ragged"},
    "chunked prefill": {"q_lens": (1, 30), "k_lens": (90, 64)},
    "empty rows": {"distribution": "empty_rows", "dtype": torch.float16},
    "one index head": {"index_heads": 1, "group_size": 3},
    "an index head a query head": {"index_heads": 4, "distribution": "ragged"},
    "dims that are no powers of two": {"head_dim": 80, "value_dim": 48, "dtype": torch.bfloat16},
    "large logits": {"q_scale": 16.0, "dtype": torch.float16},
    "more than a mebibyte": {"q_lens": (600,), "head_dim": 128},
    "many sequences": {"q_lens": (1, 0, 17, 2, 40, 1), "block_size": 32},
    "a scale": {"softmax_scale": 0.7, "block_size": 64},
}


def answer(server: ServerProcess, case: Case, **fields: Any) -> tuple[torch.Tensor, torch.Tensor]:
    response = server.attend(request_of(case, **fields))
    return tensor_of(response.out), tensor_of(response.lse)


def refused(call: Callable[[], object]) -> Refusal:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return refusal_of(caught.value)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_served_answers_are_right(
    server: ServerProcess,
    make_case: MakeCase,
    assert_close_to_oracle: Callable[..., None],
    shape: dict[str, Any],
) -> None:
    case = make_case(**shape)
    out, lse = answer(server, case)
    assert_close_to_oracle(out.to(case.q.device), lse.to(case.q.device), case)


def test_rows_for_blocks_of_queries_are_served(server: ServerProcess, make_case: MakeCase) -> None:
    case = make_case(q_lens=(64,), dtype=torch.float16, num_slots=2)
    # What a block of 16 queries shares is what its every token would say for itself.
    rows = torch.tensor([[0, -1], [0, 1], [2, 0], [1, 3]], dtype=torch.int32).expand(2, -1, -1)
    case.block_indices.copy_(rows.repeat_interleave(16, dim=1))
    expected = server.attend(request_of(case))
    shared = request_of(case)
    shared.pattern.block_indices.indices.CopyFrom(tensor_message(rows.contiguous()))
    shared.pattern.block_indices.query_block_size = 16
    assert server.attend(shared).out == expected.out


def test_one_selection_gets_one_answer_however_it_is_said_and_whoever_it_rides_with(
    server: ServerProcess, make_case: MakeCase
) -> None:
    case = make_case(q_lens=(64, 20), k_lens=(90, 64), dtype=torch.float16)
    columns, diagonals = torch.tensor([[0, 40], [17, -1]]).int(), torch.tensor([[0, 20], [33, 1]]).int()
    starts = {"cu_seqlens_q": case.cu_seqlens_q.cpu(), "cu_seqlens_k": case.cu_seqlens_k.cpu()}
    from_columns = from_vertical_slash(columns, diagonals, block_size=16, **starts).indices
    # A row for 16 queries: four of the first sequence, two of the second.
    shared = (
        torch.tensor([[0, 2], [1, 3], [0, 4], [2, 5], [0, 1], [1, 3]]).int().expand(2, -1, -1).contiguous()
    )
    same = [
        [pattern_messages.block_indices(from_columns, 16), vertical_slash(columns, diagonals, 16)],
        [
            pattern_messages.block_indices(shared, 16, 16),
            block_csr(shared, 16, 16),
            block_mask(shared, 16, 16, num_blocks=6),
        ],
    ]
    requests = [request_of(case) for pattern in itertools.chain(*same)]
    for request, pattern in zip(requests, itertools.chain(*same), strict=True):
        request.pattern.CopyFrom(pattern)
    alone = [server.attend(request) for request in requests]
    with server.frozen_worker():
        calls = [server.start_call(request.SerializeToString()) for request in requests * 2]
        eventually(lambda: server.metrics()["fsa_queue_depth",] >= len(requests), what="requests queue up")
    together = [attention_pb2.AttendResponse.FromString(call.result()) for call in calls]
    assert max(response.timings.batch_requests for response in together) > len(requests) // 2
    for index, response in enumerate(together):
        first = alone[0] if index % len(requests) < len(same[0]) else alone[len(same[0])]
        assert (response.out, response.lse) == (first.out, first.lse), index


def test_no_tokens_give_an_empty_answer(server: ServerProcess, make_case: MakeCase) -> None:
    out, lse = answer(server, make_case(q_lens=(0,), k_lens=(20,)))
    assert (tuple(out.shape), tuple(lse.shape)) == ((0, 4, 64), (0, 4))


def test_a_request_without_a_deadline_is_served(server: ServerProcess, make_case: MakeCase) -> None:
    assert server.attend(request_of(make_case()), timeout=None).HasField("out")


def test_the_log_sum_exp_comes_only_when_asked_for(server: ServerProcess, make_case: MakeCase) -> None:
    request = request_of(make_case())
    request.return_lse = False
    assert not server.attend(request).HasField("lse")


def test_a_request_has_the_id_of_its_message_its_header_or_a_new_one(
    server: ServerProcess, make_case: MakeCase
) -> None:
    header = {"metadata": [("x-request-id", "from-header")]}
    with_id, without = request_of(make_case(), request_id="from-message"), request_of(make_case())
    assert server.attend(with_id, **header).request_id == "from-message"
    assert server.attend(without, **header).request_id == "from-header"
    made = [server.attend(without).request_id for _ in range(2)]
    assert len(set(made)) == 2
    with_id.q.dtype = 0
    error = refused(lambda: server.attend(with_id, **header))
    assert error.metadata["request_id"] == "from-message"
    assert all(f'"{name}"' in server.log.read_text() for name in ("from-message", "from-header", made[0]))


def test_timings_of_the_responses_are_the_metrics(server: ServerProcess, make_case: MakeCase) -> None:
    def stage_sums() -> dict[str, float]:
        found = server.metrics()
        return {stage: found["fsa_request_stage_duration_seconds_sum", stage] for stage in STAGE_FIELDS}

    requests = [request_of(make_case(q_lens=(n,))) for n in (5, 50, 400, 2000)]
    before = stage_sums()
    timings = [server.attend(request).timings for request in requests]
    after = stage_sums()
    for stage, field in STAGE_FIELDS.items():
        told = sum(getattr(timing, field) for timing in timings)
        assert after[stage] - before[stage] == pytest.approx(told, rel=1e-6), stage
    for timing in timings:
        parts = sum(getattr(timing, field) for field in STAGE_FIELDS.values())
        # All but the hand-over between threads and the message's own frame.
        assert parts <= timing.total <= parts + 0.02
        assert timing.batch_requests == 1
        assert all(getattr(timing, field) > 0 for field in ("receive", "kernel", "send"))


def test_requests_and_refusals_are_counted(server: ServerProcess, make_case: MakeCase) -> None:
    def counts() -> list[float]:
        found = server.metrics()
        names = [
            ("fsa_requests_total", "OK", "Attend"),
            ("fsa_requests_total", "INVALID_ARGUMENT", "Attend"),
            ("fsa_rejected_total", "MALFORMED_MESSAGE"),
            ("fsa_request_duration_seconds_count", "Attend"),
        ]
        return [found.get(name, 0.0) for name in names]

    before = counts()
    server.attend(request_of(make_case()))
    refused(lambda: server.call(b"\xff"))
    assert [b - a for a, b in zip(before, counts(), strict=True)] == [1, 1, 1, 2]


def test_answers_do_not_depend_on_the_company(server: ServerProcess, make_case: MakeCase) -> None:
    rng = random.Random(0)
    raws = [request_of(random_case(make_case, rng, seed)).SerializeToString() for seed in range(200)]
    alone = [attention_pb2.AttendResponse.FromString(server.call(raw)) for raw in raws]
    order = rng.sample(range(len(raws)), len(raws))
    with ThreadPoolExecutor(48) as pool:
        # However fast the device: what comes while it stands still rides together afterwards.
        with server.frozen_worker():
            answers = pool.map(lambda i: server.call(raws[i]), order)
            eventually(lambda: server.metrics()["fsa_queue_depth",] >= 16, what="requests queue up")
        together = dict(zip(order, answers, strict=True))
    sizes = []
    for index, raw in together.items():
        response = attention_pb2.AttendResponse.FromString(raw)
        sizes.append(response.timings.batch_requests)
        assert response.out == alone[index].out, index
        assert response.lse == alone[index].lse, index
    assert max(sizes) >= 4, "they did ride together"


def random_case(make_case: MakeCase, rng: random.Random, seed: int) -> Case:
    k_lens = [rng.randint(1, 90) for _ in range(rng.randint(1, 3))]
    kind = rng.choice([{"dense": True}, {"index_heads": 1}, {}, {}, {}])
    return make_case(
        q_lens=[rng.randint(1, length) for length in k_lens],
        k_lens=k_lens,
        dtype=torch.float16,
        num_slots=rng.randint(1, 5),
        distribution=rng.choice(["random", "local", "same", "ragged", "empty_rows"]),
        seed=seed,
        **kind,
    )


def test_a_request_past_its_deadline_or_cancelled_in_the_queue_is_never_started(
    server: ServerProcess, make_case: MakeCase
) -> None:
    raw = request_of(make_case()).SerializeToString()
    started = server.metrics()["fsa_batch_requests_sum",]
    with server.frozen_worker():
        busy = [server.start_call(raw) for _ in range(2)]
        eventually(lambda: server.metrics()["fsa_batch_requests_sum",] == started + 2)
        late, cancelled = server.start_call(raw, timeout=0.3), server.start_call(raw)
        eventually(lambda: server.metrics()["fsa_queue_depth",] == 2)
        cancelled.cancel()
        error = refused(late.result)
        assert error.code == "DEADLINE_EXCEEDED"
        eventually(lambda: server.metrics()["fsa_queue_depth",] == 0)
    for call in busy:
        call.result()
    found = server.metrics()
    assert found["fsa_batch_requests_sum",] == started + 2
    assert found["fsa_requests_total", "DEADLINE_EXCEEDED", "Attend"] == 1
    assert found["fsa_requests_total", "CANCELLED", "Attend"] == 1
    eventually(lambda: server.metrics()["fsa_inflight_bytes", "host"] == 0)


def test_the_server_says_what_it_is_and_its_limits(server: ServerProcess) -> None:
    info = server.info()
    patterns = ["block_indices", "block_csr", "vertical_slash", "select", "dense", "block_mask"]
    assert (info.protocol, list(info.patterns)) == ("fsa.v1", patterns)
    told = [(p.name, p.max_slots, p.shared_rows, p.causal_only) for p in info.pattern_limits]
    assert told == [
        ("block_indices", 1024, True, False),
        ("block_csr", 1024, True, False),
        ("vertical_slash", 1024, False, True),
        ("select", 1024, False, True),
        ("dense", 0, False, False),
        ("block_mask", 1024, True, False),
    ]
    assert {p.name: p.max_kernel_size for p in info.pattern_limits if p.max_kernel_size} == {"select": 256}
    assert [device.up for device in info.devices] == [True]
    assert info.devices[0].memory_bytes > 1 << 28
    assert info.kernels
    assert info.versions["torch"] == torch.__version__
    assert info.limits.max_message_bytes == 512 << 20
    assert list(info.limits.block_sizes) == [16, 32, 64, 128, 256]


def test_the_allocator_is_tuned_in_the_running_process(server: ServerProcess) -> None:
    environment = Path(f"/proc/{server.pid}/environ").read_bytes().decode().split("\0")
    assert {f"{name}={value}" for name, value in ENVIRONMENT.items()} <= set(environment)


def test_budgets_and_limits_hold_on_the_wire(
    tmp_path: Path, make_case: MakeCase, device: torch.device
) -> None:
    settings = {
        "max_inflight_requests": 2,
        "max_message_bytes": 1 << 20,
        "max_tokens": 500,
        "max_batch_requests": 1,
        "reflection": True,
        "devices": device.type,
    }
    with running_server(tmp_path / "log", **settings) as server:
        server.wait_for_health()
        request = request_of(make_case())
        with server.frozen_worker():
            busy = [server.start_call(request.SerializeToString()) for _ in range(2)]
            eventually(lambda: server.metrics()["fsa_inflight_bytes", "host"] > 0)
            eventually(lambda: server.metrics()["fsa_batch_requests_sum",] == 2)
            full = refused(lambda: server.attend(request))
            assert (full.code, full.reason) == ("RESOURCE_EXHAUSTED", "BUDGET_EXHAUSTED")
            assert full.retry_after_seconds
            assert server.health() == "SERVING", "a full server is not a broken one"
        for call in busy:
            call.result()
        server.attend(request)

        long = refused(lambda: server.attend(request_of(make_case(q_lens=(501,), head_dim=16))))
        assert (long.code, long.reason) == ("RESOURCE_EXHAUSTED", "LIMIT_EXCEEDED")
        assert long.metadata | {"limit": "max_tokens", "value": "501", "max": "500"} == long.metadata
        assert long.retry_after_seconds is None
        large = refused(lambda: server.call(b"\0" * ((1 << 20) + 1)))
        assert (large.reason, large.metadata["limit"]) == ("LIMIT_EXCEEDED", "max_message_bytes")
        assert refused(lambda: server.call(b"\0" * (20 << 20))).code == "RESOURCE_EXHAUSTED"
        wide = request_of(make_case(q_lens=(500,), k_lens=(64,), head_dim=16, value_dim=256))
        answer = refused(lambda: server.attend(wide))
        assert (answer.reason, answer.metadata["limit"]) == ("LIMIT_EXCEEDED", "max_message_bytes")
        assert answer.message.startswith("the answer has ")
        assert server.metrics()["fsa_rejected_total", "LIMIT_EXCEEDED"] == 3
        assert_reflection_lists(server, "fsa.v1.AttentionService")


def assert_reflection_lists(server: ServerProcess, service: str) -> None:
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    assert service in ProtoReflectionDescriptorDatabase(server.channel).get_services()


@pytest.mark.parametrize("method", ["/nothing", "/fsa.v1.AttentionService/Nothing", "/a.b/c"])
def test_a_method_that_there_is_not_is_unimplemented(server: ServerProcess, method: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        server.call(b"", method=method)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_taken_port_is_a_clear_error(server: ServerProcess) -> None:
    settings = {"FSA_PORT": str(server.port), "FSA_METRICS_PORT": "0", "FSA_DEVICES": "cpu"}
    environment = {**os.environ, **settings}
    command = [sys.executable, "-m", "service"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert str(server.port) in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
