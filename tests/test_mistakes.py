"""What a run says of settings and files that cannot be meant, and what it leaves alone."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from masksparsity.errors import MaskSparsityError, RunFailure
from masksparsity.pipeline import Config, Workspace, execute, run
from masksparsity.pipeline.config import MaskConfig
from masksparsity.pipeline.rundir import RunDir

from .tiny import tiny


def test_an_infinite_loss_names_the_stage_and_leaves_the_earlier_ones(tmp_path: Path) -> None:
    config = tiny(1)
    config = replace(config, sparsify=replace(config.sparsify, lr=1e30))
    with pytest.raises(RunFailure, match=r"sparsify: the loss is not finite in epoch 1"):
        run(Workspace(config, tmp_path))
    before = (tmp_path / "train" / "model.safetensors").read_bytes()
    run(Workspace(tiny(1), tmp_path))  # nothing of the stage was worth keeping: no --fresh needed
    assert (tmp_path / "train" / "model.safetensors").read_bytes() == before


def test_a_stage_from_given_files_leaves_the_config_of_the_run_beside_it(tmp_path: Path) -> None:
    execute(Workspace(tiny(1), tmp_path), "train")
    weights = {"weights": tmp_path / "train" / "model.safetensors"}
    other = tiny(3, mask=MaskConfig(scores="norm"))
    execute(Workspace(other, tmp_path, given=weights), "one-shot")
    assert Config.read(tmp_path / "config.json") == tiny(1)
    execute(Workspace(Config.read(tmp_path / "config.json"), tmp_path), "sparsify")


def test_a_stage_without_its_predecessor_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MaskSparsityError, match=r"masksparsity mask-sparsify.*--weights"):
        execute(Workspace(tiny(), tmp_path / "out"), "prune")
    assert not (tmp_path / "out").exists()
    with pytest.raises(MaskSparsityError, match=r"no file .*w\.th"):
        execute(Workspace(tiny(), tmp_path, given={"weights": Path("w.th")}), "sparsify")


@pytest.mark.parametrize(
    ("section", "message"),
    [({"input": (3, 8, 8)}, "--model.input 1 8 8"), ({"classes": 7}, "--model.classes 10")],
)
def test_a_model_for_other_data_says_which_flag(
    tmp_path: Path, section: dict[str, Any], message: str
) -> None:
    config = tiny()
    with pytest.raises(MaskSparsityError, match=message):
        run(Workspace(replace(config, model=replace(config.model, **section)), tmp_path))


def test_a_mask_that_cannot_be_had_is_refused_before_any_training(tmp_path: Path) -> None:
    for mask, message in (
        (MaskConfig(ignore=("layer9",)), "'layer9'"),
        (MaskConfig(pruned_macs=0.9999), "cannot be met"),
        (MaskConfig(file=str(tmp_path / "none.json")), "no such file"),
    ):
        with pytest.raises(MaskSparsityError, match=message):
            run(Workspace(tiny(mask=mask), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_stage_that_cannot_be_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "train").mkdir()
    monkeypatch.setattr(Path, "rename", refuse)
    again = RunDir(tmp_path).anew("train")
    with pytest.raises(RunFailure, match=r"cannot remove .*train: Permission denied"), again:
        pass
    assert (tmp_path / "train").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="has no fcntl")
def test_a_stage_that_another_process_does_is_refused(tmp_path: Path) -> None:
    work = Workspace(tiny(), tmp_path)
    with work.runs.alone("train"), pytest.raises(RunFailure, match="another process works in"):
        execute(work, "train")
    execute(work, "train")
