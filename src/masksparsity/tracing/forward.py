"""Run a network once on channel labels: every ATen call is seen with its real arguments.

Nearly all of the time would go to convolutions, whose values seldom decide where channels go: where
all code is that of libraries, they give ones instead. If something then looked at values, all is
done again with real ones.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from .caches import computed_anew
from .findings import LOOSE, aside, numbers
from .memory import root
from .network import at_least_two, tensors_in
from .origins import VIEWS
from .places import PLACING
from .rules import SIZED
from .standin import CONVOLUTION, stand_in
from .state import eager, evaluating, fused_attention_off, kept_by, switches, unchanged
from .tracer import Rule, Tracer
from .watch import (
    ALONE,
    Calls,
    arrivals,
    assignments,
    escapes,
    inference_mode_off,
    module_stack,
    norms_alone,
    replacements,
)
from .writing import values_of

_EMPTY = torch.ops.aten.empty.memory_format
_Known = tuple[Rule | None, str, bool, tuple[int, ...], bool, bool, int | None]
"""Of an operation: its rule and name; whether it is in place, the arguments that it writes to, and
whether it gives them another shape; whether values may say how much it gives; which argument is a
list of axes."""


class Operations(TorchDispatchMode):
    """Applies its rule after each operation."""

    def __init__(self, tracer: Tracer):
        super().__init__()
        self.tracer = tracer
        self._known: dict[int, _Known] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled while tracing: spares an import of 1.5 s, and every call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _EMPTY and args[0] == [0]:  # a norm makes one each time; it holds nothing
            return func(*args, **kwargs or {})
        tracer, kwargs = self.tracer, kwargs or {}
        known = self._known.get(id(func))  # its own hash takes time
        if known is None:
            known = self._known[id(func)] = self._look_up(func)
        rule, operation, inplace, writes, reshapes, loosens, dims = known
        given = args
        if writes and ("batch_norm" not in operation or args[5]):
            given = self._before(operation, writes, reshapes, args, kwargs)
        try:
            out = stand_in(*args) if func is CONVOLUTION and tracer.made_up else None
            if out is None:
                out = func(*args, **kwargs)
        except Exception as error:
            tracer.blame(error, (args, kwargs))
            raise
        tracer.operation = operation
        every = (*args, *kwargs.values()) if kwargs else args
        if tracer.loose or loosens:
            self._loosen(loosens, every, out)
        # What is lifted was made of numbers, which are recorded.
        tracer.origins = () if operation == "lift_fresh" else tracer.sources.of(every)
        first = len(tracer.records)
        reads = tracer.suspects and operation not in (*VIEWS, "alias", "detach")
        for x in tensors_in(every) if reads else ():
            if id(root(x)) in tracer.suspects and not tracer.labels(x):
                tracer.record((), values_of(x))
        tracer.numbers = () if operation in SIZED else numbers(every)
        if dims is not None and len(args) > dims:
            tracer.numbers += (str(args[dims]),)
        if rule is None:
            tracer.unknown(given, kwargs, out)
        else:
            rule(tracer, operation, given, kwargs, out, inplace)
        if tracer.numbers:
            tracer.record(m for x in tensors_in(given) for m in tracer.labels(x))
        recorded = [r.scalars for r in tracer.records[first:] if r.scalars]
        tracer.sources.follow(operation, inplace, tracer.origins, recorded, args, out)
        return out

    def _loosen(self, makes: bool, args: Any, out: Any) -> None:
        """Mark what has as many elements as values ask for, and what is made of that. `makes`:
        whether the operation may give such."""
        tensors, loose = [*tensors_in(args)], self.tracer.loose
        masks = any(x.dtype in (torch.bool, torch.uint8) for x in tensors[1:])
        made = makes and (self.tracer.operation != "index" or masks)
        if not made and not any(hasattr(x, LOOSE) for x in tensors):
            return
        for x in tensors_in(out):
            if made:
                loose |= {*x.shape}.difference((1,), *(y.shape for y in tensors))
            elif self.tracer.operation in ("cat", "slice"):
                axis = args[1] if len(args) > 1 else 0
                if any(y.ndim == x.ndim and y.shape[axis] in loose for y in tensors):
                    loose.add(x.shape[axis])
            if x.ndim and id(x) not in self.tracer.names:
                setattr(x, LOOSE, loose)

    def _before(
        self, operation: str, writes: tuple[int, ...], reshapes: bool, args: Any, kwargs: Any
    ) -> Any:
        """An operation is about to write, or to hand out an alias: keep what may be overwritten of
        the model's own, and what its rule has to know of a tensor that changes shape in place."""
        written = [args[k] for k in writes if k < len(args)]
        for x in (*written, *kwargs.values()):
            for tensor in x if isinstance(x, (list, tuple)) else (x,):
                if isinstance(tensor, Tensor):
                    self.tracer.memory.spare(root(tensor))
                    if operation != "copy" and operation not in PLACING:
                        self.tracer.memory.overwrite(tensor)
        if not reshapes:
            return args
        before = args[0].detach()
        self.tracer.set(before, self.tracer.labels(args[0]))
        return before, *args[1:]

    def _look_up(self, func: Any) -> _Known:
        base, inplace, writes, into, dims = _schema(func)
        rule = None if into else self.tracer.rules.get(base)  # `out=`: others may view it
        loosens = torch.Tag.dynamic_output_shape in func.tags or base == "torchvision::nms"
        return rule, base, inplace, writes, torch.Tag.inplace_view in func.tags, loosens, dims


