"""The stages: each a function from its predecessor's files to files and a result of its own."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import masksparsity as ms
from masksparsity.channels.penalty import Penalty
from masksparsity.channels.surgery import remove, what_is_lost
from masksparsity.errors import MaskSparsityError
from masksparsity.pipeline.choices import choose_mask, create_penalty, read_mask
from masksparsity.pipeline.rundir import FILES
from masksparsity.pipeline.workspace import Stage, Workspace
from masksparsity.train import dist
from masksparsity.train.config import Phase
from masksparsity.train.evaluate import evaluate
from masksparsity.train.loop import fit
from masksparsity.train.progress import Meter
from masksparsity.train.step import Teacher

Result = dict[str, Any]

# The original's threshold: masked scales above it at the end are worth a warning.
NEAR_ZERO = 0.01
SCORED = 2048
"""Training images from which scores are read that need some."""


def train(work: Workspace, folder: Path) -> Result:
    """Train the dense network: the baseline."""
    model = work.dense(work.config.model.weights)
    return _train(work, folder, model, work.config.baseline)


def sparsify(work: Workspace, folder: Path) -> Result:
    """Train on from the baseline with a penalty on all scales."""
    config = work.config.sparsify
    model = _network(work, "sparsify")
    penalty = None
    if config.epochs:  # a network without scales has to go without
        graph = work.trace(model)
        penalty = ms.MaskedL1(model, graph, None, strength=config.strength, kind=config.kind)
    return _train(work, folder, model, config, penalty)


def mask(work: Workspace, folder: Path) -> Result:
    """Choose the channels that stay, or take the mask that is given."""
    model = work.dense() if work.config.mask.file else _network(work, "mask")
    graph = work.trace(model)
    keep = choose_mask(work.config.mask, model, graph, partial(_batches, work, SCORED))
    return _save_mask(work, folder, keep) | _costs(graph.cost(), graph.cost(keep))


def mask_sparsify(work: Workspace, folder: Path) -> Result:
    """Train from the baseline again, with a penalty on the masked scales alone: MaskSparsity."""
    config = work.config.mask_sparsify
    model = _network(work, "mask-sparsify")
    graph = work.trace(model)
    keep = read_mask(work.file(STAGES["mask-sparsify"], "mask"), graph)
    steps = config.epochs * len(work.data.training())
    penalty = create_penalty(config, model, graph, keep, steps)
    result = _train(work, folder, model, config, penalty, _teacher(work, "mask-sparsify"))
    return result | {"warnings": _warnings(model, keep)}


def prune(work: Workspace, folder: Path) -> Result:
    """Take the masked channels out, and count what the network gets right before and after."""
    model = _network(work, "prune")
    graph = work.trace(model)
    keep = read_mask(work.file(STAGES["prune"], "mask"), graph)
    result, slim = _prune(work, model, graph, keep)
    _save(folder, slim)
    absorbing = work.config.prune.absorb != "none"
    if lost := what_is_lost(model, graph, keep, absorbing):
        result["warnings"] = [lost]
    return result["after_removal"] | result


def one_shot(work: Workspace, folder: Path) -> Result:
    """Prune a trained network without any training but of its BatchNorm statistics."""
    model = _network(work, "one-shot")
    graph = work.trace(model)
    keep = choose_mask(work.config.mask, model, graph, partial(_batches, work, SCORED))
    result, slim = _prune(work, model, graph, keep)
    _recalibrate(work, slim, work.config.one_shot.images)
    _save(folder, slim)
    return _save_mask(work, folder, keep) | measure(work, slim) | result


def finetune(work: Workspace, folder: Path) -> Result:
    """Train the slim network on."""
    model, teacher = _network(work, "finetune"), _teacher(work, "finetune")
    return _train(work, folder, model, work.config.finetune, teacher=teacher)


def scratch(work: Workspace, folder: Path) -> Result:
    """Train the slim architecture from random weights: the ablation."""
    model = work.dense()
    graph = work.trace(model)
    keep = read_mask(work.file(STAGES["scratch"], "mask"), graph)
    # Slices of the dense network's random weights: their scale, which the dense widths set, does
    # not matter before a BatchNorm.
    slim = work.place(remove(model, graph, keep))
    return _train(work, folder, slim, work.config.scratch, teacher=_teacher(work, "scratch"))


_COMMON = ("seed", "model", "data", "train")
_DECAYED = {"weights": "mask-sparsify", "mask": "mask"}
_TAUGHT = {"teacher": "train"}  # if the phase asks for one
_MASKED = {"weights": "train", "mask": "mask", **_TAUGHT}

STAGES = {
    stage.name: stage
    for stage in (
        Stage("train", train, (*_COMMON, "baseline"), {}),
        Stage("sparsify", sparsify, (*_COMMON, "sparsify"), {"weights": "train"}),
        Stage("mask", mask, ("seed", "model", "mask"), {"weights": "sparsify"}),
        Stage("mask-sparsify", mask_sparsify, (*_COMMON, "mask_sparsify"), _MASKED),
        Stage("prune", prune, (*_COMMON, "prune"), _DECAYED),
        Stage("finetune", finetune, (*_COMMON, "finetune"), {"weights": "prune", **_TAUGHT}),
        Stage("scratch", scratch, (*_COMMON, "scratch"), {"mask": "mask", **_TAUGHT}),
        Stage("one-shot", one_shot, (*_COMMON, "mask", "prune", "one_shot"), {"weights": "train"}),
    )
}


def measure(work: Workspace, model: nn.Module) -> Result:
    """Count what `model` gets right on the test set."""
    work.check(model)
    with Meter("evaluate", len(work.data.test)) as meter:
        counted = evaluate(model, work.data.test, meter.advance)
    return {
        "accuracy": counted.accuracy,
        "correct": counted.correct,
        "total": counted.total,
        "loss": counted.loss,
    }


def _network(work: Workspace, stage: str) -> nn.Module:
    path, source = work.file(STAGES[stage], "weights"), work.inputs(STAGES[stage])["weights"]
    try:
        return work.network(path)
    except MaskSparsityError as error:
        if source not in STAGES:
            raise
        raise MaskSparsityError(
            f"{error}; `masksparsity {source} --fresh` makes it anew"
        ) from error


def _teacher(work: Workspace, stage: str) -> Teacher | None:
    """The dense network, if the stage's phase asks for it."""
    if "teacher" not in work.inputs(STAGES[stage]):
        return None
    phase = getattr(work.config, STAGES[stage].sections[-1])
    model = work.network(work.file(STAGES[stage], "teacher"))
    work.check(model)
    model.eval()
    return Teacher(model, phase.distill, phase.temperature)


