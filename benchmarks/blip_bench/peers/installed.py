"""Which peers can be measured in this environment."""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from importlib.util import find_spec

PACKAGES = {  # all peers get their weights from transformers
    "openvino": ("openvino", "nncf", "transformers"),
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript", "transformers"),
    "compiled": ("torch", "transformers"),
    "transformers": ("transformers",),
}


def missing(peer: str) -> str | None:
    """Why a peer (one of `PACKAGES`) cannot be measured here, and how to change that; None if it can."""
    if absent := [package for package in PACKAGES[peer] if find_spec(package) is None]:
        return f"{', '.join(absent)} not installed: pip install 'blip-fast[peers]'"
    if peer == "compiled" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile needs a C++ compiler: install g++, or name another in CXX"
    return None


def version(peer: str) -> str:
    """The version of the peer's main package."""
    return metadata.version(PACKAGES[peer][0])


def chosen(task: str, named: str | None) -> dict[str, str | None]:
    """The task's peers, all or the comma-separated ones in `named`, each with the reason why it is left out,
    or None.

    Raises:
        ValueError: a named peer is unknown or missing, or the task offers no choice.
    """
    known = list(PACKAGES) if task in ("caption", "encode") else ["transformers"]
    if named is None:
        return {peer: missing(peer) for peer in known}
    if len(known) == 1:
        raise ValueError(f"--peers is for caption and encode: next to {task} stands the published loop alone")
    peers = list(dict.fromkeys(named.split(",")))
    for peer in peers:
        if peer not in known:
            raise ValueError(f"--peers {peer} is unknown: choose from {', '.join(known)}")
        if reason := missing(peer):
            raise ValueError(f"--peers {peer}: {reason}")
    return dict.fromkeys(peers)
