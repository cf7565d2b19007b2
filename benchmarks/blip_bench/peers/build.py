"""Builds the peers that `installed.py` names, with the weights of a checkpoint."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path

from torch import Tensor

from blip_bench.models import load_transformers
from blip_bench.peers.modules import Peer, cut

CUT = ("openvino", "onnxruntime", "compiled")  # peers that take transformers' model in parts; one module each


def build(directory: Path, peers: Collection[str], dtypes: Sequence[str], pixels: Tensor, *,
          captions: bool) -> dict[str, Peer]:
    """Peers by name and dtype, from the checkpoint in `directory`. `pixels` [images, 3, size, size] are an
    example input; `captions` says whether peers should caption as well as encode.

    Peers are built one after another, since a conversion takes more memory than its result. All of them stay
    in memory, so that each can take its turn in every round."""
    wanted = [peer for peer in CUT if peer in peers]
    if not wanted:
        return {}
    parts = cut(load_transformers(directory, "float32"), captions)
    with _silence():
        return {name: peer for each in wanted
                for name, peer in import_module(f"blip_bench.peers.{each}").peers(parts, pixels, dtypes)}


@contextmanager
def _silence() -> Iterator[None]:
    """Suppress the converters' progress reports. Some go to standard output, which is for the JSON result."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)
