"""The run directory: one folder per stage.

In it, `config.json` says what was asked for, `metrics.jsonl` how it went, `checkpoint.safetensors`
where it stands, and `result.json`, written last, that the stage is complete.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from masksparsity.errors import MaskSparsityError, RunFailure
from masksparsity.files import atomic
from masksparsity.train.loop import CHECKPOINT, METRICS, read_metrics

CONFIG = "config.json"
RESULT = "result.json"
RESULTS = ("results.json", "report.html")
_ASIDE = ".discarded"
FILES = {"weights": "model.safetensors", "mask": "mask.json", "teacher": "model.safetensors"}


class RunDir:
    """The files that stages leave, by their names. Under torchrun, only process 0 may write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def alone(self, stage: str) -> Iterator[None]:
        """Keep other processes from doing the stage here meanwhile, where the system can.

        Raises:
            RunFailure: another one is at it.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.folder(stage).mkdir(parents=True, exist_ok=True)
                folder = os.open(self.folder(stage), os.O_RDONLY)
                stack.callback(os.close, folder)
                if fcntl is not None:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunFailure(
                    f"another process works in {self.folder(stage)}: let it finish, or choose "
                    "another place with --out"
                ) from None
            except OSError:  # what cannot be written to is told by whoever writes
                pass
            yield

    def folder(self, stage: str) -> Path:
        """Where the files of a stage are."""
        return self.path / stage

    def complete(self, stage: str) -> bool:
        """Whether the stage has finished."""
        return (self.folder(stage) / RESULT).exists()

    def result(self, stage: str) -> dict[str, Any]:
        """The result of a complete stage."""
        return self._read(stage, RESULT, "seconds", "origin")

    def network(self) -> Path:
        """The file of the network that the run has come to: the finetuned one once there is one.

        Raises:
            MaskSparsityError: no stage that makes one is complete.
        """
        for stage in ("finetune", "prune", "one-shot", "mask-sparsify", "train"):
            if self.complete(stage):
                return self.folder(stage) / FILES["weights"]
        raise MaskSparsityError(f"{self.path} holds no network: no stage that makes one is done")

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """How the epochs of a stage went, as far as it is."""
        try:
            return read_metrics(self.folder(stage))
        except (OSError, ValueError) as error:
            raise self._damaged(self.folder(stage) / METRICS, error) from error

    def asked(self, stage: str) -> dict[str, Any] | None:
        """The settings of the stage, if there is anything of it to be kept."""
        begun = self.complete(stage) or (self.folder(stage) / CHECKPOINT).exists()
        return self._read(stage, CONFIG) if begun else None

    def begin(self, stage: str, asked: dict[str, Any], config: dict[str, Any] | None) -> None:
        """Write what the stage is asked to do, and the run's whole config, to be run again."""
        if config is not None:
            atomic.write_json(self.path / CONFIG, config)
        atomic.write_json(self.folder(stage) / CONFIG, asked)

    def end(self, stage: str, result: dict[str, Any]) -> None:
        """Make the stage complete."""
        atomic.write_json(self.folder(stage) / RESULT, result)
        (self.folder(stage) / CHECKPOINT).unlink(missing_ok=True)
        shutil.rmtree(self.path / _ASIDE, ignore_errors=True)

    @contextlib.contextmanager
    def anew(self, stage: str) -> Iterator[None]:
        """Do a stage again: what there is of it, of every stage that started from its files, and
        of the results is set aside. It comes back if a mistake ends the stage before its first
        checkpoint, and is removed when the stage is complete."""
        aside = self.path / _ASIDE
        shutil.rmtree(aside, ignore_errors=True)
        # The stage itself last: a kill in between leaves nothing beside one that it is not of.
        names = [*RESULTS, *reversed(self._started_from(stage))]
        try:
            aside.mkdir()
            for name in filter(lambda name: (self.path / name).exists(), names):
                (self.path / name).rename(aside / name)
            if (self.path / CONFIG).exists():
                shutil.copy(self.path / CONFIG, aside)
        except OSError as error:
            self._put_back()
            raise RunFailure(
                f"cannot remove {self.path / stage}: {error.strerror}; make it writable, or choose "
                "another place"
            ) from error
        try:
            yield
        except MaskSparsityError:
            if not (self.folder(stage) / CHECKPOINT).exists():
                shutil.rmtree(self.folder(stage), ignore_errors=True)
                self._put_back()
            raise

    def _put_back(self) -> None:
        for path in (self.path / _ASIDE).glob("*"):
            path.replace(self.path / path.name)
        shutil.rmtree(self.path / _ASIDE, ignore_errors=True)

    def _started_from(self, stage: str) -> dict[str, None]:
        """The names of a stage, and of all that started from its files."""
        names = {stage: None}
        for later in self.path.glob(f"*/{CONFIG}"):
            if stage in self._read(later.parent.name, CONFIG).get("inputs", {}).values():
                names |= self._started_from(later.parent.name)
        return names

    def _read(self, stage: str, file: str, *needed: str) -> dict[str, Any]:
        path = self.folder(stage) / file
        try:
            value = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise self._damaged(path, error) from error
        if not isinstance(value, dict) or not value.keys() >= set(needed):
            raise self._damaged(path, "it is not what a stage writes")
        return value

    def _damaged(self, path: Path, why: object) -> MaskSparsityError:
        return MaskSparsityError(
            f"{path} cannot be read ({why}); remove {path.parent} to do that stage again"
        )
