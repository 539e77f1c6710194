"""Out of Python: ONNX or torch.export, compared with the model before the file is written."""

import inspect
import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_leaves, tree_leaves_with_path, tree_map

from .errors import MaskSparsityError
from .files import atomic
from .tracing.copies import duplicate
from .tracing.network import arguments, batch_size, copied, named_tensors, require_values, unwrap
from .tracing.state import evaluating, untouched

Inputs = tuple[tuple, dict]
Run = Callable[[Inputs], list[Tensor]]

# Of the output's scale. Other libraries sum in another order.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE = 2e-2  # half precisions


def export(model: nn.Module, example_inputs: Any, path: str | Path) -> None:
    """Write `model` in eval mode as ONNX (`.onnx`) or as a torch.export program (`.pt2`).

    The first axis of the inputs may have any length in the file, and the network lies on the CPU
    there, wherever it was trained (`torch.export.passes.move_to_device_pass` moves a program). What
    the file computes is compared with the model on the example and on a longer batch before it is
    written; for ONNX this needs onnxruntime, and a warning says so where that is not installed. An
    ONNX file names its outputs by their keys, or `output`, `output_0`, ...

    Args:
        example_inputs: a tensor, a tuple or list of inputs, or a dict of keyword inputs.

    Raises:
        MaskSparsityError: another suffix, a missing library, a model that cannot be exported, or a
            file that would compute something else. Nothing is written then.
    """
    inputs, path = arguments(example_inputs), Path(path)
    if path.suffix not in _FORMATS:
        raise MaskSparsityError(
            f"{path}: no format for {path.suffix or 'a name without suffix'}; "
            f"end it in {' or '.join(_FORMATS)}"
        )
    model, example = _on_cpu(unwrap(model), inputs)
    # Traced on two examples or more: a length of one would be taken for a constant.
    traced = _longer(example)
    with (
        evaluating(model.modules()),
        untouched(model),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            checks = [(i, _outputs(model, i)) for i in (example, _longer(traced))]
            data, run = _FORMATS[path.suffix](model, copied(traced))
            found = [run(copied(inputs)) for inputs, _ in checks] if run is not None else None
        except Hindrance as error:
            raise MaskSparsityError(f"{path}: {error}") from error
        except Exception as error:
            text = re.sub(r"\x1b\[[\d;]*m", "", str(error))  # torch colours some of its own
            raise MaskSparsityError(
                f"{path}: the model cannot be exported with a batch of any length: {text}"
            ) from error
    if found is None:
        warnings.warn(
            f"{path} is written but not compared with the model: pip install onnxruntime",
            stacklevel=2,
        )
    else:
        for (inputs, expected), outputs in zip(checks, found, strict=True):
            if len(outputs) != len(expected) or not all(map(_close, expected, outputs)):
                raise MaskSparsityError(
                    f"{path}: not written, its output for a batch of {batch_size(*inputs)} is not "
                    "the model's; try the other format"
                )
    atomic.write(path, data)


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    args, kwargs = copied(inputs)
    return _tensors(model(*args, **kwargs))


class Hindrance(Exception):
    """Says what to do: its message is told as it is."""


def _onnx(model: nn.Module, inputs: Inputs) -> tuple[bytes, Run | None]:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise Hindrance("ONNX needs two libraries: pip install onnx onnxscript") from error
    args, kwargs = inputs
    names, taken = [], inspect.signature(model.forward).parameters
    for place, output in tree_leaves_with_path(model(*args, **kwargs)):
        if isinstance(output, Tensor):
            name = "_".join(re.findall(r"\w+", keystr(place)))
            own = name[:1].isalpha() and name not in taken
            names.append(name if own else f"output_{name}".rstrip("_"))
        elif output is not None:
            raise Hindrance(
                f"ONNX has tensors alone, and output{keystr(place)} is {output!r}: leave it out, "
                "or write .pt2"
            )
    program = torch.onnx.export(
        model,
        args,
        kwargs=kwargs,
        dynamic_shapes=_shapes(model, inputs),
        output_names=names if len({*names}) == len(names) else None,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    data = program.model_proto.SerializeToString()
    try:
        import onnxruntime
    except ImportError:
        return data, None
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(inputs: Inputs) -> list[Tensor]:
        values = [t.cpu().numpy() for t in _tensors(inputs)]
        outputs = session.run(None, dict(zip(names, values, strict=True)))
        return [torch.from_numpy(o) for o in outputs]

    return data, run


def _pt2(model: nn.Module, inputs: Inputs) -> tuple[bytes, Run]:
    args, kwargs = inputs
    program = torch.export.export(model, args, kwargs, dynamic_shapes=_shapes(model, inputs))
    file = io.BytesIO()
    torch.export.save(program, file)
    loaded = torch.export.load(io.BytesIO(file.getvalue())).module()
    return file.getvalue(), lambda inputs: _tensors(loaded(*inputs[0], **inputs[1]))


_FORMATS: dict[str, Callable[[nn.Module, Inputs], tuple[bytes, Run | None]]] = {
    ".onnx": _onnx,
    ".pt2": _pt2,
}


def _on_cpu(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """Kernels of a GPU would limit the batch, and sum in another order than the file's reader."""
    require_values(model)
    if any(tensor.device.type != "cpu" for _, tensor in named_tensors(model)):
        model = duplicate(model).cpu()
    return model, tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, inputs)


def _shapes(model: nn.Module, inputs: Inputs) -> Any:
    """By the names of forward's arguments, for every input tensor, that its first axis may have any
    length, if it is the batch."""
    batch, length = torch.export.Dim("batch"), batch_size(*inputs)
    args, kwargs = tree_map(lambda x: {0: batch} if _batched(x, length) else None, inputs)
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def _longer(inputs: Inputs) -> Inputs:
    """The same with one example more: the first again, at the end."""
    length = batch_size(*inputs)
    return tree_map(lambda x: torch.cat([x, x[:1]]) if _batched(x, length) else x, inputs)


def _batched(x: Any, length: int) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == length


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _close(expected: Tensor, output: Tensor) -> bool:
    a, b = expected.double().cpu(), output.double().cpu()
    finite = a[a.isfinite()]
    scale = float(finite.abs().amax()) if finite.numel() else 0.0
    bound = _TOLERANCE.get(expected.dtype, _COARSE) * scale
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=bound, equal_nan=True)
