"""Libraries of networks: what they have, in which families, and how to make it with random weights.

torchvision and timm come with the `dev` extra; the others are looked at where they are installed.
"""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torchvision
from timm.models import _registry
from torch import nn

SIZES = (64, 96, 128, 192, 224, 256, 299, 384, 448, 512)


class Library(NamedTuple):
    names: Callable[[], list[str]]
    """All that it has."""
    create: Callable[[str, int], nn.Module]
    """The network of a name, for images of a size."""
    family: Callable[[str], Any] | None = None
    """Its smallest member stands for it; without, each name is looked at."""
    sizes: Callable[[str], tuple[int, ...]] = lambda name: SIZES
    """Sizes of images to try."""
    unasked: Callable[[str], Any] = lambda name: True
    """Is it looked at without being asked for?"""


def _torchvision_names() -> list[str]:
    return [n for n in torchvision.models.list_models() if "quantized" not in n]


def _torchvision(name: str, size: int) -> nn.Module:
    detects = re.search("rcnn|retinanet|fcos|ssd", name)
    options: dict[str, Any] = {"weights_backbone": None} if detects or "_" in name else {}
    if detects:  # random boxes are seen, too
        options["box_score_thresh" if "rcnn" in name else "score_thresh"] = 0.0
        options |= {} if "ssd" in name else {"min_size": 96, "max_size": 128}
        options |= dict.fromkeys(_FEW, 8) if "rcnn" in name else {}
    elif name.startswith("vit"):
        options["image_size"] = size
    try:
        return torchvision.models.get_model(name, weights=None, **options)
    except TypeError:
        options.pop("weights_backbone")
        return torchvision.models.get_model(name, weights=None, **options)


_FEW = ("box_detections_per_img", "rpn_post_nms_top_n_test", "rpn_post_nms_top_n_train",
        "box_batch_size_per_image")  # fmt: skip


def _torchvision_sizes(name: str) -> tuple[int, ...]:
    return SIZES if not name.startswith("vit") else (56 if name.endswith("14") else 64,)


def _timm_family(name: str) -> tuple[str, str]:
    word = re.findall("[a-z]+", re.sub("^(tf|legacy)_", "", name))[0]
    return _registry._model_to_module[name], word


def _timm_sizes(name: str) -> tuple[int, ...]:
    about = timm.get_pretrained_cfg(name)
    return (about.input_size[-1],) if about is not None and about.fixed_input_size else SIZES


def _yolo_names() -> list[str]:
    """A config without a letter is of the smallest size. One loads weights while it is built."""
    configs = Path(importlib.import_module("ultralytics").__path__[0], "cfg/models")
    left_out = re.compile("yolov9[ems]|yolov10[^n]|rtdetr-x|.*resnet101|.*resnet18")
    return sorted(p.stem for p in configs.rglob("*.yaml") if not left_out.match(p.stem))


def _yolo(name: str, size: int) -> nn.Module:
    library = importlib.import_module("ultralytics")
    kind = library.RTDETR if "rtdetr" in name else library.YOLO
    model: nn.Module = kind(f"{name}.yaml").model
    return model.float()


def _smp() -> Any:
    return importlib.import_module("segmentation_models_pytorch")


def _smp_names() -> list[str]:
    """All decoders on one encoder, all encoders under one decoder."""
    decoders = sorted(cls.__name__ for cls in _smp()._MODEL_ARCHITECTURES)
    encoders = (name for name, about in _smp().encoders.encoders.items() if "encoder" in about)
    return [f"{decoder}/resnet18" for decoder in decoders] + [f"Unet/{name}" for name in encoders]


def _smp_family(name: str) -> tuple[str, str]:
    decoder, encoder = name.split("/")
    return decoder, _smp().encoders.encoders[encoder]["encoder"].__module__


def _smp_create(name: str, size: int) -> nn.Module:
    decoder, encoder = name.split("/")
    model: nn.Module = _smp().create_model(decoder, encoder, encoder_weights=None, classes=3)
    return model


def _cv() -> Any:
    return importlib.import_module("pytorchcv.model_provider")


def _cv_create(name: str, size: int) -> nn.Module:
    model: nn.Module
    try:
        model = _cv().get_model(name, in_size=(size, size))
    except TypeError:
        model = _cv().get_model(name)
    return model


LIBRARIES = {
    "torchvision": Library(
        _torchvision_names,
        _torchvision,
        sizes=_torchvision_sizes,
        unasked=lambda name: not re.match("raft|mc3|mvit|r2plus1d|r3d|s3d|swin3d", name),  # videos
    ),
    "timm": Library(
        timm.list_models, lambda name, size: timm.create_model(name), _timm_family, _timm_sizes
    ),
    "ultralytics": Library(_yolo_names, _yolo),
    "segmentation_models_pytorch": Library(_smp_names, _smp_create, _smp_family),
    "pytorchcv": Library(
        lambda: sorted(_cv()._models),
        _cv_create,
        lambda name: _cv()._models[name].__module__,
        lambda name: (32, *SIZES) if re.search("cifar|svhn", name) else SIZES,
    ),
}
