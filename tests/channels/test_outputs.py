"""What a caller gets from forward, in whatever it comes, keeps its width."""

from types import MappingProxyType

import pytest
import torch
from torch import Tensor

import masksparsity as ms

from .middle import Middle


class Fields(dict):
    __getattr__ = dict.__getitem__


class Stages(list):
    pass


CONTAINERS = {
    "dict": lambda *xs: Fields(zip("ab", xs, strict=True)),
    "nested": lambda *xs: (0, {"out": Fields(zip("ab", xs, strict=True))}),
    "list": lambda *xs: Stages(xs),
    "values": lambda *xs: dict(enumerate(xs)).values(),
    "generator": lambda *xs: (x.relu() for x in xs),
    "map": lambda *xs: map(torch.relu, xs),
    "set": lambda *xs: {*xs},
    "read only": lambda *xs: MappingProxyType(dict(enumerate(xs))),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_outputs_in_containers_of_any_kind_stay(name):
    class Net(Middle):
        def forward(self, x: Tensor) -> object:
            features = self.a(x).relu()
            return CONTAINERS[name](features, self.b(features))

    graph = ms.trace(Net(None), torch.randn(1, 3, 4, 4))
    assert graph.by_name["a"].reason.why == "model output"


def test_what_forward_puts_into_its_inputs_stays():
    class Net(Middle):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            batch["features"] = self.a(batch["image"]).relu()
            return self.b(batch["features"])

    graph = ms.trace(Net(None), ({"image": torch.randn(1, 3, 4, 4)},))
    assert graph.by_name["a"].reason.why == "model output"
