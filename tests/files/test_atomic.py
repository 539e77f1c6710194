import errno
import json
import os
from pathlib import Path

import pytest

from masksparsity.errors import RunFailure
from masksparsity.files import atomic


def test_makes_the_folder_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    atomic.write(path, b"one")
    atomic.write(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_earlier_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    atomic.write(path, b"earlier")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(RunFailure, match=r"file: No space left on device"):
        atomic.write(path, b"later")
    assert path.read_bytes() == b"earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", [".", "/", "a\0b"])
def test_what_can_be_no_files_name_is_refused(name: str) -> None:
    with pytest.raises(RunFailure, match="cannot write"):
        atomic.write(Path(name), b"one")


def test_json_is_refused_before_the_file_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    atomic.write_json(path, {"a": [1, 2.5, None]})
    with pytest.raises(ValueError, match="JSON"):
        atomic.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None]}
