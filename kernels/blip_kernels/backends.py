"""Which implementation of an op runs, and why.

`auto` takes the fastest implementation that can run the call. Naming one that cannot run it is an error that says
why: nothing falls back silently. The environment variable `BLIP_FAST_ATTENTION` names the choice where a call does
not.
"""

from __future__ import annotations

import os

ATTENTION_BACKENDS = ("auto", "sdpa", "reference")
ATTENTION_VARIABLE = "BLIP_FAST_ATTENTION"


def attention_backend(requested: str | None = None) -> str:
    """Resolve the attention implementation for a call.

    Args:
        requested: one of `ATTENTION_BACKENDS`, or None to take `BLIP_FAST_ATTENTION` (default `auto`).

    Returns:
        `"sdpa"` or `"reference"`.

    Raises:
        ValueError: the name is not one of `ATTENTION_BACKENDS`.
    """
    name = requested or os.environ.get(ATTENTION_VARIABLE) or "auto"
    if name not in ATTENTION_BACKENDS:
        raise ValueError(f"attention backend {name!r} is not known: choose one of {', '.join(ATTENTION_BACKENDS)}")
    return "sdpa" if name == "auto" else name
