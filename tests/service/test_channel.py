import asyncio
import os
import socket
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.selecting import SelectingProblem
from fsa_core.problem import BLOCK_SIZES, MAX_SLOTS, Problem
from service import channel
from service.channel import AsyncChannel, Channel, socket_pair
from service.config import MAX_BATCH_REQUESTS
from service.devices import DeviceInfo
from service.job import Job, Slice
from service.records import (
    MAX_BATCH_JOBS,
    MAX_TEXT_BYTES,
    AddSegment,
    Done,
    DropSegment,
    Failed,
    FailureKind,
    Memory,
    ProtocolError,
    Ready,
    Record,
    Stop,
    Submit,
    decode,
    encode,
)

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
seconds = st.floats(0, 1e6)
# At most four bytes of UTF-8 a character.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=MAX_TEXT_BYTES // 4)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    kv_heads, group = draw(st.integers(1, 64)), draw(st.integers(1, 32))
    block_size = draw(st.sampled_from((0, *BLOCK_SIZES)))
    problem = Problem(
        num_q_tokens=draw(u64),
        num_k_tokens=draw(u64),
        num_sequences=draw(st.integers(1, 2**32 - 1)),
        num_q_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 256)),
        value_dim=draw(st.integers(1, 256)),
        dtype=draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32))),
        index_heads=draw(st.sampled_from((1, kv_heads, kv_heads * group))) if block_size else 0,
        num_slots=draw(u32) if block_size else 0,
        block_size=block_size,
        causal=draw(st.booleans()),
        softmax_scale=draw(st.floats(allow_nan=False, allow_infinity=False)),
        query_block_size=draw(st.integers(1, 2**31)) if block_size else 1,
    )
    if not (block_size and problem.causal and draw(st.booleans())):
        return problem
    return SelectingProblem.of(problem, draw(configs(block_size)), is_gated=draw(st.booleans()))


@st.composite
def configs(draw: st.DrawFn, block_size: int) -> NSAConfig:
    stride, share = draw(st.sampled_from((1, 4, 16))), st.none() | st.floats(1e-9, 1.0)
    return NSAConfig(
        kernel_size=stride * draw(st.integers(1, 1000)),
        stride=stride,
        block_size=block_size,
        top_k=draw(st.integers(8, MAX_SLOTS)),
        num_first_blocks=draw(st.integers(0, 4)),
        num_local_blocks=draw(st.integers(0, 4)),
        window=draw(st.integers(1, 2**31 - 1)),
        top_p=draw(share),
        min_share=draw(share),
    )


@st.composite
def submits(draw: st.DrawFn) -> Submit:
    problem = draw(problems())
    lengths = draw(st.lists(st.tuples(u64, u64, u32, u64, u64), min_size=1, max_size=4))
    jobs = tuple(
        Job(replace(problem, num_q_tokens=q, num_k_tokens=k), Slice(segment, offset, num_bytes))
        for q, k, segment, offset, num_bytes in lengths
    )
    return Submit(draw(u64), jobs)


records = st.one_of(
    st.builds(AddSegment, u32, u64),
    st.builds(DropSegment, u32),
    submits(),
    st.builds(Stop),
    st.builds(
        Ready, st.builds(DeviceInfo, texts, u32, texts, u64, texts, texts, texts), st.builds(Memory, u64, u64)
    ),
    st.builds(Done, u64, seconds, seconds, seconds),
    st.builds(Failed, u64, st.sampled_from(FailureKind), texts),
    st.builds(Memory, u64, u64),
)


@pytest.fixture
def batch() -> Submit:
    """The largest batch there is: more than one packet, less than a record may be."""
    problem = Problem(7, 9, 1, 4, 2, 64, 64, torch.float16, 2, 3, 64, True, 0.125)
    return Submit(5, tuple(Job(problem, Slice(1, 4096 * i, 4096)) for i in range(MAX_BATCH_JOBS)))


def test_the_largest_batch_that_settings_allow_is_one_that_can_be_sent() -> None:
    assert MAX_BATCH_REQUESTS == MAX_BATCH_JOBS


@given(records)
def test_a_record_survives_the_wire(record: Record) -> None:
    assert decode(encode(record)) == record


@given(records, st.data())
def test_a_record_of_another_length_is_refused(record: Record, data: st.DataObject) -> None:
    encoded = encode(record)
    with pytest.raises(ProtocolError):
        decode(encoded[: data.draw(st.integers(0, len(encoded) - 1))])
    with pytest.raises(ProtocolError):
        decode(encoded + b"\0")


@given(st.binary(max_size=300))
def test_any_bytes_are_a_record_or_refused(data: bytes) -> None:
    try:
        record = decode(data)
    except ProtocolError:
        return
    assert encode(record)[0] == data[0]


