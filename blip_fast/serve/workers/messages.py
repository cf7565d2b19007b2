"""Messages between the server and its processes: a JSON object and bytes each, on a socket.

They contain no pickles: a process that opens strangers' pictures must not be able to make the server run
code, even if a picture has taken the process over.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any

_SIZES = struct.Struct(">II")  # bytes of the JSON object, and of the binary part

Message = tuple[dict[str, Any], bytes]


def packed(head: dict[str, Any], blob: bytes = b"") -> bytes:
    """A message as it goes through the socket."""
    text = json.dumps(head).encode()
    return _SIZES.pack(len(text), len(blob)) + text + blob


def send(sock: socket.socket, head: dict[str, Any], blob: bytes = b"") -> None:
    sock.sendall(packed(head, blob))


def receive(sock: socket.socket) -> Message | None:
    """The next message, or None when the other side has closed the socket."""
    sizes = _exactly(sock, _SIZES.size)
    if sizes is None:
        return None
    text, blob = (_exactly(sock, size) for size in _SIZES.unpack(sizes))
    return None if text is None or blob is None else (json.loads(text), blob)


async def read(reader: asyncio.StreamReader) -> Message | None:
    """`receive` for an asyncio reader."""
    try:
        text, blob = _SIZES.unpack(await reader.readexactly(_SIZES.size))
        return json.loads(await reader.readexactly(text)), await reader.readexactly(blob)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _exactly(sock: socket.socket, size: int) -> bytes | None:
    buffer = bytearray(size)
    view, done = memoryview(buffer), 0
    while done < size:
        try:
            count = sock.recv_into(view[done:])
        except ConnectionError:
            return None
        if not count:
            return None
        done += count
    return bytes(buffer)
