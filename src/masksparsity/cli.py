"""The command line: `masksparsity COMMAND [RECIPE | --config FILE] [FLAGS]`.

The flags are generated from the fields of the config; the recipe's values are their defaults.
"""

import functools
import inspect
import os
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import tyro

from masksparsity.commands import COMMANDS, NEED_DATA, files_of, misplaced, show
from masksparsity.errors import MaskSparsityError, RunFailure
from masksparsity.pipeline.config import BUDGETS, READ_BY, Config
from masksparsity.pipeline.rundir import CONFIG, FILES
from masksparsity.pipeline.stages import STAGES
from masksparsity.recipes import RECIPES, recipe
from masksparsity.train import dist
from masksparsity.train.progress import say


def main() -> None:
    """Do what `sys.argv` asks for; exit with 2 for a mistake in it, with 1 for a failed run."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a user's module:function may be
    try:
        _dispatch(sys.argv[1:])
    except MaskSparsityError as error:
        if dist.rank() == 0:
            print(f"masksparsity: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, RunFailure) else 2)
    except BrokenPipeError:  # a reader such as `head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        say("stopped; the same command goes on from the last complete epoch")
        sys.exit(130)
    finally:
        dist.stop()


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        _help()
        return
    name, *rest = arguments
    if name not in COMMANDS:
        raise MaskSparsityError(f"there is no command {name!r}; there are {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    config, left = _config(name, rest)
    known = inspect.signature(command).parameters
    config, rest = _with_model(config, name, left, named=len(left) < len(rest)), left
    for key in FILES:
        if name in STAGES and f"--{key}" in rest and key not in STAGES[name].inputs:
            raise MaskSparsityError(misplaced(name, key))
    _refuse_unread(config, name, rest)
    defaults = {"config": config, "files": files_of(name)()}
    tyro.cli(
        functools.partial(command, **{k: v for k, v in defaults.items() if k in known}),
        args=rest,
        prog=f"masksparsity {name} [RECIPE | --config FILE]",
        description=f"{_summary(name)} Recipes: {', '.join(RECIPES)}; the defaults below are "
        f"those of {config.recipe}.",
    )


def _config(command: str, arguments: list[str]) -> tuple[Config, list[str]]:
    """The config whose values are the defaults of the flags, and the arguments that are left."""
    for k, argument in enumerate(arguments):
        flag, _, file = argument.partition("=")
        if flag == "--config":
            after = k + 1 if file else k + 2
            file = file or "".join(arguments[k + 1 : after])
            if not file:
                raise MaskSparsityError("--config needs a file")
            return Config.read(Path(file)), arguments[:k] + arguments[after:]
    match arguments:
        case [first, *rest] if first in RECIPES:
            return recipe(first), rest
        # The only positional arguments beside the recipe are the masks to compare.
        case [first, *rest] if not first.startswith("-") and command != "compare-masks":
            return recipe(first), rest
    run = _run_of(command, arguments)
    if run and (run / CONFIG).exists() and any((run / stage).is_dir() for stage in STAGES):
        return Config.read(run / CONFIG), arguments
    return recipe(next(iter(RECIPES))), arguments


def _run_of(command: str, arguments: list[str]) -> Path | None:
    """The run, if it is of one, of which a command looks at something."""
    named = _flags(arguments).get("weights")
    if command == "compare-masks" and arguments:
        named = arguments[0]
    if not named or command in STAGES:
        return None
    path = Path(named)
    return path if path.is_dir() else path.parent.parent  # of RUN/STAGE/FILE


def _with_model(config: Config, command: str, arguments: list[str], named: bool) -> Config:
    """Another model than the recipe's takes none of its options, and, where neither data nor a
    recipe that was `named` say what its input is, the usual one."""
    flags = [argument.partition("=")[0] for argument in arguments]
    if "--model.name" not in flags:
        return config
    flag = arguments[flags.index("--model.name") :]
    name = flag[0].partition("=")[2] or "".join(flag[1:2])
    size = 224 if name.startswith(("torchvision/", "timm/")) else 32
    shape = config.model.input if named or command in NEED_DATA else (3, size, size)
    changed = replace(config.model, name=name, options=(), input=shape)
    return config if name == config.model.name else replace(config, model=changed)


def _refuse_unread(config: Config, command: str, arguments: list[str]) -> None:
    """A flag without effect is a mistake: a run would not be what it is taken for."""
    given = _flags(arguments)
    if command == "report" and (others := given.keys() - {"out", "recipe", "help"}):
        raise MaskSparsityError(
            f"report shows a run with the run's own settings; it does not read --{min(others)}"
        )
    _refuse_second_mask(config, given)
    for flag in given.keys() & READ_BY.keys():
        setting, *values = READ_BY[flag]
        section, _, field = setting.partition(".")
        value = given.get(setting) or getattr(getattr(config, section), field)
        if value not in values if values else str(value) in ("0", "0.0"):
            flag, setting = (name.replace("_", "-") for name in (flag, setting))
            raise MaskSparsityError(
                f"--{flag} is not read with --{setting} {value}: it is for "
                f"{' and '.join(values) or 'more than that'}"
            )


def _flags(arguments: list[str]) -> dict[str, str]:
    """The flags that are given, with their values."""
    given: dict[str, str] = {}
    for argument, following in pairwise([*arguments, ""]):
        if argument.startswith("--"):
            flag, _, value = argument[2:].partition("=")
            given[flag.replace("-", "_")] = value or following
    return given


def _refuse_second_mask(config: Config, given: dict[str, str]) -> None:
    """A mask is a given one, or meets one budget."""
    settled = {f"mask.{name}" for name, value in vars(config.mask).items() if value is not None}
    settled = (settled - {"mask.pruned_macs"} | given.keys()) & {"mask.file", *BUDGETS}
    flags = [flag for flag in given if flag.startswith("mask.") and flag != "mask.file"]
    if "mask.file" not in settled:
        flags = [flag for flag in flags if flag in BUDGETS]
    others = sorted(settled.difference(flags[:1]))
    if flags and others:
        flag, other = (name.replace("_", "-") for name in (flags[0], others[0]))
        raise MaskSparsityError(f"--{flag} is not read with --{other}, which settles the mask")


def _summary(name: str) -> str:
    return (inspect.getdoc(COMMANDS[name]) or "").partition("\n")[0]


def _help() -> None:
    commands = "\n".join(f"  {name:14} {_summary(name)}" for name in COMMANDS)
    show(
        f"usage: masksparsity COMMAND [RECIPE | --config FILE] [FLAGS]\n\n{commands}\n\n"
        f"Recipes: {', '.join(RECIPES)}; the first is the default.\n"
        "masksparsity COMMAND --help shows the flags."
    )
