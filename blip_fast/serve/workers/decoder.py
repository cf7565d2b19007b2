"""The process that opens pictures. It is separate from the server, so that a picture which crashes the
decoder or hangs it costs only its own request."""

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

THUMBNAIL = 512  # pixels of the longest side


def main(sock: socket.socket, most_pixels: int) -> None:
    """Open pictures until the server ends. Each answer carries its job's `id`.

    A job with `size` brings an uploaded file and gets its pixels, uint8 [size, size, 3]. With `panel`, the
    picture at display size follows, uint8 [height, width, 3], and the answer's `panel` is that (width,
    height). A job with `path` names an indexed picture and gets a JPEG.
    """
    ends_with_the_server()
    Image.init()
    with contextlib.suppress(ModuleNotFoundError):  # Windows has no `resource` module, and no core files
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core dump with a stranger's picture in it
    send(sock, {"ready": {}})
    while (message := receive(sock)) is not None:
        head, body = message
        if "cancel" in head:  # jobs are done one by one, so the cancelled one is already done
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
        raise Refused(404, "not_found", "This picture cannot be read any more: index its folder "
                      "again.") from None
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return {"result": {}}, encoded(picture, "JPEG", quality=85)
