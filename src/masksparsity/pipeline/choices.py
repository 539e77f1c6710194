"""From settings to a mask and to a penalty."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from torch import Tensor, nn

import masksparsity as ms
from masksparsity.channels.penalty import Penalty
from masksparsity.errors import MaskSparsityError
from masksparsity.pipeline.config import MaskConfig, MaskSparsifyConfig
from masksparsity.train import dist


def read_mask(path: str | Path, graph: ms.ChannelGraph) -> ms.KeepMask:
    """A mask of ours (`mask.json`), or one of the original project's files."""
    ours = Path(path).suffix in (".json", ".safetensors")
    return ms.KeepMask.load(path, graph) if ours else ms.KeepMask.from_original(path, graph)


Batches = Iterable[tuple[Tensor, Tensor]]


def choose_mask(
    config: MaskConfig,
    model: nn.Module,
    graph: ms.ChannelGraph,
    batches: Callable[[], Batches] | None = None,
) -> ms.KeepMask:
    """The mask that is given, or the one that `config` asks for on the scores of `model`.

    Args:
        batches: gives images and labels of this process, for scores that need them. Without,
            these are stood in for: a budget is met by other channels then.
    """
    if config.file:
        return read_mask(config.file, graph)
    scores_of = partial(_scores, config, model, graph, batches)
    limits: ms.select.Limits = {
        "round_to": config.round_to,
        "min_keep": config.min_keep,
        "ignore": config.ignore,
        "max_pruned": _shares(config.max_pruned),
    }
    match config.select:
        case "budget":
            of_macs = config.pruned_params is None and config.pruned_latency is None
            return ms.select.budget(
                graph,
                scores_of,
                pruned_macs=config.pruned_macs if of_macs else None,
                pruned_params=config.pruned_params,
                pruned_latency=config.pruned_latency,
                latency=ms.latency(model, graph) if config.pruned_latency else None,
                per_cost=config.per_cost,
                rounds=config.rounds,
                **limits,
            )
        case "threshold":
            return ms.select.threshold(graph, scores_of(), config.threshold, **limits)
        case "optimal":
            return ms.select.optimal(graph, scores_of(), config.energy, **limits)
        case "fraction":
            return ms.select.fraction(graph, scores_of(), config.pruned_fraction, **limits)
        case "uniform":
            return ms.select.uniform(graph, scores_of(), config.pruned_fraction, **limits)


def _scores(
    config: MaskConfig,
    model: nn.Module,
    graph: ms.ChannelGraph,
    batches: Callable[[], Batches] | None,
    kept: ms.KeepMask | None = None,
) -> ms.scores.Scores:
    """The channels' scores, or what they would be if only those of a mask were there."""
    if kept is not None and not kept.units.all():
        model = ms.apply_mask(model, graph, kept)
    if config.scores != "taylor" or batches is None:
        score = ms.scores.scale if config.scores == "scale" else ms.scores.norm
        return score(model, graph)
    device = next(model.parameters()).device
    shares = ms.scores.taylor(model, graph, batches())
    return {name: dist.sum_(share.to(device)).cpu() for name, share in shares.items()}


def _shares(settings: tuple[str, ...]) -> dict[str, float]:
    """SHARE or LAYER=SHARE, each."""
    try:
        pairs = [setting.rpartition("=") for setting in settings]
        return {layer: float(share) for layer, _, share in pairs}
    except ValueError:
        raise MaskSparsityError(
            f"mask.max_pruned: {' '.join(settings)!r} is not a share or LAYER=SHARE"
        ) from None


def create_penalty(
    config: MaskSparsifyConfig,
    model: nn.Module,
    graph: ms.ChannelGraph,
    keep: ms.KeepMask,
    steps: int,
) -> Penalty:
    """The penalty of a mask-sparsify stage of `steps` steps."""
    match config.penalty:
        case "masked-l1":
            return ms.MaskedL1(model, graph, keep, strength=config.strength)
        case "proximal":
            return ms.Proximal(model, graph, keep, strength=config.strength)
        case "decay":
            by = max(1, round(config.decay_fraction * steps))
            return ms.ScheduledDecay(model, graph, keep, steps=by, span=config.decay_span)
