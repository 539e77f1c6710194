"""Doing stages: what is complete is kept, what was begun goes on, what does not fit is refused."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from masksparsity.errors import MaskSparsityError
from masksparsity.pipeline.choices import choose_mask
from masksparsity.pipeline.config import defaults
from masksparsity.pipeline.origin import origin
from masksparsity.pipeline.rundir import CONFIG
from masksparsity.pipeline.stages import STAGES
from masksparsity.pipeline.workspace import Stage, Workspace
from masksparsity.train import dist
from masksparsity.train.progress import say

RUN = ("train", "sparsify", "mask", "mask-sparsify", "prune", "finetune")


def run(work: Workspace, *, with_scratch: bool = False, fresh: bool = False) -> None:
    """Do all stages, going on from what the run directory holds.

    Stages that were begun with other settings are refused; if `fresh`, they are done again
    together with everything that started from them.
    """
    if not work.runs.complete("mask"):
        # Data or a mask that cannot be had should not cost two trainings first.
        work.data.training()
        model = work.dense()
        work.check(model)
        choose_mask(work.config.mask, model, work.trace(model))
    for name in (*RUN, *(["scratch"] if with_scratch else [])):
        if not (name == "sparsify" and work.config.mask.file):
            differs = any(_unequal(work.runs.asked(name), work.asked(STAGES[name])))
            execute(work, name, fresh=fresh and differs)


def execute(work: Workspace, name: str, *, fresh: bool = False) -> dict[str, Any]:
    """Do one stage, or what is left of it, and return its result.

    If `fresh`, what there is of it is discarded, and every stage that started from its files.
    """
    stage, folder = STAGES[name], work.runs.folder(name)
    for needed in work.inputs(stage):
        work.file(stage, needed)
    asked = work.asked(stage)
    _refuse_differences(work, stage, asked, fresh)
    if work.runs.complete(name) and not fresh:
        result = work.runs.result(name)
        say(f"{_line(name, result)}, done before")
        return result

    with contextlib.ExitStack() as stack:
        if dist.rank() == 0:
            stack.enter_context(work.runs.alone(name))
        dist.barrier()  # all have looked; now process 0 may write
        if dist.rank() == 0:
            if fresh:
                stack.enter_context(work.runs.anew(name))
            work.runs.begin(name, asked, work.config.as_json() if _agrees(work, name) else None)
        dist.barrier()
        killed = sum(line["seconds"] for line in work.runs.metrics(name))
        start = time.monotonic()
        result = stage.body(work, folder)
        result["seconds"] = killed + time.monotonic() - start
        result["origin"] = origin(work.device)
        if dist.rank() == 0:
            work.runs.end(name, result)
        dist.barrier()
    say(_line(name, result))
    for warning in result.get("warnings", []):
        say(f"{name}: {warning}")
    return result


def _agrees(work: Workspace, name: str) -> bool:
    """Whether the other stages there were asked for what the config says now. A stage that starts
    from given files may stand among those of another run, whose config has to stay."""
    for stage in STAGES.values():
        saved = work.runs.asked(stage.name) if stage.name != name else None
        if saved and any(_unequal(saved, work.asked(stage) | {"inputs": saved["inputs"]})):
            return False
    return True


def _refuse_differences(work: Workspace, stage: Stage, asked: dict[str, Any], fresh: bool) -> None:
    own = [] if fresh else list(_unequal(work.runs.asked(stage.name), asked))
    if differences := {*own, *_before(work, asked)}:
        raise MaskSparsityError(
            f"{work.runs.path} was begun with other settings: {'; '.join(sorted(differences))}. Go "
            f"on with its own by --config {work.runs.path / CONFIG} --out {work.runs.path}, keep "
            "it and choose another place with --out, or do again what differs with --fresh."
        )


def _before(work: Workspace, asked: dict[str, Any]) -> Iterator[str]:
    """Where the stages that `asked` starts from were asked for something else than now."""
    for source in asked["inputs"].values():
        saved = work.runs.asked(source) if source in STAGES else None
        if saved is not None:
            # It may have started from a given file itself: its own settings are what counts.
            now = work.asked(STAGES[source]) | {"inputs": saved["inputs"]}
            yield from _unequal(saved, now)
            yield from _before(work, now)


_DEFAULTS = defaults()


def _unequal(saved: Any, asked: Any, default: Any = _DEFAULTS, name: str = "") -> Iterator[str]:
    if isinstance(saved, dict) and isinstance(asked, dict):
        for key in saved.keys() | asked.keys():
            usual = (default or {}).get(key)  # of settings that one of the two does not know yet
            both = saved.get(key, usual), asked.get(key, usual)
            yield from _unequal(*both, usual, f"{name}.{key}")
    elif saved != asked and name:
        yield f"{name.lstrip('.')} is {saved} there and {asked} here"


def _line(name: str, result: dict[str, Any]) -> str:
    """A stage's result in a line."""
    parts = []
    if "accuracy" in result:
        parts.append(f"{result['accuracy']:.2%} ({result['correct']} of {result['total']})")
    if "before_removal" in result:
        before, after = (result[f"{when}_removal"]["correct"] for when in ("before", "after"))
        parts.append(f"{before} right before removal and {after} right after it")
    if "macs" in result:
        dense, slim = result["macs"]["dense"], result["macs"]["slim"]
        parts.append(f"{1 - slim / dense:.2%} of the MACs removed")
    return f"{name}: {', '.join(parts)}, {result['seconds']:.1f} s"
