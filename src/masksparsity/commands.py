"""The commands of the shell: one per stage, one for all of them, and tools to look at things."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

import masksparsity as ms
from masksparsity import report as reporting
from masksparsity.errors import MaskSparsityError
from masksparsity.pipeline import results, runner
from masksparsity.pipeline.choices import choose_mask, read_mask
from masksparsity.pipeline.config import Config
from masksparsity.pipeline.origin import device_name
from masksparsity.pipeline.rundir import CONFIG, FILES
from masksparsity.pipeline.stages import STAGES, measure
from masksparsity.pipeline.workspace import Workspace
from masksparsity.train import dist


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where a stage reads and writes."""

    out: Path | None = None
    """Run directory; runs/RECIPE if not given."""
    fresh: bool = False
    """Do the stage again, and discard what came of it."""


@dataclass(frozen=True, kw_only=True)
class WithWeights(Files):
    """Of stages that start from weights."""

    weights: Path | None = None
    """Start from these weights instead of those of the stage before."""


@dataclass(frozen=True, kw_only=True)
class WithMask(Files):
    """Of stages that start from a mask."""

    mask: Path | None = None
    """Use this mask instead of the run's own."""


@dataclass(frozen=True, kw_only=True)
class WithTeacher(Files):
    """Of stages that may be taught by another network."""

    teacher: Path | None = None
    """The dense network to learn from, instead of the run's own; for a share of distill above 0."""


def misplaced(stage: str, key: str) -> str:
    """That a stage is given a file that it does not start from."""
    hint = {
        "weights": "did you mean --model.weights?",
        "mask": "did you mean --mask.file?",
        "teacher": "mask-sparsify, finetune and scratch do",
    }[key]
    return f"{stage} takes no --{key}; {hint}"


@functools.cache
def files_of(name: str) -> type[Files]:
    """The files that a stage can be given."""
    inputs = STAGES[name].inputs if name in STAGES else ()
    kinds: dict[str, type[Files]] = {
        "weights": WithWeights,
        "mask": WithMask,
        "teacher": WithTeacher,
    }
    bases = (*(kinds[key] for key in inputs), Files)
    return dataclass(frozen=True, kw_only=True)(type("Files", bases, {}))


Flags = Annotated[Config, tyro.conf.arg(name="")]
AsFlags = tyro.conf.arg(name="")
Masks = Annotated[tuple[Path, ...], tyro.conf.Positional]


def run(
    config: Flags, *, out: Path | None = None, with_scratch: bool = False, fresh: bool = False
) -> None:
    """Do all stages, going on from what is complete, and write the report.

    Args:
        out: Run directory; runs/RECIPE if not given.
        with_scratch: Also train the slim architecture from random weights.
        fresh: Do again what was begun with other settings, and discard what came of it.
    """
    work = Workspace(config, out)
    runner.run(work, with_scratch=with_scratch, fresh=fresh)
    _report(work)


def inspect(config: Flags, *, weights: Path | None = None) -> None:
    """Show what can be pruned, what is protected and why, and what a mask would save.

    Args:
        weights: An archive, dense or slim, bare weights, or a run directory: the network that the
            run has come to, with its settings. --model.weights serves too.
    """
    work, path = Workspace(config), weights or config.model.weights
    model = work.network(path) if path else work.dense()
    work.check(model)
    graph = work.trace(model)
    show(str(graph))
    random = "With random weights, which say nothing of the choice"
    whose = "With these weights" if path else random
    if config.mask.scores == "taylor" and not config.mask.file:
        whose += ", and norms of filters in place of Taylor scores, which take training images"
    show(f"{whose}: {choose_mask(config.mask, model, graph)}")


def prune(config: Flags, files: Files, *, one_shot: bool = False) -> None:
    """Take the masked channels out, and count what the network gets right before and after.

    Args:
        one_shot: Choose the mask from the weights themselves, and train nothing.
    """
    _execute("one-shot" if one_shot else "prune", config, files)


prune.__annotations__["files"] = Annotated[files_of("prune"), AsFlags]


def evaluate(config: Flags, *, weights: Path | None = None) -> None:
    """Count what a network gets right on the whole test set.

    Args:
        weights: An archive, dense or slim, bare weights, or a run directory: the network that the
            run has come to, with its settings. --model.weights serves too.
    """
    path = weights or config.model.weights
    if path is None:
        raise MaskSparsityError("evaluate needs weights: --weights FILE, or a run directory")
    work = Workspace(config)
    counted = measure(work, work.network(path))
    show(f"accuracy {counted['accuracy']:.2%} ({counted['correct']} of {counted['total']})")


