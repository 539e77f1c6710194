"""The whole pipeline on the embedded digits, with a narrow network and two epochs per stage."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import masksparsity as ms
from masksparsity.errors import MaskSparsityError, RunFailure
from masksparsity.pipeline import Config, Workspace, execute, results, run
from masksparsity.pipeline.choices import choose_mask
from masksparsity.pipeline.config import MaskConfig
from masksparsity.pipeline.stages import measure

from .tiny import tiny

STAGES = ("train", "sparsify", "mask", "mask-sparsify", "prune", "finetune")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(Workspace(tiny(), out))
    return out


def files(out: Path) -> dict[str, bytes]:
    """What a run leaves: every weight and every mask, to the byte."""
    found = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.safetensors")}
    assert len(found) == 6
    return found


def numbers(out: Path, config: Config | None = None) -> dict[str, Any]:
    """The results that time has no part in."""
    found = results.collect(Workspace(config or tiny(), out))
    curves = {
        stage: [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
        for stage, lines in found["curves"].items()
    }
    return {**found, "curves": curves, "seconds": None, "latency_ms": None, "command": None}


def test_results(whole: Path) -> None:
    found = results.write(Workspace(tiny(), whole))
    assert json.loads((whole / "results.json").read_text()) == found
    assert found["accuracy"].keys() == found["correct"].keys()
    assert set(found["correct"]) == {"baseline", "before_removal", "after_removal", "finetuned"}
    for key, correct in found["correct"].items():
        assert found["accuracy"][key] == correct / found["total"]
    assert found["correct"]["before_removal"] == found["correct"]["after_removal"]
    assert found["macs"]["slim"] <= 0.5 * found["macs"]["dense"]
    assert found["params"]["slim"] < found["params"]["dense"]
    assert tuple(found["seconds"]) == STAGES
    assert set(found["kept_scale_mean"]) == {"global_l1", "masked"}
    assert [line["epoch"] for line in found["curves"]["finetune"]] == [1, 2]
    assert found["latency_ms"]["slim"] > 0
    assert found["warnings"] == []
    sizes = [layer["dense"] for layer in found["layers"]]
    for scales in found["scales"].values():
        assert len(scales["edges"]) == 51
        assert sum(scales["kept"]) + sum(scales["pruned"]) == sum(sizes)
        assert sum(scales["kept"]) == sum(layer["kept"] for layer in found["layers"])
    # Every masked scale was driven to zero.
    assert found["scales"]["masked"]["pruned"][0] == sum(found["scales"]["masked"]["pruned"])


def test_stages_one_by_one_from_their_files_give_the_bits_of_a_run(
    whole: Path, tmp_path: Path
) -> None:
    made = {
        "train": {},
        "sparsify": {"weights": "train"},
        "mask": {"weights": "sparsify"},
        "mask-sparsify": {"weights": "train", "mask": "mask"},
        "prune": {"weights": "mask-sparsify", "mask": "mask"},
        "finetune": {"weights": "prune"},
    }
    names = {"weights": "model.safetensors", "mask": "mask.json"}
    for stage, inputs in made.items():
        given = {k: whole / source / names[k] for k, source in inputs.items()}
        torch.manual_seed(99)  # a new process would have other generators
        execute(Workspace(tiny(), tmp_path, given=given), stage)
    assert files(tmp_path) == files(whole)
    assert numbers(tmp_path) == numbers(whole)


def test_a_complete_run_is_left_alone(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.*") if path.is_file()}
    run(Workspace(tiny(), whole))
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize(
    ("stage", "sign"), [("train", signal.SIGKILL), ("mask-sparsify", signal.SIGINT)]
)
def test_stopped_and_started_again_gives_the_same_bits(
    whole: Path, tmp_path: Path, stage: str, sign: signal.Signals
) -> None:
    config, out = tmp_path / "config.json", tmp_path / "out"
    config.write_text(json.dumps(tiny().as_json()))
    command = [sys.executable, "-m", "masksparsity", "run", "--config", str(config)]
    process = subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # What shells start in the background ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (out / stage / "checkpoint.safetensors").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(sign)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if sign == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in errors
    assert not (out / "finetune").exists()

    run(Workspace(tiny(), out))
    assert files(out) == files(whole)
    assert numbers(out) == numbers(whole)


def test_a_full_disk_stops_the_stage_and_the_next_start_goes_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.replace

    def full(source: Path, target: Path) -> None:
        if "sparsify" in str(target) and target.name == "model.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(RunFailure, match=r"sparsify.model\.safetensors: No space left"):
            run(Workspace(tiny(), tmp_path))
    assert (tmp_path / "train" / "result.json").exists()
    assert not list(tmp_path.rglob("*.partial"))
    run(Workspace(tiny(), tmp_path))
    assert files(tmp_path) == files(whole)


def test_other_settings_are_refused_and_fresh_does_again_what_depends_on_them(
    whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    other = tiny(mask=MaskConfig(pruned_macs=0.6))
    with pytest.raises(MaskSparsityError, match=r"mask\.pruned_macs is 0\.5 there and 0\.6 here"):
        run(Workspace(other, out))
    with pytest.raises(MaskSparsityError, match=r"mask\.pruned_macs"):
        execute(Workspace(other, out), "finetune", fresh=True)
    assert files(out) == files(whole)

    # A mistake costs nothing that was there.
    results.write(Workspace(tiny(), out))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    data = replace(tiny().data, name="folder", root=tmp_path / "nowhere")
    impossible = tiny(mask=MaskConfig(pruned_macs=0.9999))
    with pytest.raises(MaskSparsityError, match="no such file or directory"):
        run(Workspace(replace(tiny(), data=data), out), fresh=True)
    with pytest.raises(MaskSparsityError, match="cannot be met"):
        execute(Workspace(impossible, out), "mask", fresh=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    execute(Workspace(other, out), "mask", fresh=True)
    assert not (out / "results.json").exists()  # it told of what is no more
    run(Workspace(other, out), fresh=True)
    ours, theirs = files(out), files(whole)
    same = {name for name in theirs if ours[name] == theirs[name]}
    assert same == {"train/model.safetensors", "sparsify/model.safetensors"}
    assert numbers(out, other)["macs"]["slim"] <= 0.4 * numbers(out, other)["macs"]["dense"]


def test_settings_that_change_no_number_may_change(whole: Path) -> None:
    config = tiny()
    other = replace(config, data=replace(config.data, workers=7), threads=2, recipe="other name")
    before = recorded(whole)
    run(Workspace(other, whole))
    assert recorded(whole) == before  # seconds, too: nothing was done again


@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_of_before_a_setting_was_there_has_its_default(
    whole: Path, tmp_path: Path, fresh: bool
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    newer = {"mask": "rounds", "data": "flip", "train": "label_smoothing", "baseline": "gamma"}
    for path in (out / "config.json", *out.glob("*/config.json")):
        saved = json.loads(path.read_text())
        for section in newer.keys() & saved.keys():
            del saved[section][newer[section]]
        saved.pop("prune", None)  # a section whose settings all have defaults
        path.write_text(json.dumps(saved))
    run(Workspace(tiny(), out), fresh=fresh)
    run(Workspace(Config.read(out / "config.json"), out), fresh=fresh)
    assert recorded(out) == recorded(whole)
    other = tiny(mask=MaskConfig(rounds=2))
    with pytest.raises(MaskSparsityError, match=r"mask\.rounds is 1 there and 2 here"):
        run(Workspace(other, out))


@pytest.mark.parametrize(
    ("file", "content"),
    [("result.json", "{}"), ("result.json", "[]"), ("metrics.jsonl", '{"epoch": 1, "tra')],
)
def test_a_damaged_file_of_a_stage_is_named(
    whole: Path, tmp_path: Path, file: str, content: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "sparsify" / file).write_text(content)
    with pytest.raises(MaskSparsityError, match=rf"sparsify.{file} cannot be read.*remove"):
        results.write(Workspace(tiny(), out))


def test_weights_of_another_precision_are_read_in_that_of_the_images(
    whole: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "half.safetensors"
    ms.save(ms.load(whole / "finetune" / "model.safetensors", tiny_model()).bfloat16(), weights)
    work = Workspace(tiny(), tmp_path)
    assert measure(work, work.network(weights))["total"] == numbers(whole)["total"]


def tiny_model() -> nn.Module:
    return ms.models.create("resnet20", in_channels=1, width=8)


def recorded(out: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in out.glob("*/result.json")}


def test_settings_of_later_stages_do_not_matter_to_earlier_ones(whole: Path) -> None:
    config = tiny()
    other = replace(config, finetune=replace(config.finetune, lr=1))
    before = recorded(whole)
    execute(Workspace(other, whole), "prune")
    assert recorded(whole) == before


def test_a_given_mask_needs_no_sparsify(whole: Path, tmp_path: Path) -> None:
    config = tiny(1, mask=MaskConfig(file=str(whole / "mask" / "mask.json")))
    run(Workspace(config, tmp_path))
    found = numbers(tmp_path, config)
    assert not (tmp_path / "sparsify").exists()
    assert found["macs"] == numbers(whole)["macs"]
    assert set(found["kept_scale_mean"]) == {"masked"}


def without_norms() -> nn.Module:
    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))


def test_a_network_without_scales_needs_no_penalty_on_them(tmp_path: Path) -> None:
    config = tiny(1, mask=MaskConfig(scores="norm"))
    model = replace(config.model, name=f"{__name__}:without_norms", options=())
    sparsify = replace(config.sparsify, epochs=0)
    config = replace(config, model=model, sparsify=sparsify, seed=2**64 - 1)
    run(Workspace(config, tmp_path))
    correct = numbers(tmp_path, config)["correct"]
    assert correct["before_removal"] == correct["after_removal"]


def test_the_published_penalty_warns_where_it_does_not_reach_zero(
    whole: Path, tmp_path: Path
) -> None:
    config = tiny(1)
    config = replace(config, mask_sparsify=replace(config.mask_sparsify, penalty="masked-l1"))
    given = {
        "weights": whole / "train" / "model.safetensors",
        "mask": whole / "mask" / "mask.json",
    }
    result = execute(Workspace(config, tmp_path, given=given), "mask-sparsify")
    assert "not near zero" in result["warnings"][0]


@pytest.mark.parametrize(
    ("select", "setting", "some", "more"),
    [
        ("budget", "pruned_macs", 0.3, 0.6),
        ("budget", "pruned_params", 0.3, 0.6),
        ("threshold", "threshold", 1.0, 1.1),
        ("optimal", "energy", 0.1, 0.2),
        ("fraction", "pruned_fraction", 0.3, 0.6),
        ("uniform", "pruned_fraction", 0.3, 0.6),
    ],
)
def test_every_selector_heeds_its_settings(
    whole: Path, tmp_path: Path, select: Any, setting: str, some: float, more: float
) -> None:
    work = Workspace(tiny(), tmp_path)
    model = work.network(whole / "sparsify" / "model.safetensors")
    graph = work.trace(model)

    def chosen(value: float, round_to: int = 1) -> ms.KeepMask:
        settings: dict[str, Any] = {setting: value, "round_to": round_to}
        return choose_mask(MaskConfig(select=select, **settings), model, graph)

    assert 0 < chosen(some).pruned_fraction < chosen(more).pruned_fraction
    prunable = [group.prunable for group in graph.groups]
    kept = chosen(some, round_to=4).kept[torch.tensor(prunable)]
    assert (kept % 4 == 0).all()


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_mask_by_taylor_scores_of_training_images(
    whole: Path, tmp_path: Path, rounds: int
) -> None:
    config = tiny(mask=MaskConfig(scores="taylor", rounds=rounds))
    given = {"weights": whole / "train" / "model.safetensors"}
    work = Workspace(config, tmp_path, given=given)
    execute(work, "mask")
    model = work.network(given["weights"])
    graph = work.trace(model)

    def scores(kept: ms.KeepMask) -> ms.scores.Scores:  # of fewer images than it may take
        masked = ms.apply_mask(model, graph, kept)
        return ms.scores.taylor(masked, graph, work.data.training().epoch(0))

    expected = ms.select.budget(graph, scores, pruned_macs=0.5, rounds=rounds)
    assert torch.equal(ms.KeepMask.load(tmp_path / "mask" / "mask.json", graph).kept, expected.kept)


def test_scratch_and_one_shot(whole: Path, tmp_path: Path) -> None:
    given = {"mask": whole / "mask" / "mask.json"}
    result = execute(Workspace(tiny(1), tmp_path, given=given), "scratch")
    assert result["total"] == numbers(whole)["total"]

    given = {"weights": whole / "train" / "model.safetensors"}
    config = tiny(mask=MaskConfig(pruned_macs=0.2, scores="norm"))
    work = Workspace(config, tmp_path, given=given)
    result = execute(work, "one-shot")
    assert result["macs"]["slim"] <= 0.8 * result["macs"]["dense"]
    assert result["before_removal"]["correct"] == numbers(whole)["correct"]["baseline"]
    assert result["correct"] > result["after_removal"]["correct"]  # what recalibration brings
    slim = work.network(tmp_path / "one-shot" / "model.safetensors")
    assert work.trace(slim).cost().macs == result["macs"]["slim"]


def test_the_dense_network_teaches_the_slim_one(whole: Path, tmp_path: Path) -> None:
    given = {"weights": whole / "prune" / "model.safetensors"}
    taught = replace(tiny().finetune, distill=0.5)
    with pytest.raises(MaskSparsityError, match=r"needs the teacher of train, .* --teacher"):
        execute(Workspace(tiny(finetune=taught), tmp_path / "alone", given=given), "finetune")

    given["teacher"] = whole / "train" / "model.safetensors"
    for name, finetune in (("plain", tiny().finetune), ("taught", taught)):
        execute(Workspace(tiny(finetune=finetune), tmp_path / name, given=given), "finetune")
    untaught = (whole / "finetune" / "model.safetensors").read_bytes()
    assert (tmp_path / "plain" / "finetune" / "model.safetensors").read_bytes() == untaught
    assert (tmp_path / "taught" / "finetune" / "model.safetensors").read_bytes() != untaught

    # In a run it is the run's own baseline, and a change of either does the stage again.
    copied = shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(MaskSparsityError, match=r"finetune.distill is 0.0 there and 0.5 here"):
        run(Workspace(tiny(finetune=taught), copied))
    run(Workspace(tiny(finetune=taught), copied), fresh=True)
    again = (copied / "finetune" / "model.safetensors").read_bytes()
    assert again == (tmp_path / "taught" / "finetune" / "model.safetensors").read_bytes()


def test_removal_of_what_is_not_zero_warns(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"mask": whole / "mask" / "mask.json", "weights": whole / "train" / "model.safetensors"}
    result = execute(Workspace(tiny(), tmp_path, given=given), "prune")
    assert "not zero" in result["warnings"][0]
    assert "prune: the removed channels are not zero" in capsys.readouterr().err
    assert numbers(whole)["warnings"] == []
