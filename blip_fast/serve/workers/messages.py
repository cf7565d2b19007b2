"""Messages between the server and its processes: a JSON object and bytes, one after another through a socket.

There is no pickle in them: a process that opens strangers' pictures must not be able to make the server run anything,
even if a picture has taken it over.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any

_SIZES = struct.Struct(">II")  # of the JSON object, of the bytes

Message = tuple[dict[str, Any], bytes]


def packed(head: dict[str, Any], blob: bytes = b"") -> bytes:
    text = json.dumps(head).encode()
    return _SIZES.pack(len(text), len(blob)) + text + blob


def send(sock: socket.socket, head: dict[str, Any], blob: bytes = b"") -> None:
    sock.sendall(packed(head, blob))


def receive(sock: socket.socket) -> Message | None:
    """The next message; None where the other side has gone."""
    sizes = _exactly(sock, _SIZES.size)
    if sizes is None:
        return None
    text, blob = (_exactly(sock, size) for size in _SIZES.unpack(sizes))
    return None if text is None or blob is None else (json.loads(text), blob)


async def read(reader: asyncio.StreamReader) -> Message | None:
    """As `receive`."""
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