def profile(config: Flags, *, weights: Path | None = None) -> None:
    """Count and measure what a network costs.

    Args:
        weights: An archive, dense or slim, bare weights, or a run directory: the network that the
            run has come to, with its settings. Random if not given.
    """
    work = Workspace(config)
    path = weights or config.model.weights
    found = ms.profile(work.network(path) if path else work.dense(), work.example())
    low, high = found.latency_spread_ms
    show(
        f"{found.macs:,} MACs, {found.params:,} parameters, "
        f"{found.latency_ms:.2f} ms per image (quartiles {low:.2f} and {high:.2f}), "
        f"{found.memory_mib:.1f} MiB held at most; {device_name(work.device)}"
    )


def export(config: Flags, *, weights: Path | None = None, out: Path = Path("model.onnx")) -> None:
    """Write a network for use outside of Python, checked against the one that it is made from.

    Args:
        weights: An archive, dense or slim, bare weights, or a run directory: the network that the
            run has come to, with its settings. --model.weights serves too.
        out: ONNX (.onnx) or torch.export (.pt2); batches of any length.
    """
    path = weights or config.model.weights
    if path is None:
        raise MaskSparsityError("export needs weights: --weights FILE, or a run directory")
    work = Workspace(config)
    ms.export(work.network(path), work.example(), out)
    show(f"{out}: {out.stat().st_size / 2**20:.1f} MiB")


def compare_masks(config: Flags, masks: Masks) -> None:
    """Tell how much masks agree: intersection over union of what they prune.

    Args:
        masks: Two or more masks, ours or the original project's, or runs that have made one.
    """
    if len(masks) < 2:
        raise MaskSparsityError("compare-masks needs two masks or more")
    work = Workspace(config)
    work.check(model := work.dense())
    graph = work.trace(model)
    files = {path: path / "mask" / FILES["mask"] if path.is_dir() else path for path in masks}
    read = [(path, read_mask(files[path], graph)) for path in masks]
    for path, keep in read:
        show(f"{path}: {keep}")
    counted = "BatchNorm channel" if graph.norms else "channel"
    for (first, keep), (second, other) in combinations(read, 2):
        show(f"IoU {keep.iou(other):.3f} of {first} and {second}, counted per {counted}")


def report(config: Flags, *, out: Path | None = None) -> None:
    """Write results.json and report.html of a run, complete or not, with the run's own settings.

    Of the flags only --out and --recipe are for it; others are refused.

    Args:
        out: Run directory; runs/RECIPE if not given.
    """
    out = out or Path("runs") / config.recipe
    if not (out / CONFIG).exists():
        raise MaskSparsityError(f"{out} holds no run; `masksparsity run` makes one")
    _report(Workspace(Config.read(out / CONFIG), out))


def show(what: object) -> None:
    """Put a result on stdout, once."""
    if dist.rank() == 0:
        Console(soft_wrap=True, highlight=False, markup=False).print(what)


def _stage(name: str) -> Callable[..., None]:
    def command(config: Flags, files: Files) -> None:
        _execute(name, config, files)

    command.__doc__ = STAGES[name].body.__doc__
    command.__annotations__["files"] = Annotated[files_of(name), AsFlags]
    return command


def _execute(name: str, config: Config, files: Files) -> None:
    inputs = {key: getattr(files, key, None) for key in FILES}
    given = {key: path for key, path in inputs.items() if path is not None}
    for key in given.keys() - STAGES[name].inputs.keys():
        raise MaskSparsityError(misplaced(name, key))
    work = Workspace(config, files.out, given=given)
    unread = given.keys() - work.inputs(STAGES[name]).keys()
    if "teacher" in unread:
        raise MaskSparsityError(f"--teacher needs a share of the loss: --{name}.distill 0.5")
    if unread:
        raise MaskSparsityError(f"--{min(unread)} is not read with --mask.file, which is the mask")
    runner.execute(work, name, fresh=files.fresh)


def _report(work: Workspace) -> None:
    if dist.rank() == 0:
        found = results.write(work)
        page = reporting.write(work.runs.path)
        show(reporting.table(found))
        show(f"report: {page}")


COMMANDS: dict[str, Callable[..., None]] = {
    "run": run,
    "inspect": inspect,
    **{name: _stage(name) for name in ("train", "sparsify", "mask", "mask-sparsify")},
    "prune": prune,
    **{name: _stage(name) for name in ("finetune", "scratch")},
    "evaluate": evaluate,
    "profile": profile,
    "export": export,
    "compare-masks": compare_masks,
    "report": report,
}
NEED_DATA = frozenset({"run", "evaluate", "report", *STAGES})
