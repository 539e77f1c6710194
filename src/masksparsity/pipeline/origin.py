"""Where numbers come from: versions, device, source."""

import platform
import shlex
import sys
from importlib.metadata import version
from typing import Any

import torch


def origin(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and command, as they stand beside every number."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("masksparsity", "torch", "torchvision")},
        },
        "device": device_name(device),
        "command": shlex.join(["masksparsity", *sys.argv[1:]]),
    }


def device_name(device: torch.device) -> str:
    """The hardware that computes, and how much of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    features = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU ({features}), {threads} thread{'s' * (threads > 1)}"
