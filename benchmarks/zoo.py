"""Networks of libraries, with inputs of the smallest size that they accept."""

import re

import numpy as np
import torch
from libraries import LIBRARIES
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import masksparsity as ms

FEW_CONVOLUTIONS = 5  # with fewer it is a transformer or a mixer behind its patches


def names(library: str, only: str | None) -> list[str]:
    """All that match `only`, or the smallest member of each family."""
    every, create, family, _, unasked = LIBRARIES[library]
    if only:
        return [name for name in every() if re.search(only, name)]
    if family is None:
        return [name for name in every() if unasked(name)]
    smallest: dict[tuple, tuple[float, str]] = {}
    for name in every():
        try:
            with torch.device("meta"):
                model = create(name, 64)
        except Exception:  # needs real values while it is built: only if there is nothing else
            smallest.setdefault(family(name), (float("inf"), name))
            continue
        if sum(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules()) >= FEW_CONVOLUTIONS:
            size = sum(p.numel() for p in model.parameters())
            smallest[family(name)] = min(smallest.get(family(name), (size, name)), (size, name))
    return [name for _, name in sorted(set(smallest.values()))]


def build(library: str, name: str, smallest: int = 0) -> tuple[nn.Module, tuple]:
    """The network, and inputs of the smallest size that it accepts."""
    create, sizes = LIBRARIES[library].create, LIBRARIES[library].sizes
    tried = [size for size in sizes(name) if size >= smallest] or [*sizes(name)]
    frames = (16,) if re.search("3d|mc3|r2plus1d|mvit", name) and library == "torchvision" else ()
    error = None
    for size in tried:
        try:
            model = create(name, size)
            x = torch.randn(2, 3, *frames, size, size)
            inputs = (x, x.flip(0)) if name.startswith("raft") else (x,)
            for train in (False, True):
                forward(model, inputs, train)
            return model.eval(), inputs
        except Exception as e:
            error = e
    raise RuntimeError(f"takes no input of {tried}: {error}")


def calibrate(model: nn.Module, inputs: tuple) -> None:
    """Norms, scales and biases that matter: as they begin, many networks ignore inner channels."""
    for name, p in model.named_parameters():
        if p.ndim <= 1 or (p == p.flatten()[0]).all():
            if name.endswith("bias"):
                nn.init.normal_(p, std=0.2)
            else:
                nn.init.uniform_(p, 0.5, 1.5)
    ms.recalibrate(model, [(inputs,)])


def targets(x: Tensor) -> list[dict[str, Tensor]]:
    """What torchvision's detectors want while they train."""
    box = torch.tensor([[4.0, 4.0, 40.0, 40.0]], dtype=x.dtype)
    keypoints = torch.tensor([[[10.0, 10.0, 1.0]] * 17])  # torchvision wants single precision
    label, mask = torch.ones(1, dtype=torch.int64), torch.ones(1, *x.shape[-2:], dtype=torch.uint8)
    return [{"boxes": box, "labels": label, "masks": mask, "keypoints": keypoints}] * len(x)


def forward(model: nn.Module, inputs: tuple, train: bool = False) -> list[Tensor]:
    detects = hasattr(model, "roi_heads") or hasattr(model, "anchor_generator")
    for module in model.modules():
        module.training = train and not re.match("Drop|Stochastic", type(module).__name__)
        for rate in ("dropout", "drop_rate"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    with torch.random.fork_rng(), torch.set_grad_enabled(train):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 some draw from it
        out = model(*inputs, targets(inputs[0])) if train and detects else model(*inputs)
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
