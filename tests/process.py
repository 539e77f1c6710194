"""Python in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path


def run_python(*arguments: str, cwd: Path) -> str:
    """What it prints; it has to succeed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
