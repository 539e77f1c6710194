"""Random networks and masks, for tests and for the fuzzing command."""

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import masksparsity as ms


class Residual(nn.Module):
    def __init__(self, width: int, inner: int, act: nn.Module):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), act,
            nn.Conv2d(inner, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int, inner: int, gate: nn.Module):
        super().__init__()
        self.squeeze, self.excite, self.gate = (
            nn.Linear(width, inner),
            nn.Linear(inner, width),
            gate,
        )

    def forward(self, x: Tensor) -> Tensor:
        s = self.excite(torch.relu(self.squeeze(x.mean((2, 3)))))
        return x * self.gate(s)[:, :, None, None]


class Dense(nn.Module):
    def __init__(self, width: int, grow: int):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, grow, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)


class Chunk(nn.Module):
    """Halves go separate ways and meet again: C2f, CSP."""

    def __init__(self, width: int, literal: bool):
        super().__init__()
        half = width // 2
        self.half = half if literal else None
        self.conv, self.norm = nn.Conv2d(half, half, 3, padding=1), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1) if self.half is None else (x[:, : self.half], x[:, self.half :])
        return torch.cat([a, torch.relu(self.norm(self.conv(b)))], 1)


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Strided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, ::2], x[:, 1::2]], 1)


class Offset(nn.Module):
    """A raw parameter in forward."""

    def __init__(self, width: int):
        super().__init__()
        self.offset = nn.Parameter(torch.randn(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + self.offset


class Recurrent(nn.Module):
    """Its state begins as zeros."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.inner = inner
        self.gates = nn.Conv2d(width + inner, 2 * inner, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), self.inner, *x.shape[2:])
        for _ in range(2):
            gate, new = self.gates(torch.cat([x, state], 1)).chunk(2, 1)
            state = state + torch.sigmoid(gate) * torch.tanh(new)
        return state


class Wider(nn.Module):
    """More channels than before; zeros fill the shortcut up, on one side or on both."""

    def __init__(self, width: int, more: int, how: str):
        super().__init__()
        self.body = nn.Conv2d(width, width + 2 * more, 3, padding=1)
        self.norm, self.how = nn.BatchNorm2d(width + 2 * more), how
        self.width, self.sides = width, (0, 0, 0, 0, more, more)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.body(x))
        sides: tuple[int, ...] = (0, 0, 0, 0, 0, y.shape[1] - x.shape[1])
        if self.how != "derived":
            sides = self.sides if self.how == "attribute" else (0, 0, 0, 0, 0, 4)
        return torch.relu(y + nn.functional.pad(x, sides))


SPREAD = {
    "expanded": lambda m, x: m.expand_as(x),
    "made whole": lambda m, x: m.expand_as(x).contiguous(),
    "beside a number": lambda m, x: 1 + m.expand_as(x),
    "repeated": lambda m, x: m.repeat(1, x.shape[1], 1, 1),
    "on zeros": lambda m, x: torch.zeros_like(x) + m,
    "pooled": lambda m, x: nn.functional.avg_pool2d(m.expand_as(x).clone(), 3, 1, 1),
    "in places": lambda m, x: torch.cat([m.expand_as(x)[:, :1], 2 * m.expand_as(x)[:, 1:]], 1),
}


class Attention(nn.Module):
    """One map for all channels."""

    def __init__(self, width: int, how: str):
        super().__init__()
        self.map, self.how = nn.Conv2d(width, 1, 1), how

    def forward(self, x: Tensor) -> Tensor:
        return x * SPREAD[self.how](self.map(x).sigmoid(), x)


class Flatten(nn.Module):
    def __init__(self, literal: int | None):
        super().__init__()
        self.literal = literal

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if self.literal is None else x.view(-1, self.literal)


ACTIVATIONS = (nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU(), nn.Sigmoid(), nn.Hardswish(), nn.GELU())
GATES = (nn.Sigmoid(), nn.Hardsigmoid(inplace=True))


@st.composite
def networks(draw: st.DrawFn) -> nn.Sequential:
    """A random sequence of blocks on (2, 3, 8, 8) inputs, ending in a classifier."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    width = draw(st.sampled_from((8, 12)))
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)]
    literal = draw(st.integers(0, 9)) == 0
    for _ in range(draw(st.integers(1, 5))):
        act = draw(st.sampled_from(ACTIVATIONS))
        kind = draw(st.integers(0, 14))
        if kind == 0:
            layers += [act, Residual(width, draw(st.integers(2, 9)), act)]
        elif kind == 1:  # depthwise separable
            layers += [
                nn.Conv2d(width, width, 3, padding=1, groups=width),
                nn.BatchNorm2d(width),
                act,
            ]
        elif kind == 2:  # grouped
            layers += [nn.Conv2d(width, width, 3, padding=1, groups=2), nn.BatchNorm2d(width), act]
        elif kind == 3:
            layers += [Gate(width, draw(st.integers(2, 6)), draw(st.sampled_from(GATES)))]
        elif kind == 4:
            grow = 2 * draw(st.integers(1, 3))
            layers += [Dense(width, grow)]
            width += grow
        elif kind == 5:
            layers += [Chunk(width, literal)]
        elif kind == 6:
            layers += [Shuffle()]
        elif kind == 7:
            layers += [Strided()]
        elif kind == 8:
            layers += [Offset(width)]
        elif kind == 9:  # depthwise with a multiplier
            layers += [nn.Conv2d(width, 2 * width, 1, groups=width), act]
            width *= 2
        elif kind == 10:
            groups = draw(st.sampled_from((1, 2, width)))
            layers += [nn.ConvTranspose2d(width, width, 3, padding=1, groups=groups)]
            layers += [nn.PReLU(width)]
        elif kind == 11:
            inner = 2 * draw(st.integers(2, 6))
            layers += [Recurrent(width, inner)]
            width = inner
        elif kind == 12:
            how = "literal" if literal else draw(st.sampled_from(("derived", "attribute")))
            more = 2 if literal else draw(st.integers(1, 3))
            layers += [Wider(width, more, how)]
            width += 2 * more
        elif kind == 13:
            layers += [Attention(width, draw(st.sampled_from(sorted(SPREAD))))]
        else:
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), act]
    layers += [nn.AdaptiveAvgPool2d(2), Flatten(4 * width if literal else None)]
    return nn.Sequential(*layers, nn.Linear(4 * width, 5))


def random_mask(
    graph: ms.ChannelGraph, seed: int, most: float = 0.8, empty: float = 0.0
) -> ms.KeepMask:
    """Another fraction in every group, at least one channel each; a share `empty` of the groups
    goes altogether, as far as the network can do without."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in graph.prunable:
        fraction = most * torch.rand((), generator=generator)
        values = torch.rand(group.size, generator=generator) >= fraction
        values[torch.randint(group.size, (), generator=generator)] = True
        if empty and torch.rand((), generator=generator) < empty:
            values[:] = False
        keep[group.name] = values
    mask = ms.KeepMask(graph, keep)
    return mask.repaired() if empty else mask


def calibrated(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Double precision, with norms that matter: random networks tend to ignore inner channels."""
    model = model.double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    ms.recalibrate(model, [inputs])
    return model.eval()
