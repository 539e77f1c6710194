"""JSON values as instances of annotated types, checked; what does not fit is named."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any


def build(kind: Any, value: Any, name: str = "") -> Any:
    """`value`, as JSON gives it, as an instance of the annotation `kind`.

    Knows dataclasses, tuples, unions, literals, paths and plain values; `name` is where we are.

    Raises:
        ValueError: the value is of another type, or a dataclass lacks or does not know a field.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _fields(kind, value, name)
    if origin is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            return tuple(build(k, v, name) for k, v in zip(kinds, value, strict=True))
    elif origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return build(option, value, name)
            except ValueError:
                continue
    elif origin is typing.Literal and value in arguments:
        return value
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif type(value) is kind:
        return value
    raise ValueError(f"{name} cannot be {value!r}")


def _fields(kind: type, value: dict[str, Any], name: str) -> Any:
    hints = typing.get_type_hints(kind)
    inner = {key: f"{name}.{key}".lstrip(".") for key in value}
    if unknown := value.keys() - hints.keys():
        raise ValueError(f"no setting is called {inner[min(unknown)]}")
    none = dataclasses.MISSING
    needed = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is none]
    if missing := [key for key in needed if key not in value]:
        raise ValueError(f"{name or 'the file'} lacks {', '.join(missing)}")
    return kind(**{key: build(hints[key], item, inner[key]) for key, item in value.items()})
