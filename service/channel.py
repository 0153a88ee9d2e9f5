"""The one place where a process boundary is crossed: records over a Unix socket pair.

A record travels in fragments, so that its size is not limited by the socket's buffer, and segments of the
arena travel as descriptors beside their record.
"""

import array
import asyncio
import os
import socket
import threading
from collections import deque
from collections.abc import Callable

from service.records import AddSegment, ProtocolError, Record, decode, encode

FRAGMENT_BYTES = 16 << 10
_MAX_RECORD_BYTES = 256 << 10
_ANCILLARY_BYTES = socket.CMSG_SPACE(4 * array.array("i").itemsize)

# A fragment is one packet: a byte that says whether its record ends here, and a piece of the record.
_MORE, _LAST = b"\0", b"\1"


def _fragments(record: Record) -> list[bytes]:
    data = encode(record)
    starts = range(0, len(data), FRAGMENT_BYTES)
    return [
        (_LAST if start == starts[-1] else _MORE) + data[start : start + FRAGMENT_BYTES] for start in starts
    ]


class _Assembler:
    """Puts the fragments that arrive on one socket together again."""

    def __init__(self) -> None:
        self._data = bytearray()

    def receive(self, sock: socket.socket) -> tuple[Record, int | None] | None:
        """Take one packet. The record that it completes, with its descriptor, or None.

        Raises:
            EOFError: the peer is gone.
            ProtocolError: it sent no fragment, no record, or descriptors where none belong.
            BlockingIOError: nothing there, on a socket that does not block.
        """
        try:
            # Not socket.recv_fds, which drops its flags.
            packet, ancillary, received, _ = sock.recvmsg(
                1 + FRAGMENT_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError as error:
            raise EOFError from error
        descriptors = array.array("i")
        for _, _, data in ancillary:
            descriptors.frombytes(data)
        try:
            if not packet:
                raise EOFError
            if received & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ProtocolError("a packet larger than any fragment")
            record = self._append(packet)
            if len(descriptors) != isinstance(record, AddSegment):
                raise ProtocolError(f"{len(descriptors)} descriptors came with {type(record).__name__}")
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return None if record is None else (record, descriptors[0] if descriptors else None)

    def _append(self, packet: bytes) -> Record | None:
        if packet[:1] not in (_MORE, _LAST) or len(self._data) + len(packet) > _MAX_RECORD_BYTES:
            raise ProtocolError("a packet that is no fragment of a record")
        self._data += packet[1:]
        if packet[:1] == _MORE:
            return None
        data, self._data = bytes(self._data), bytearray()
        return decode(data)


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """The two ends: the front end's, which never blocks, and the worker's, to be inherited by it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs


class Channel:
    """The worker's end: blocks. One thread receives, any may send."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._assembler = _Assembler()
        self._sending = threading.Lock()

    def receive(self) -> tuple[Record, int | None]:
        """The next record and, with AddSegment, its descriptor, which is the caller's to close.

        Raises:
            EOFError: the front end is gone.
            ProtocolError: what came is no record.
        """
        while True:
            received = self._assembler.receive(self._socket)
            if received is not None:
                return received

    def send(self, record: Record) -> None:
        """
        Raises:
            EOFError: the front end is gone.
        """
        try:
            with self._sending:
                for fragment in _fragments(record):
                    self._socket.send(fragment)
        except ConnectionError as error:
            raise EOFError from error


class AsyncChannel:
    """The front end's end, in the running event loop: never blocks, keeps what the socket does not take."""

    def __init__(
        self,
        sock: socket.socket,
        on_record: Callable[[Record], None],
        on_end: Callable[[Exception], None],
    ) -> None:
        """``on_end`` is called once, with EOFError or ProtocolError, when no more records will come."""
        self._socket = sock
        self._on_record = on_record
        self._on_end = on_end
        self._assembler = _Assembler()
        self._unsent: deque[tuple[bytes, int | None]] = deque()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._read)

    def send(self, record: Record, descriptor: int | None = None) -> None:
        """Send, now or when the socket has room, in order; into the void once the worker is gone.

        ``descriptor`` stays the caller's, and may be closed at once.
        """
        idle = not self._unsent
        last = None if descriptor is None else os.dup(descriptor)
        fragments = _fragments(record)
        self._unsent.extend((fragment, None) for fragment in fragments[:-1])
        self._unsent.append((fragments[-1], last))
        if idle:
            self._write()

    def close(self) -> None:
        """Neither callback is called any more."""
        if self._socket.fileno() < 0:
            return
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._drop_unsent()

    def _read(self) -> None:
        try:
            while self._socket.fileno() >= 0:
                received = self._assembler.receive(self._socket)
                if received is None:
                    continue
                record, descriptor = received
                if descriptor is not None:
                    os.close(descriptor)
                    raise ProtocolError("a worker has no segments to add")
                self._on_record(record)
        except BlockingIOError:
            return
        except (EOFError, ProtocolError) as error:
            self._loop.remove_reader(self._socket)
            self._on_end(error)

    def _write(self) -> None:
        while self._unsent:
            fragment, descriptor = self._unsent[0]
            try:
                _send_packet(self._socket, fragment, descriptor)
            except BlockingIOError:
                self._loop.add_writer(self._socket, self._write)
                return
            except OSError:
                # The worker is gone, which the reader hears of too, once.
                self._drop_unsent()
                break
            self._unsent.popleft()
            if descriptor is not None:
                os.close(descriptor)
        self._loop.remove_writer(self._socket)

    def _drop_unsent(self) -> None:
        for _, descriptor in self._unsent:
            if descriptor is not None:
                os.close(descriptor)
        self._unsent.clear()


def _send_packet(sock: socket.socket, packet: bytes, descriptor: int | None) -> None:
    ancillary = []
    if descriptor is not None:
        ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor])))
    sock.sendmsg([packet], ancillary, socket.MSG_NOSIGNAL)
