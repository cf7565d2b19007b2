"""The `java` command, which COCO's caption metrics call."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

TIMEOUT = 120  # seconds for `java -version`


@dataclass(frozen=True)
class Java:
    runs: bool
    description: str  # its version, or why it does not run


def find_java() -> Java:
    """Find and call `java`. Finding alone is not enough: macOS has a `java` that only asks to install
    Java."""
    java = shutil.which("java")
    if java is None:
        return Java(False, "not installed: install a Java runtime, 8 or newer")
    try:
        done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Java(False, f"{java} does not run: {error}")
    return Java(done.returncode == 0, (done.stderr.strip().splitlines() or ["no message"])[0])
