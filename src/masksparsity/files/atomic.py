"""Files that are written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

from masksparsity.errors import RunFailure


def write(path: Path, data: bytes) -> None:
    """Put `data` at `path` by writing beside it, syncing and renaming.

    Until the new file is complete the earlier one stays as it is; if it cannot be completed (a
    full disk, say) nothing is left of it.
    """
    path = Path(path)
    # One fixed name, so that what a killed process leaves behind is overwritten by the next one.
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise RunFailure(
            f"cannot write {path}: {error.strerror or error}. Whatever was there before is intact; "
            "make room or choose another place, and start again."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Put `value` at `path` as JSON that every parser reads (no NaN)."""
    write(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())