@pytest.mark.parametrize(
    "change",
    [
        {"num_q_heads": 3},
        {"num_kv_heads": 0},
        {"head_dim": 0},
        {"num_sequences": 0},
        {"index_heads": 3},
        {"block_size": 48},
        {"block_size": 0},
        {"softmax_scale": float("nan")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_sizes_that_contradict_one_another_are_refused(batch: Submit, change: dict[str, float]) -> None:
    job = replace(batch.jobs[0], problem=replace(batch.jobs[0].problem, **change))
    with pytest.raises(ProtocolError, match="no attention call"):
        decode(encode(Submit(0, (job,))))


def test_jobs_that_cannot_share_a_batch_are_not_sent(batch: Submit) -> None:
    first, second = batch.jobs[:2]
    other = replace(second, problem=replace(second.problem, causal=False))
    for jobs in ((first, other), (), (*batch.jobs, first)):
        with pytest.raises(ValueError, match="batch"):
            Submit(0, jobs).encode()


def test_a_long_error_message_is_cut_between_characters() -> None:
    failed = decode(encode(Failed(1, FailureKind.ERROR, "x" + "é" * MAX_TEXT_BYTES)))
    assert isinstance(failed, Failed)
    assert failed.message == "x" + "é" * ((MAX_TEXT_BYTES - 1) // 2)


def test_records_beyond_the_socket_buffer_arrive_whole_and_in_order(batch: Submit) -> None:
    sent = [replace(batch, batch=i) for i in range(50)]

    async def scenario() -> list[Record]:
        ours, theirs = socket_pair()
        ends: list[Exception] = []
        front_end = AsyncChannel(ours, lambda record: None, ends.append)
        for record in sent:
            front_end.send(record)
        front_end.send(Stop())
        worker = Channel(theirs)
        received = await asyncio.to_thread(lambda: [worker.receive()[0] for _ in range(len(sent) + 1)])
        front_end.close()
        theirs.close()
        return received

    assert len(encode(batch)) > channel.FRAGMENT_BYTES
    assert asyncio.run(scenario()) == [*sent, Stop()]


def test_threads_of_a_worker_may_send_at_once() -> None:
    messages = [Failed(i, FailureKind.ERROR, "y" * 4000) for i in range(40)]

    async def scenario() -> list[Record]:
        ours, theirs = socket_pair()
        received: list[Record] = []
        all_there = asyncio.Event()

        def on_record(record: Record) -> None:
            received.append(record)
            if len(received) == len(messages):
                all_there.set()

        front_end = AsyncChannel(ours, on_record, lambda error: None)
        worker = Channel(theirs)
        threads = [threading.Thread(target=worker.send, args=(message,)) for message in messages]
        for thread in threads:
            thread.start()
        await asyncio.wait_for(all_there.wait(), 10)
        front_end.close()
        theirs.close()
        return received

    received = asyncio.run(scenario())
    assert sorted(received, key=lambda record: record.batch) == messages


def test_a_descriptor_arrives_with_its_record_and_is_closed_here() -> None:
    async def scenario() -> None:
        ours, theirs = socket_pair()
        front_end = AsyncChannel(ours, lambda record: None, lambda error: None)
        before = len(os.listdir("/proc/self/fd"))
        memory = os.memfd_create("test")
        os.write(memory, b"payload")
        front_end.send(AddSegment(3, 7), memory)
        os.close(memory)
        record, descriptor = Channel(theirs).receive()
        assert record == AddSegment(3, 7)
        assert descriptor is not None
        assert os.pread(descriptor, 7, 0) == b"payload"
        assert not os.get_inheritable(descriptor)
        os.close(descriptor)
        assert len(os.listdir("/proc/self/fd")) == before
        front_end.close()
        theirs.close()

    asyncio.run(scenario())


def test_closing_with_descriptors_unsent_leaks_none(batch: Submit) -> None:
    async def scenario() -> None:
        before = len(os.listdir("/proc/self/fd"))
        ours, theirs = socket_pair()
        front_end = AsyncChannel(ours, lambda record: None, lambda error: None)
        for _ in range(50):
            front_end.send(batch)
        front_end.send(AddSegment(0, 1), ours.fileno())
        front_end.close()
        front_end.close()
        theirs.close()
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("packet", "with_descriptor"),
    [
        (b"\x02rubbish", False),
        (b"\x01\xff", False),
        (b"\x01", False),
        (b"\x01" + b"x" * (channel.FRAGMENT_BYTES + 1), False),
        (b"\x01" + encode(Stop()), True),
        (b"\x01" + encode(AddSegment(1, 1)), False),
    ],
    ids=["no_fragment", "no_kind", "empty", "too_long", "stray_descriptor", "missing_descriptor"],
)
def test_a_worker_refuses_what_is_no_record(packet: bytes, with_descriptor: bool) -> None:
    ours, theirs = socket_pair()
    before = len(os.listdir("/proc/self/fd"))
    with ours, theirs:
        socket.send_fds(ours, [packet], [ours.fileno()] if with_descriptor else [])
        with pytest.raises(ProtocolError):
            Channel(theirs).receive()
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_record_without_end_is_refused() -> None:
    ours, theirs = socket_pair()
    with ours, theirs:
        worker = Channel(theirs)

        def send_forever() -> None:
            ours.setblocking(True)
            try:
                while True:
                    ours.send(b"\0" + b"x" * channel.FRAGMENT_BYTES)
            except OSError:
                pass

        thread = threading.Thread(target=send_forever)
        thread.start()
        with pytest.raises(ProtocolError):
            worker.receive()
        theirs.close()
        thread.join()


@pytest.mark.parametrize("last_words", [b"", b"\x07rubbish"], ids=["end", "rubbish"])
def test_the_front_end_hears_once_of_a_worker_that_is_lost(last_words: bytes) -> None:
    async def scenario() -> list[Exception]:
        ours, theirs = socket_pair()
        ends: list[Exception] = []
        front_end = AsyncChannel(ours, lambda record: None, ends.append)
        if last_words:
            theirs.send(last_words)
        theirs.close()
        await asyncio.sleep(0.05)
        front_end.send(Stop())
        await asyncio.sleep(0.05)
        front_end.close()
        return ends

    (end,) = asyncio.run(scenario())
    assert isinstance(end, ProtocolError if last_words else EOFError)
