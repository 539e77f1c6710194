import random

import numpy
import pytest
import torch
import torchvision
from torch import nn

import masksparsity as ms
from masksparsity.channels import analysis

X = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    """conv -> norm -> the operation under test -> conv."""

    def __init__(self, operation, width: int = 8, into: int | None = None):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, width, 1), nn.BatchNorm2d(width)
        self.b = nn.Conv2d(into or width, 4, 1)
        self.operation = operation

    def forward(self, x):
        return self.b(self.operation(self.norm(self.a(x)))).mean((2, 3))


def group_of_a(operation, **kw) -> ms.ChannelGroup:
    return ms.trace(Net(operation, **kw), X).groups[0]


@pytest.mark.parametrize(
    ("name", "groups", "units"),
    [("resnet18", 12, 2880), ("resnet50", 37, 11456), ("vgg11_bn", 10, None)],
)
def test_everything_but_the_classifier_is_prunable(name, groups, units):
    graph = ms.trace(torchvision.models.get_model(name), torch.randn(1, 3, 64, 64))
    assert len(graph.prunable) == groups
    assert units is None or sum(g.size for g in graph.prunable) == units
    assert [str(g.reason) for g in graph.protected] == ["model output (output)"]


def test_macs_and_parameters_are_golden():
    for name, macs in {
        "resnet20": 40_551_040,
        "resnet56": 125_485_696,
        "resnet110": 252_887_680,
    }.items():
        assert ms.trace(ms.models.create(name), torch.randn(2, 3, 32, 32)).cost().macs == macs
    cost = ms.trace(torchvision.models.resnet50(), torch.randn(1, 3, 224, 224)).cost()
    assert cost == (4_089_184_256, 25_557_032)


def test_option_a_padding_belongs_to_the_stage_that_adds_it():
    graph = ms.trace(ms.models.create("resnet20"), torch.randn(1, 3, 32, 32))
    sizes = {g.name: g.size for g in graph.prunable if g.name.endswith(("conv2", "conv2#2"))}
    assert sizes["layer2.0.conv2"] == sizes["layer2.0.conv2#2"] == 8
    assert "layer2.0.shortcut.pad_before" in [
        s.tensor for s in graph.by_name["layer2.0.conv2"].slices
    ]


PROTECTED = {
    "unknown operation": lambda x: torch.logcumsumexp(x, 1),
    "reduced over channels": lambda x: x - x.mean(1, keepdim=True),
    "zero does not stay zero": lambda x: x * torch.sigmoid(x).sum(1, keepdim=True),
    "channels are padded": lambda x: nn.functional.pad(x, (0, 0, 0, 0, 1, 1), value=1.0)[:, 1:-1],
    "values leave PyTorch": lambda x: torch.from_numpy(x.numpy()),
    "channels are unknown": lambda x: x + torch.arange(8.0).view(8, 1, 1),
}


@pytest.mark.parametrize("why", PROTECTED)
def test_what_is_not_understood_is_protected_with_its_reason(why):
    group = group_of_a(PROTECTED[why])
    assert not group.prunable
    assert why in str(group.reason)


SOUND = {
    "relu": torch.relu,
    "silu in place": lambda x: nn.functional.silu(x, inplace=True),
    "sigmoid gate": lambda x: x * torch.sigmoid(x),
    "scaled": lambda x: 3 * x / 2,
    "pool": lambda x: nn.functional.max_pool2d(x, 2),
    "resize": lambda x: nn.functional.interpolate(x, scale_factor=2, mode="bilinear"),
    "through a view": lambda x: x.flatten(2).permute(0, 2, 1).transpose(1, 2).unflatten(2, (8, 8)),
    "broadcast over channels": lambda x: x * torch.rand(2, 1, 8, 8),
    "twice": lambda x: x + x,
}


@pytest.mark.parametrize("operation", SOUND)
def test_sound_operations_stay_prunable(operation):
    group = group_of_a(SOUND[operation])
    assert (group.prunable, group.size) == (True, 8), group


def test_overwritten_view_is_protected():
    def operation(x):
        x[:, :4].sigmoid_()
        return x

    groups = ms.trace(Net(operation), X).groups
    assert [g.prunable for g in groups if g.name.startswith("a")] == [False, True]


SLIPPERY = {
    "strided slice": lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1),
    "chunk": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "number from a width": lambda x: x / x.shape[1],
    "another way": lambda x: x if x.shape[1] == 8 else x.relu(),
    "literal size": lambda x: x.reshape(-1, 8, 8, 8),
}


