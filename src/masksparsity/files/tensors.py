"""safetensors files: tensors by name, and words beside them."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from masksparsity.errors import MaskSparsityError

from . import atomic


def write(
    path: Path, tensors: Mapping[str, Tensor], words: Mapping[str, str] | None = None
) -> None:
    """Put all of it at `path`, or nothing."""
    # A copy of its own for each: safetensors refuses tensors that share storage, as views do.
    own = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}
    atomic.write(Path(path), save(own, dict(words or {})))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors, on the CPU, and the words. A missing or damaged file is named."""
    if Path(path).is_dir():
        raise MaskSparsityError(f"{path} is a folder, not a file")
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned: where memory begins decides the last bits of some products.
            tensors = {n: file.get_tensor(n).clone() for n in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except FileNotFoundError:
        raise MaskSparsityError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise MaskSparsityError(f"{path} is damaged or no safetensors file: {error}") from error
