"""The command line: what it prints, what it exits with, and that mistakes get one clear line."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor, nn

import masksparsity as ms
from masksparsity.cli import COMMANDS, main
from masksparsity.pipeline import Config
from masksparsity.recipes import RECIPES

Shell = Callable[..., tuple[int, str, str]]
SMALL = ["--model.options", "in_channels=1", "width=8"]


@pytest.fixture
def shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Shell:
    """Run a command in this process, in a folder of its own: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["masksparsity", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def epochs(count: int) -> list[str]:
    stages = ("baseline", "sparsify", "mask-sparsify", "finetune")
    return [word for stage in stages for word in (f"--{stage}.epochs", str(count))]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained small network as an archive."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    ms.save(ms.models.create("resnet20", num_classes=10, in_channels=1, width=8), path)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which a whole run was made, and what it printed."""
    folder, out = tmp_path_factory.mktemp("whole"), io.StringIO()
    words = ["masksparsity", "run", "digits-resnet20", *SMALL, *epochs(1), "--seed", "3"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(folder)
        patch.setenv("COLUMNS", "100")
        patch.setattr(sys, "argv", words)
        main()
    return folder, out.getvalue()


@pytest.fixture
def run(whole: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of that run, where `shell` works."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs" / "digits-resnet20"


def test_run_ends_with_the_table_and_the_report(whole: tuple[Path, str], run: Path) -> None:
    _, out = whole
    assert "mask-sparsify" in out
    assert "runs/digits-resnet20/report.html" in out
    assert (run / "report.html").exists()
    assert json.loads((run / "results.json").read_text())["command"].endswith("--seed 3")
    assert Config.read(run / "config.json").seed == 3


def test_a_run_started_again_has_nothing_to_do(shell: Shell, run: Path) -> None:
    code, _, err = shell("run", "--seed", 3, f"--config={run / 'config.json'}")
    assert code == 0
    assert err.count("done before") == 6


def test_a_run_is_known_by_its_directory(shell: Shell, run: Path) -> None:
    """Its settings, and the network that it has come to."""
    finetuned = json.loads((run / "results.json").read_text())["correct"]["finetuned"]
    code, out, err = shell("evaluate", "--weights", run)
    assert code == 0, err
    assert f"({finetuned} of " in out
    code, out, err = shell("export", f"--weights={run}", "--out", "slim.pt2")
    assert code == 0, err
    code, out, err = shell("profile", "--weights", run / "prune/model.safetensors")
    assert code == 0, err
    code, out, err = shell("compare-masks", run / "mask/mask.json", run)
    assert code == 0, err
    assert "IoU 1.000" in out


def test_a_damaged_stage_says_how_it_is_made_anew(shell: Shell, run: Path) -> None:
    cut = run / "mask-sparsify/model.safetensors"
    cut.write_bytes(cut.read_bytes()[:1000])
    code, _, err = shell("prune", f"--config={run / 'config.json'}", "--out", run, "--fresh")
    assert code == 2
    assert "`masksparsity mask-sparsify --fresh` makes it anew" in err
    assert (run / "finetune/model.safetensors").exists()  # nothing is lost


def test_help_names_every_command_and_recipe(shell: Shell) -> None:
    code, out, _ = shell("--help")
    assert code == 0
    assert all(name in out for name in (*COMMANDS, *RECIPES))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_flags_from_the_config(shell: Shell, command: str) -> None:
    code, out, _ = shell(command, "cifar10-resnet56", "--help")
    assert code == 0
    assert "--mask-sparsify.strength" in out
    assert "0.55" in out  # the recipe's budget is the flag's default


def test_tools(shell: Shell, weights: Path, tmp_path: Path) -> None:
    code, out, _ = shell("inspect", *SMALL)
    assert code == 0
    assert "protected" in out
    assert "MACs -5" in out

    code, out, _ = shell("evaluate", *SMALL, "--weights", weights)
    assert code == 0
    assert "accuracy" in out

    code, out, _ = shell("profile", *SMALL, "--weights", weights)
    assert code == 0
    assert "ms per image" in out

    for name, share in (("a", 0.3), ("b", 0.5)):
        selection = ["--mask.select", "uniform", "--mask.pruned-fraction", share]
        assert shell("mask", *SMALL, *selection, "--weights", weights, "--out", name)[0] == 0
    code, out, _ = shell("compare-masks", "a/mask/mask.json", "b/mask/mask.json", *SMALL)
    assert code == 0
    assert "IoU 0." in out


def test_prune_one_shot(shell: Shell, weights: Path, tmp_path: Path) -> None:
    code, _, err = shell("prune", "--one-shot", *SMALL, "--weights", weights, "--out", "out")
    assert code == 0, err
    assert "right before removal" in err
    code, _, _ = shell("profile", *SMALL, "--weights", "out/one-shot/model.safetensors")
    assert code == 0
    slim = ("--weights", "out/one-shot/model.safetensors", "--out", "slim.pt2")
    code, out, err = shell("export", *SMALL, *slim)
    assert code == 0, err
    assert "slim.pt2" in out
    assert (tmp_path / "slim.pt2").exists()
    code, out, _ = shell("report", "--out", "out")
    assert code == 0
    assert "equals" in out or "removal took" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "no command 'bogus'"),
        (["run", "bogus"], "no recipe 'bogus'"),
        (["run", "--config"], "--config needs a file"),
        (["run", "--config", "missing.json"], "missing.json"),
        (["run", "--nonsense", "1"], "nonsense"),
        (["run", "--baseline.epochs", "-1"], "negative"),
        (["run", "--baseline.lr", "nan"], "baseline.lr=nan: must be finite"),
        (["run", "--finetune.lr", "inf"], "finetune.lr=inf: must be finite"),
        (["run", "--sparsify.strength", "-1"], "sparsify.strength=-1.0: must be"),
        (["run", "--seed", str(2**64)], "64 bits"),
        (["run", "--model.input", "-1", "8", "8"], "model.input and model.classes must"),
        (["run", "--model.name", "tests.test_cli:other_input"], "not take images of 1 8 8"),
        (["train", "--model.name", "tests.test_cli:pair"], "returns tuple for one image"),
        (["train", "--model.name", "tests.test_cli:few"], "returns [1, 3] for one image"),
        (["run", "--model.name", "tests.test_cli:nothing"], "has no parameters"),
        (["train", "--model.name", "tests.test_cli:lazy"], "0.weight has no size yet"),
        (["run", "--model.name", "resnet21"], "resnet21"),
        (["run", "--model.options", "width"], "KEY=VALUE"),
        (["run", "--mask.file", "missing.json", "--baseline.epochs", "0"], "missing"),
        (["train", "--mask", "x.json"], "train takes no --mask"),
        (["mask", "--mask", "x.json"], "did you mean --mask.file?"),
        (["inspect", "--model.name", "tests.test_cli:broken"], "raised ValueError: no width"),
        (["mask", "--mask.pruned-macs", "0.9999", "--weights", "WEIGHTS"], "cannot be met"),
        (["mask", "--mask.ignore", "layer9", "--weights", "WEIGHTS"], "layer9"),
        (["evaluate"], "--weights"),
        (["evaluate", "--weights", "."], "holds no network"),
        (["evaluate", "--weights", "missing.th"], "missing.th"),
        (["evaluate", "--weights", "CUT"], "cut.safetensors"),
        (["evaluate", "--model.name", "resnet32", "--weights", "WEIGHTS"], "another architecture"),
        (["evaluate", "--data.name", "folder", "--data.root", ".", "--weights", "WEIGHTS"], "."),
        (["compare-masks", "one.json"], "two masks"),
        (["report"], "holds no run"),
        (["report", "--seed", "1"], "does not read --seed"),
        (["inspect", "--mask.threshold=0.1"], "--mask.select budget: it is for threshold"),
        (["mask", "--mask.select", "uniform", "--mask.pruned_macs", "0.1"], "select uniform: it"),
        (["run", "--mask-sparsify.strength", "0.1"], "is for masked-l1 and proximal"),
        (["run", "--finetune.temperature", "2"], "--finetune.distill 0.0: it is for more"),
        (["run", "--finetune.distill", "2"], "distill is a share of the loss"),
        (["finetune", "--teacher", "x.th"], "needs a share of the loss: --finetune.distill"),
        (["train", "--teacher", "x.th"], "train takes no --teacher"),
        (["run", "--baseline.gamma", "0.5"], "--baseline.schedule cosine: it is for step"),
        (["run", "--baseline.momentum", "1"], "momentum and ema are"),
        (["run", "--mask-sparsify.decay-span", "2"], "decay_fraction and decay_span are"),
        (["run", "--mask.pruned-macs", "0.4", "--mask.pruned-params", "0.1"], "settles the mask"),
        (["run", "--mask.file", "m.json", "--mask.scores", "norm"], "--mask.file, which settles"),
        (["mask", "--mask.file", "m.json", "--weights", "x.th"], "--weights is not read with"),
    ],
)
def test_mistakes_exit_with_2_and_say_what(
    shell: Shell, weights: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:1000])
    named = {"WEIGHTS": weights, "CUT": cut}
    small = SMALL if "WEIGHTS" in arguments else []
    code, _, err = shell(*(named.get(word, word) for word in arguments), *small)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def broken(num_classes: int = 10) -> None:
    raise ValueError("no width")


def other_input() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 10))


def few() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return x, super().forward(x.flatten(1))


def pair() -> nn.Module:
    return Pair(64, 10)


def nothing() -> nn.Module:
    return nn.Flatten()


def lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.LazyLinear(10), nn.Flatten())


def test_another_model_than_the_recipes_takes_none_of_its_options(shell: Shell) -> None:
    for name in ("torchvision/resnet18", "resnet32"):
        code, out, _ = shell("inspect", "--model.name", name)
        assert code == 0
        assert "With random weights" in out


def test_a_stand_in_for_scores_is_told(shell: Shell) -> None:
    code, out, _ = shell("inspect", "--mask.scores", "taylor")
    assert code == 0
    assert "norms of filters in place of Taylor scores" in out


def test_a_failed_run_exits_with_1(shell: Shell) -> None:
    code, _, err = shell("train", *SMALL, "--baseline.lr", "1e30")
    assert code == 1
    assert "Lower the learning rate" in err


def test_as_a_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "masksparsity", "train", "nosuch"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("masksparsity: there is no recipe 'nosuch'")
    assert len(done.stderr.splitlines()) == 1