@pytest.mark.parametrize("operation", SLIPPERY)
def test_the_proof_refuses(operation, monkeypatch):
    """All channels are followed; a mask that shifts positions is refused, naming the module. (When
    tracing, one such mask is tried, and what it shows is protected.)"""
    probed = ms.trace(Net(SLIPPERY[operation]).eval(), X).groups[0]
    assert probed.prunable == (operation == "chunk")  # whose pieces keep equal counts
    monkeypatch.setattr(analysis, "protect_what_is_refused", lambda tracer, model, solve: solve())
    model = Net(SLIPPERY[operation]).eval()
    graph = ms.trace(model, X)
    assert sum(g.size for g in graph.prunable) == 8
    units = torch.ones(graph.units, dtype=torch.bool)
    units[[0, 3]] = False  # halves keep 2 and 4, odd and even 3 and 3 but displaced
    keep = ms.KeepMask(graph)
    keep.units = units
    with pytest.raises(ms.MaskSparsityError, match=r"refused: .*"):
        ms.prune(model, graph, keep)


def shuffle(x):
    return x.unflatten(1, (2, x.shape[1] // 2)).transpose(1, 2).flatten(1, 2)


def test_a_shuffle_ties_what_it_puts_side_by_side():
    model = Net(shuffle).double().eval()
    x = X.double()
    graph = ms.trace(model, x)
    (group,) = graph.prunable
    keep = ms.KeepMask(graph, {group.name: torch.arange(4) != 1})
    masked, slim = ms.apply_mask(model, graph, keep), ms.prune(model, graph, keep)
    with torch.no_grad():
        torch.testing.assert_close(slim(x), masked(x), rtol=0, atol=1e-12)


def test_nothing_is_left_behind():
    model = Net(torch.relu)
    model.norm.eval()
    model.train()
    model.norm.training = False
    kept = []
    model.b.register_forward_pre_hook(lambda m, args: kept.append(args[0]))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state_of_torch, state_of_python = torch.get_rng_state(), random.getstate()
    state_of_numpy = numpy.random.get_state()  # noqa: NPY002
    before = {k: set(vars(m)) for k, m in model.named_modules()}
    ms.trace(model, X)
    assert torch.equal(torch.get_rng_state(), state_of_torch)
    assert random.getstate() == state_of_python
    numpy.testing.assert_equal(numpy.random.get_state(), state_of_numpy)  # noqa: NPY002
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert before == {k: set(vars(m)) for k, m in model.named_modules()}
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert all(not vars(p) for p in model.parameters())


SKIPS = {
    "torch": lambda: torch.rand(1).item() < 0.5,
    "python": lambda: random.random() < 0.5,
    "numpy": lambda: numpy.random.rand() < 0.5,  # noqa: NPY002
}


@pytest.mark.parametrize("library", SKIPS)
def test_layers_that_are_skipped_at_random(library):
    """In train mode: trace and proof go the same way."""

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(12))
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for block in self.blocks:
                if not (self.training and SKIPS[library]()):
                    x = x + block(x).relu()
            return self.head(x)

    graph = ms.trace(Skipping(), torch.randn(2, 3, 4, 4))
    assert graph.training
    assert [g.name for g in graph.prunable] == ["stem"]


def _maybe_sigmoid(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x.sigmoid() if model.training and random.random() < 0.5 else x


def _maybe_half(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    share = random.choice([0.5, 1.0]) if model.training else 1.0
    kept = int(x.shape[1] * share)
    return torch.cat([x[:, :kept], x[:, kept:] * 0], 1)


@pytest.mark.parametrize("operation", [_maybe_sigmoid, _maybe_half])
def test_what_happens_at_random_in_training_holds_in_the_slim_network(operation):
    class Random(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(operation(self, self.norm(self.a(x))))

    model = Random(torch.relu)
    graph = ms.trace(model, X)
    keep = ms.KeepMask(graph, {g.name: torch.arange(8) > 1 for g in graph.prunable}).repaired()
    masked, slim = ms.apply_mask(model, graph, keep), ms.prune(model, graph, keep)
    for seed in range(8):
        found = []
        for network in (masked, slim):
            random.seed(seed)
            found.append(network.train()(X))
        torch.testing.assert_close(*found)


def test_a_users_rule_widens_the_table():
    def along_channels(t, op, args, kwargs, out, inplace):
        t.record(t.labels(args[0]))
        t.set(out, t.labels(args[0]))

    def operation(x):
        return torch.special.bessel_j1(x)  # zero at zero, but no row of the table

    assert not group_of_a(operation).prunable
    model = Net(operation)
    assert ms.trace(model, X, rules={"special_bessel_j1": along_channels}).groups[0].prunable


def test_protect_and_unknown_names():
    graph = ms.trace(Net(torch.relu), X, protect=("a",))
    assert "protected by the caller" in str(graph.groups[0].reason)
    with pytest.raises(ms.MaskSparsityError, match="'layer9'"):
        ms.trace(Net(torch.relu), X, protect=("layer9",))


def test_a_name_alone_is_no_tuple_of_letters():
    assert not ms.trace(Net(torch.relu), X, protect="a").groups[0].prunable
    for tie in (("a", "b"), "ab"):
        with pytest.raises(ms.MaskSparsityError, match="tuples of names"):
            ms.trace(Net(torch.relu), X, tie=tie)


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 2), (8, 8), (4, 12)])
def test_macs_of_transposed_convolutions_in_groups(inputs, outputs):
    net = nn.Sequential(nn.ConvTranspose2d(inputs, outputs, 3, groups=2))
    assert ms.trace(net, torch.randn(1, inputs, 4, 4)).cost().macs == 16 * inputs * outputs // 2 * 9


def test_inputs_as_tuple_and_dict():
    graph = ms.trace(Net(torch.relu), X)
    for inputs in ((X,), {"x": X}):
        assert [g.size for g in ms.trace(Net(torch.relu), inputs).groups] == [
            g.size for g in graph.groups
        ]
    with pytest.raises(ms.MaskSparsityError, match="example_inputs"):
        ms.trace(Net(torch.relu), "image")


def test_tied_weights_and_shared_modules():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.head = (
                nn.Conv2d(3, 6, 1),
                nn.Conv2d(6, 6, 3, padding=1),
                nn.Linear(6, 2),
            )

        def forward(self, x):
            x = torch.relu(self.stem(x))
            for _ in range(2):
                x = torch.relu(self.conv(x))
            return self.head(x.mean((2, 3)))

    model = Shared().double().eval()
    x = X.double()
    graph = ms.trace(model, x)
    assert [g.size for g in graph.prunable] == [6]  # in and out of the shared layer are one
    keep = ms.KeepMask(graph, {graph.groups[0].name: torch.tensor([1, 0, 1, 1, 0, 1]).bool()})
    with torch.no_grad():
        expected = ms.apply_mask(model, graph, keep)(x)
        torch.testing.assert_close(ms.prune(model, graph, keep)(x), expected, rtol=0, atol=1e-12)


def test_printed_graph_names_groups_and_reasons():
    text = str(ms.trace(Net(lambda x: torch.logcumsumexp(x, 1)), X))
    assert "protected: unknown operation (logcumsumexp" in text
    assert "a: 8 channels" in text
    text = str(ms.trace(Net(nn.GroupNorm(4, 8)), X))
    assert "1 prunable groups with 8 channels" in text
    assert "a: 8 channels in units of 2 in" in text


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Conv2d(3, 1, 1)], ids=["nothing", "one channel"])
def test_networks_without_channels_have_no_groups(model):
    graph = ms.trace(model, X)
    assert graph.groups == ()
    assert isinstance(ms.prune(model, graph, ms.KeepMask(graph)), type(model))


