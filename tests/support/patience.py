"""How long a test waits for what has to come. What never comes fails by it; no processor may be too slow for it."""

import time
from collections.abc import Callable

PATIENCE = 1800.0  # seconds


def until(holds: Callable[[], bool], pause: float = 0.01) -> None:
    """Wait until it holds, looking every `pause` seconds."""
    ends = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < ends, "it did not come about"
        time.sleep(pause)
