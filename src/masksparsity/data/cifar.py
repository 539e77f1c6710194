"""CIFAR-10 and CIFAR-100 from the files of their author, in the binary or the Python version."""

import io
import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from masksparsity.data.config import DataConfig
from masksparsity.data.imageset import Figures, ImageSet, Pixels, need_root
from masksparsity.errors import MaskSparsityError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where one of the two sets keeps what; files of the binary version end in .bin."""

    torchvision: str
    classes: int
    binary: str
    python: str
    train: tuple[str, ...]
    test: str
    label_key: bytes
    label_bytes: int  # at the head of a binary record; the last one is the class
    mean: Figures
    std: Figures


_LAYOUTS = {
    "cifar10": Layout(
        torchvision="CIFAR10",
        classes=10,
        binary="cifar-10-batches-bin",
        python="cifar-10-batches-py",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test="test_batch",
        label_key=b"labels",
        label_bytes=1,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": Layout(
        torchvision="CIFAR100",
        classes=100,
        binary="cifar-100-binary",
        python="cifar-100-python",
        train=("train",),
        test="test",
        label_key=b"fine_labels",
        label_bytes=2,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
}


def cifar(config: DataConfig) -> ImageSet:
    """50,000 training and 10,000 test images of 32x32 pixels, 10 or 100 classes.

    Raises:
        MaskSparsityError: the files are not under `config.root`, or not what they should be.
    """
    layout = _LAYOUTS[config.name]
    root = need_root(config.name, config.root)
    if config.download and _find(root, layout) is None:
        _download(root, layout)
    found = _find(root, layout)
    if found is None:
        remedy = "give the folder that has, or --data.download"
        if root.is_file() or any((root / at / "train").is_dir() for at in (".", config.name)):
            remedy = "if it is a class folder or an archive of one, --data.name folder reads it"
        raise MaskSparsityError(
            f"{root} has neither {layout.python} nor {layout.binary} with all its files; {remedy}"
        )
    *train, test = found
    return ImageSet(
        train=_read(train, layout),
        test=_read([test], layout),
        classes=layout.classes,
        mean=layout.mean,
        std=layout.std,
        crop_padding=4,
        flip=True,
    )


def _find(root: Path, layout: Layout) -> list[Path] | None:
    for folder, suffix in ((layout.binary, ".bin"), (layout.python, "")):
        for base in (root / folder, root):
            paths = [base / f"{name}{suffix}" for name in (*layout.train, layout.test)]
            if all(path.is_file() for path in paths):
                return paths
    return None


def _download(root: Path, layout: Layout) -> None:
    from torchvision import datasets

    source = getattr(datasets, layout.torchvision)
    datasets.utils.download_and_extract_archive(
        source.url, root, filename=source.filename, md5=source.tgz_md5
    )


def _read(paths: list[Path], layout: Layout) -> Pixels:
    import numpy as np

    parts = []
    for path in paths:
        read = _read_binary if path.suffix == ".bin" else _read_python
        try:
            parts.append(read(path.read_bytes(), layout))
        except MaskSparsityError as error:
            raise MaskSparsityError(f"{path}: {error}") from None
        except Exception as error:  # a damaged pickle raises anything
            raise MaskSparsityError(
                f"{path} is not a CIFAR file, or is damaged: {error}"
            ) from error
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Pixels.checked(images.reshape(-1, 3, 32, 32), labels, paths[0])


def _read_binary(content: bytes, layout: Layout) -> tuple[Any, Any]:
    import numpy as np

    records = np.frombuffer(content, np.uint8).reshape(-1, layout.label_bytes + 3072)
    return records[:, layout.label_bytes :], records[:, layout.label_bytes - 1].astype(np.int64)


def _read_python(content: bytes, layout: Layout) -> tuple[Any, Any]:
    import numpy as np

    batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    return batch[b"data"], np.asarray(batch[layout.label_key], np.int64)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickled NumPy arrays, and refuses to name, hence to run, anything else."""

    def find_class(self, module: str, name: str) -> Any:
        import numpy as np

        if (module.replace("_core", "core"), name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.empty(0).__reduce__()[0]
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return partial(_dtype, np.dtype)
        raise MaskSparsityError(f"refused: reading it would run {module}.{name}")


def _dtype(dtype: Any, code: Any, align: Any = False, copy: Any = False) -> Any:
    # NumPy warns of the integers with which Python 2 wrote the two switches.
    return dtype(code, align=bool(align), copy=bool(copy))