def test_tied_layers_go_together():
    model = ms.models.create("resnet20")
    x = torch.randn(1, 3, 32, 32)
    layers = ("layer1.0.conv1", "layer1.1.conv1")
    graph = ms.trace(model, x, tie=(layers,))
    assert len(graph.groups) == len(ms.trace(model, x).groups) - 1
    keep = ms.KeepMask(graph, {layers[0]: torch.arange(16) > 3})
    slim = ms.prune(model, graph, keep)
    assert [slim.get_submodule(name).out_channels for name in layers] == [12, 12]
    with pytest.raises(ms.MaskSparsityError, match="different widths"):
        ms.trace(model, x, tie=(("layer1.0.conv1", "layer2.0.conv1"),))
    with pytest.raises(ms.MaskSparsityError, match="'layer9'"):
        ms.trace(model, x, tie=(("layer9", "layer1.0.conv1"),))


def test_costs_are_of_one_example_whatever_comes_first():
    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, t, x):
            return self.b(self.a(x) * t[:, None, None, None])

    costs = [ms.trace(Timed(), (torch.rand(n), torch.rand(n, 3, 4, 4))).cost() for n in (1, 3)]
    assert costs[0] == costs[1]
    assert costs[0].macs == 16 * (24 + 32)


def test_a_norm_of_one_channel_is_used():
    layers = nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1), nn.GroupNorm(1, 1), nn.Conv2d(1, 4, 1)
    assert ms.trace(nn.Sequential(*layers), X).unused == ()