def _train(
    work: Workspace,
    folder: Path,
    model: nn.Module,
    phase: Phase,
    penalty: Penalty | None = None,
    teacher: Teacher | None = None,
) -> Result:
    """Train for `phase`, settle the statistics, save, and count what came out."""
    work.check(model)
    if phase.epochs:
        fit(
            model, work.data, phase, work.config.train, folder=folder, seed=work.config.seed,
            penalty=penalty, teacher=teacher,
        )  # fmt: skip
        _recalibrate(work, model, phase.precise_bn)
    _save(folder, model)
    return measure(work, model)


def _recalibrate(work: Workspace, model: nn.Module, images: int) -> None:
    """Recompute BatchNorm statistics over `images` images, each process on its share."""
    if images:
        ms.recalibrate(model, (pixels for pixels, _ in _batches(work, images)))
        dist.average_buffers(model)


def _batches(work: Workspace, images: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of at least `images` training images and their labels."""
    count = -(-images // work.config.train.batch_size)
    yield from islice(work.data.training().epoch(0), count)


def _prune(
    work: Workspace, model: nn.Module, graph: ms.ChannelGraph, keep: ms.KeepMask
) -> tuple[Result, nn.Module]:
    before = measure(work, model)
    absorb = None if work.config.prune.absorb == "none" else work.config.prune.absorb
    slim = work.place(remove(model, graph, keep, absorb=absorb))
    result = {
        "before_removal": before,
        "after_removal": measure(work, slim),
        "latency_ms": {
            "dense": ms.profile(model, work.example()).latency_ms,
            "slim": ms.profile(slim, work.example()).latency_ms,
        },
    }
    return result | _costs(graph.cost(), work.trace(slim).cost()), slim


def _save(folder: Path, model: nn.Module) -> None:
    if dist.rank() == 0:
        ms.save(model, folder / FILES["weights"])


def _save_mask(work: Workspace, folder: Path, keep: ms.KeepMask) -> Result:
    if dist.rank() == 0:
        keep.save(folder / FILES["mask"], model=work.config.model.name)
    return {"pruned_fraction": keep.pruned_fraction}


def _costs(dense: ms.Cost, slim: ms.Cost) -> Result:
    return {
        "macs": {"dense": dense.macs, "slim": slim.macs},
        "params": {"dense": dense.params, "slim": slim.params},
    }


def _warnings(model: nn.Module, keep: ms.KeepMask) -> list[str]:
    """What the masked scales leave to be wished for at the end of mask-sparsify."""
    scales = dict(model.named_parameters())
    masked = [x for n, k in keep.by_norm().items() for x in scales[f"{n}.weight"][~k].tolist()]
    far = [abs(x) for x in masked if abs(x) > NEAR_ZERO]
    if not far:
        return []
    return [
        f"{len(far)} of {len(masked)} masked scales are not near zero after mask-sparsify (up to "
        f"{max(far):.3f}): removing them changes the network. Train longer, raise the strength, or "
        "use the decay penalty."
    ]
