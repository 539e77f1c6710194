"""What every printed number needs beside it: command, hardware, versions."""

import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def about(*packages: str) -> dict[str, str]:
    return {
        "command": shlex.join(["python", *sys.argv]),
        "device": f"{_cpu()}, {torch.get_num_threads()} thread(s)",
        **{name: version(name) for name in ("masksparsity", "torch", *packages)},
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor() or platform.machine()
