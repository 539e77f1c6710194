"""The networks of torchvision and timm, with inputs of the smallest size that they accept."""

import re
from typing import Any

import timm
import torch
import torchvision
from timm.models import _registry
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import masksparsity as ms

SIZES = (64, 96, 128, 192, 224, 256, 299, 384, 448, 512)
FEW_CONVOLUTIONS = 5  # with fewer it is a transformer or a mixer behind its patches
FEW = ["box_detections_per_img", "rpn_post_nms_top_n_test", "rpn_post_nms_top_n_train"]
FEW += ["box_batch_size_per_image"]


def names(library: str, only: str | None) -> list[str]:
    if library == "torchvision":
        modules = [getattr(torchvision.models, m) for m in ("segmentation", "detection")]
        parts = [None] if only else [torchvision.models, *modules]
        found = [n for part in parts for n in torchvision.models.list_models(part)]
        return [n for n in found if "quantized" not in n and re.search(only or "", n)]
    if only:
        return [n for n in timm.list_models() if re.search(only, n)]
    smallest: dict[tuple[str, str], tuple[float, str]] = {}
    for name in timm.list_models():
        word = re.findall("[a-z]+", re.sub("^(tf|legacy)_", "", name))[0]
        family = (_registry._model_to_module[name], word)
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        except Exception:  # needs real values while it is built: only if there is nothing else
            smallest.setdefault(family, (float("inf"), name))
            continue
        if sum(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules()) >= FEW_CONVOLUTIONS:
            size = sum(p.numel() for p in model.parameters())
            smallest[family] = min(smallest.get(family, (size, name)), (size, name))
    return [name for _, name in sorted(set(smallest.values()))]


def build(library: str, name: str, smallest: int = 64) -> tuple[nn.Module, tuple]:
    """The network, and inputs of the smallest size that it accepts."""
    frames: tuple[int, ...] = ()
    sizes = tuple(size for size in SIZES if size >= smallest)
    if library == "timm":
        model = timm.create_model(name)
        about = timm.get_pretrained_cfg(name)
        if about is not None and about.fixed_input_size:
            sizes = (about.input_size[-1],)
    else:
        detects = re.search("rcnn|retinanet|fcos|ssd", name)
        options: dict[str, Any] = {"weights_backbone": None} if detects or "_" in name else {}
        if detects:  # random boxes are seen, too
            options["box_score_thresh" if "rcnn" in name else "score_thresh"] = 0.0
            options |= {} if "ssd" in name else {"min_size": 96, "max_size": 128}
            options |= dict.fromkeys(FEW, 8) if "rcnn" in name else {}
        elif name.startswith("vit"):
            sizes = (56 if name.endswith("14") else 64,)
            options["image_size"] = sizes[0]
        try:
            model = torchvision.models.get_model(name, weights=None, **options)
        except TypeError:
            options.pop("weights_backbone")
            model = torchvision.models.get_model(name, weights=None, **options)
        frames = (16,) if re.search("3d|mc3|r2plus1d|mvit", name) else ()
    error = None
    for size in sizes:
        x = torch.randn(2, 3, *frames, size, size)
        inputs = (x, x.flip(0)) if name.startswith("raft") else (x,)
        try:
            for train in (False, True):
                forward(model, inputs, train)
            return model.eval(), inputs
        except Exception as e:
            error = e
    raise RuntimeError(f"takes no input of {sizes}: {error}")


def calibrate(model: nn.Module, inputs: tuple) -> None:
    """Norms, scales and biases that matter: as they begin, many networks ignore inner channels."""
    for name, p in model.named_parameters():
        if p.ndim <= 1 or (p == p.flatten()[0]).all():
            if name.endswith("bias"):
                nn.init.normal_(p, std=0.2)
            else:
                nn.init.uniform_(p, 0.5, 1.5)
    ms.recalibrate(model, [inputs[0] if len(inputs) == 1 else inputs])


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
        out = model(*inputs, targets(inputs[0])) if train and detects else model(*inputs)
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
