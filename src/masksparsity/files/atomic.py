"""Files that are written whole or not at all."""

import json
import math
import os
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from masksparsity.errors import RunFailure


def write(path: Path, data: bytes) -> None:
    """Put `data` at `path` by writing beside it, syncing and renaming.

    Until the new file is complete the earlier one stays as it is; if it cannot be completed (a
    full disk, say) nothing is left of it.
    """
    path = Path(path)
    try:
        # One fixed name, so that the next process overwrites what a killed one leaves behind.
        partial = path.with_name(f".{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: what can be no file's name
        reason = getattr(error, "strerror", None) or error
        raise RunFailure(
            f"cannot write {path}: {reason}. Whatever was there before is intact; "
            "make room or choose another place, and start again."
        ) from error


def plain(value: Any) -> Any:
    """`value` in JSON's types: numbers of torch and NumPy as numbers, what JSON lacks as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted(map(plain, value), key=str)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)


def write_json(path: Path, value: Any) -> None:
    """Put `value` at `path` as JSON that every parser reads (no NaN)."""
    write(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())