@functools.cache
def _schema(func: Any) -> tuple[str, bool, tuple[int, ...], bool, int | None]:
    """Of an operation: its name without suffix; whether it writes in place; the arguments that it
    writes to, or hands out aliases of which may be written to later; whether it has an `out=`; and
    which argument is a list of axes, unless its rule records them.

    Cached, since a trace would spend milliseconds on reading the schemas of a dozen operations.
    """
    name, mutable = func._schema.name, func._schema.is_mutable
    inplace = mutable and name.endswith("_") and not name.endswith("__")
    base = name.removeprefix("aten::")
    base = base[:-1] if inplace else base
    arguments = func._schema.arguments
    into = any(a.is_out for a in arguments)
    writes = mutable or base in ("detach", "alias") or "batch_norm" in base
    places = [k for k, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    places = [3, 4] if "batch_norm" in base else places  # its statistics, while training
    listed = [a.name in ("dim", "dims") and "List" in str(a.type) for a in arguments]
    dims = listed.index(True) if any(listed) and base not in SIZED else None
    return base, inplace, tuple(places or [0]) if writes else (), into, dims


def run(
    tracer: Tracer,
    model: nn.Module,
    args: tuple,
    kwargs: dict,
    training: bool = False,
    seed: int = 0,
) -> bool:
    """One forward without gradients; model, RNG and mode stay as they were. May it, in training,
    take another way next time?"""
    try:
        return _run(tracer, model, args, kwargs, training, seed)
    finally:
        tracer.forget()


def _run(
    tracer: Tracer, model: nn.Module, args: tuple, kwargs: dict, training: bool, seed: int
) -> bool:
    tracer.decided = False
    with ALONE, contextlib.ExitStack() as stack, unchanged(tracer.keepers) as held:
        keeps = [x for x in held if id(x) not in tracer.names]
        inputs = [*tensors_in((args, kwargs))]
        tracer.memory.begin(keeps, inputs)
        stack.callback(tracer.memory.restore)
        tracer.sources.begin(tracer.modules, bool(keeps), inputs)
        torch.clear_autocast_cache()  # whose copies of weights were made unseen
        with (
            evaluating(tracer.modules.values(), training, seed) as drawn,
            eager(),
            torch.no_grad(),
            module_stack(tracer),
            Calls(tracer) if tracer.given else escapes(tracer),
            assignments(tracer),
            arrivals(tracer),
            computed_anew(tracer.modules.values()),
            fused_attention_off(),
            inference_mode_off(),
            norms_alone(),
            replacements(tracer),
            Operations(tracer),
        ):
            if switches(tracer.modules.values()):
                model.train(training)
            out = model(*args, **kwargs)
            if _remembers(tracer):
                products = len(tracer.products)
                out = model(*args, **kwargs)
                del tracer.products[products:]
            out = [*out] if isinstance(out, Iterator) else out  # computed as they are asked for
            random = training and drawn(tracer.decided)
            kept = tracer.memory.written(tensors_in(out))
    tracer.operation = "output"
    for ids in kept:
        tracer.pin(ids, "kept until the next forward")
    given = [*tensors_in((out, args, kwargs))]  # into containers that came in, too
    found = [m for t in given for m in tracer.labels(t)]
    tracer.origins = tracer.sources.of(tensors_in(out))
    lengths = [n for x in tensors_in(out) for n in aside(x, tracer.labels(x))]
    leaves, structure = tree_flatten(out)
    tracer.record(found, [*lengths, *numbers(leaves), str(structure)])
    tracer.expose(found)
    tracer.pin(found, "model output")
    return random


def _remembers(tracer: Tracer) -> bool:
    """Whether forward has kept channels, or new tensors, which the next one may read."""
    before = {id(x) for x in tracer.memory.kept} | tracer.names.keys()
    kept = kept_by(tracer.keepers)
    return any(
        id(x) not in before or (id(x) not in tracer.names and tracer.labels(x)) for x in kept
    )


def run_training(
    tracer: Tracer, model: nn.Module, args: tuple, kwargs: dict, times: int | None = None
) -> None:
    """More forwards, in train mode, for what is done there only, such as auxiliary heads; several
    where its way may depend on random numbers, or as many as are given. A batch of one is doubled
    if that helps: a norm may need two values. What fails then, too (for want of targets, say),
    teaches nothing."""
    twice = tree_map(at_least_two, (args, kwargs))
    pairs = zip(tensors_in((args, kwargs)), tensors_in(twice), strict=True)
    alone = any(x is not y for x, y in pairs)
    for seed in range(times or _DRAWS):
        if tracer.doubled:
            args, kwargs = twice
        more = _run_training(tracer, model, args, kwargs, seed)
        if more is None and alone and not tracer.doubled:
            tracer.doubled = True
            args, kwargs = twice
            more = _run_training(tracer, model, args, kwargs, seed)
        tracer.mattered |= more is None  # it may have failed for its values
        if not more and times is None:
            return


_DRAWS = 4


def _run_training(
    tracer: Tracer, model: nn.Module, args: tuple, kwargs: dict, seed: int
) -> bool | None:
    """Whether another one is worth it; None if it failed."""
    t = tracer
    kept = (t.edges, t.pins, t.records, t.products, t.swallowed, t.cuts, t.zeros)
    lengths = [len(part) for part in kept]
    try:
        random = run(tracer, model, args, kwargs, training=True, seed=seed)
        tracer.trained += 1
        return random
    except Exception:
        if tracer.given:
            raise
        for part, length in zip(kept, lengths, strict=True):
            del part[length:]  # type: ignore[attr-defined]
        return None
    finally:
        del tracer.products[lengths[3] :]  # costs are those of inference
