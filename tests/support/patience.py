"""How long a test waits for an event: long enough for the slowest processor. Then it fails."""

import time
from collections.abc import Callable

PATIENCE = 1800.0  # seconds


def until(holds: Callable[[], bool], pause: float = 0.01) -> None:
    """Wait until a condition holds, checking every `pause` seconds."""
    ends = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < ends, "it did not come about"
        time.sleep(pause)
