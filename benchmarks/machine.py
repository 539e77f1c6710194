"""What every printed number needs beside it: command, hardware, versions; and how results end."""

import json
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def about(*packages: str, device: str = "cpu") -> dict[str, str]:
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    cpu = f"{_cpu()} ({torch.backends.cpu.get_cpu_capability()})"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "device": f"{gpu}{cpu}, {torch.get_num_threads()} thread(s)",
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


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of a single value, itself."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def tell(facts: dict[str, str]) -> None:
    """Print what stands above a table."""
    print(*(f"{key}: {value}" for key, value in facts.items()), sep="\n")


def finish(
    facts: dict[str, str], rows: list[dict[str, Any]], missed: list[str], path: Path | None
) -> int:
    """Say what missed the bar, write everything to `path` if given, and return the exit status."""
    print(f"misses of the bar: {', '.join(missed) or 'none'}")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**facts, "rows": rows, "missed": missed}, indent=1))
    return int(bool(missed))
