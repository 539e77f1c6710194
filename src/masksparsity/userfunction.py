"""`module:function`: how users name something of their own."""

import importlib
from collections.abc import Callable
from typing import Any

from masksparsity.errors import MaskSparsityError


def user_function(name: str) -> Callable[..., Any]:
    """The function that `name`, "package.module:function", stands for.

    Raises:
        MaskSparsityError: no such module or function. What goes wrong inside the module while it
            is imported is raised as it is.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ModuleNotFoundError, ValueError) as error:
        missing = getattr(error, "name", None)
        if missing and module_name != missing and not module_name.startswith(f"{missing}."):
            raise  # the module is there; something that it imports is not
        raise MaskSparsityError(
            f"{name}: no module named {module_name!r}; is its folder on PYTHONPATH?"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise MaskSparsityError(f"{name}: {module_name} has no function {function_name!r}")
    return function
