"""Caches of `functools` in users' code, such as around position embeddings.

A tensor that one remembers from an earlier forward hides how it comes about.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from .network import LIBRARIES

_Cache = functools._lru_cache_wrapper
_METHODS = (staticmethod, classmethod)


@contextlib.contextmanager
def computed_anew(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Meanwhile, cached functions in users' classes and beside them compute each tensor once,
    whatever they remember. Other values, which may be the state of a program, are left alone."""
    with contextlib.ExitStack() as stack:
        for owner, name, value, other in _caches({type(m) for m in modules}):
            with contextlib.suppress(Exception):  # some classes refuse
                setattr(owner, name, other)
                stack.callback(setattr, owner, name, value)
        yield


def _caches(kinds: Iterable[type]) -> Iterator[tuple[Any, str, Any, Any]]:
    """Where a cache is kept: owner, name, what it is, what takes its place."""
    bases = {base for kind in kinds for base in kind.__mro__}
    theirs = [b for b in bases if not b.__module__.startswith((*LIBRARIES, "builtins"))]
    files = [sys.modules.get(name) for name in {base.__module__ for base in theirs}]
    for place in (*theirs, *filter(None, files)):
        for name, value in [*vars(place).items()]:
            function = value.__func__ if type(value) in _METHODS else value
            if isinstance(function, _Cache):
                other = _anew(function)
                yield place, name, value, type(value)(other) if function is not value else other
            elif isinstance(function, FunctionType):
                for cell in function.__closure__ or ():
                    with contextlib.suppress(ValueError):  # empty
                        if isinstance(cell.cell_contents, _Cache):
                            cache = cell.cell_contents
                            yield cell, "cell_contents", cache, _anew(cache)


def _anew(cache: Any) -> Callable:
    @functools.cache
    @functools.wraps(cache)
    def once(*args: Any, **kwargs: Any) -> Any:
        hits = cache.cache_info().hits
        found = cache(*args, **kwargs)
        remembered = cache.cache_info().hits > hits and _holds_tensors(found)
        return cache.__wrapped__(*args, **kwargs) if remembered else found

    return once


def _holds_tensors(value: Any) -> bool:
    """Whether it is one, or a container of some. Others may hold anything: a whole package."""
    parts = value.values() if isinstance(value, dict) else value
    several = parts if isinstance(value, (dict, list, tuple)) else [value]
    return any(isinstance(x, Tensor) for x in several)
