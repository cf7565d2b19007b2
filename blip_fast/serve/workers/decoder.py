"""The process that opens pictures, apart from the server, so that one which crashes a decoder, or keeps it forever,
ends nothing but its own request."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

from PIL import Image

from blip_fast.data.shards.tars import LocalTar
from blip_fast.media.images import ImageError, StoredImage, load_image, resized
from blip_fast.report.heat import panel_size
from blip_fast.serve.refusals import Refused, internal
from blip_fast.serve.workers.messages import Message, receive, send
from blip_fast.serve.workers.pictures import encoded, opened
from blip_fast.serve.workers.processes import ends_with_the_server

THUMBNAIL = 512  # pixels of its longest side


def main(sock: socket.socket, most_pixels: int) -> None:
    """Open pictures until the server goes: each job's answer has its `id`.

    A job with `size` brings an upload and gets pixels, uint8 [size, size, 3], and with `panel` behind them the picture
    itself at the size in which it is shown, uint8 [height, width, 3], whose size `panel` names. A job with `path` names
    an indexed picture and gets a JPEG.
    """
    ends_with_the_server()
    Image.init()
    with contextlib.suppress(ModuleNotFoundError):  # Windows has neither the module nor core files
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # of a crash nothing of a stranger's picture is kept
    send(sock, {"ready": {}})
    while (message := receive(sock)) is not None:
        head, body = message
        if "cancel" in head:  # it is done already
            continue
        try:
            answer, blob = _thumbnail(head) if "path" in head else _pixels(head, body, most_pixels)
        except Refused as refused:
            answer, blob = {"error": refused.told()}, b""
        except MemoryError:
            answer, blob = {"error": internal().told()}, b""
        send(sock, {"id": head["id"], **answer}, blob)


def _pixels(head: dict, body: bytes, most_pixels: int) -> Message:
    picture = opened(body, most_pixels)
    pixels = resized(picture, head["size"]).tobytes()
    if not head["panel"]:
        return {"result": {}}, pixels
    panel = panel_size(picture)
    return {"result": {"panel": panel.size}}, pixels + panel.tobytes()


def _thumbnail(head: dict) -> Message:
    path = Path(head["path"])
    where = path if head["length"] is None else LocalTar(path)
    try:
        picture = load_image(StoredImage(head["name"], where, head["start"], head["length"] or 0))
    except ImageError:
        raise Refused(404, "not_found", "This picture cannot be read any more: index its folder again.") from None
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return {"result": {}}, encoded(picture, "JPEG", quality=85)
