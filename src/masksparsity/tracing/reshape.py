"""Views that split and merge axes."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .cuts import rows
from .findings import extents
from .labels import Labels
from .tracer import Rule, Tracer


def reshape(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """Channels keep their elements in order, however axes are split and merged."""
    x = args[0]
    if out.dtype != x.dtype:
        t.unknown(args, kwargs, out)
        return
    t.memory.share(x, [out])
    found = t.labels(x)
    if not found and not t.memory.is_untouched(x):
        t.record((), [*extents(x), *extents(out)])
    if found or t.is_labelled(out):
        new = tuple(out.shape)
        for m in found:
            _unflatten(t, x, m, new)
        moved = [_view(x, m, new) for m in found]
        t.set(out, moved)
        if tuple(x.shape) != new and not t.given:
            for m in moved:
                if len(m.axes) == 1:  # its length may be written down
                    t.cut(rows(m.ids, *m.axes), ())


def _view(x: Tensor, m: Labels, new: Sequence[int]) -> Labels:
    """Split and merge axes. Axes that only keep their neighbours' company stay broadcast."""
    if not (x.ndim and new):  # one element
        return m._replace(ids=m.ids.reshape([1] * len(new)), axes=frozenset())
    shape: list[int] = []
    expand: list[int] = []
    axes: set[int] = set()
    lone: list[int] = []
    for olds, news in _runs(tuple(x.shape), tuple(new)):
        if m.axes.isdisjoint(olds):
            expand += [1] * len(olds)
            shape += [1] * len(news)
        else:
            expand += [x.shape[a] for a in olds]
            shape += [new[a] for a in news]
            # A lone channel has no axis longer than 1 to be recognised by.
            axes |= {a for a in news if new[a] > 1} or {news[0]}
            lone += [a for a in news if new[a] == 1]
    ids = m.ids.expand(expand).reshape(shape)
    # What is of one channel, as the places of a window or a batch that was laid beside it, is
    # labelled by no axis of its own; of a lone channel that is another one than of several.
    copies = bool(lone) and m.ids.numel() > 1 and bool((m.ids == m.ids.reshape(-1)[0]).all())
    for a in sorted(axes) if copies or len(axes) > len(m.axes) else ():
        first = ids.narrow(a, 0, 1)
        if (copies or len(axes) > 1) and bool((ids == first).all()):
            ids, axes = first, axes - {a}
    return m._replace(ids=ids, axes=frozenset(axes or lone[:1]))


def _runs(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of old and new axes that hold the same number of elements. Where an axis of
    size 1 could go with either neighbour, trailing axes that stay as they are stay alone: so a lone
    channel goes with the batch in (b, 1, h, w) -> (1, b, h, w), and with space in a flatten."""
    same = 0
    while same + 1 < min(len(old), len(new)) and 1 < old[-1 - same] == new[-1 - same]:
        same += 1
    runs, kept = _leading(old[: len(old) - same], new[: len(new) - same]), range(-same, 0)
    return runs + [([len(old) + k], [len(new) + k]) for k in kept]


def _leading(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        olds, news, a, b = [i], [j], old[i], new[j]
        while a != b:
            if a < b:
                i += 1
                olds.append(i)
                a *= old[i]
            else:
                j += 1
                news.append(j)
                b *= new[j]
        runs.append((olds, news))
        i, j = i + 1, j + 1
    if runs:
        runs[-1][0].extend(range(i, len(old)))
        runs[-1][1].extend(range(j, len(new)))
    return runs


def _unflatten(t: Tracer, x: Tensor, m: Labels, new: tuple[int, ...]) -> None:
    if t.given or tuple(x.shape) == new:
        return
    for olds, news in _runs(tuple(x.shape), new):
        long = [a for a in news if new[a] > 1]
        if len(long) > 1 and len([a for a in olds if x.shape[a] > 1]) == 1 and olds[0] in m.axes:
            whole = rows(m.ids, olds[0])
            pieces = whole.reshape(-1, new[long[-1]])
            if bool((pieces == pieces[:, :1]).all()):  # each is one channel's, as in a window
                t.cut(pieces[:, 0].view(len(whole), -1), ())
                t.cut(whole, ())
            else:
                t.cut(whole, [pieces], tuple(new[a] for a in long))


VIEWS = ("view", "_unsafe_view", "reshape", "_reshape_alias")
RULES: dict[str, Rule] = dict.fromkeys((*VIEWS, "flatten"), reshape)
