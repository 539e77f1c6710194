"""A training step of ours in each mode, against the loop that most CIFAR code has, in one run.

Claim: ResNet-20 on two CPU threads trains at least 2.3 times as fast as the plain loop: float32,
NCHW, DataLoader and torchvision's transforms image by image, SGD that is not fused, loss and errors
read in every step. Steps include their data; the sides take turns. `slim` is what a mask of half
the MACs leaves. Operations are those of one step: on CUDA what the device does (kernels, copies)
and, in brackets, what the host launches; on the CPU calls of ATen. With --at-once N, on a GPU, N
captured trainings share it (turns.py), and their images/s are added up. The images are random
unless --data.root names a folder of CIFAR-10.

    python benchmarks/step.py --threads 2 --out results/step.json              # CPU: an hour
    python benchmarks/step.py --steps 50 --workers 12 --at-once 2 4 8 --out results/step-gpu.json
"""

import argparse
import copy
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from machine import about, finish, quartiles, tell
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from turns import Turns

import masksparsity as ms
from masksparsity.data.cifar import cifar
from masksparsity.data.config import DataConfig
from masksparsity.data.imageset import Pixels
from masksparsity.data.loader import Loader, Normalize, Plan
from masksparsity.data.resident import ResidentLoader
from masksparsity.train.config import Phase, TrainConfig
from masksparsity.train.graph import WARM_UP
from masksparsity.train.step import Step, create_optimizer

BAR = 2.3
MODES = ["eager", "compile", "graph"]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PHASE = Phase(epochs=1, lr=0.01)
# Estimates for an H200, images/s: by the bytes that the dense network moves, and by its chain of
# dependent kernels at batch 128.
H200 = {"resnet20": (820e3, 385e3), "resnet56": (291e3, 133e3), "resnet110": (148e3, 67e3)}

Side = Iterator[None]  # a step per `next`
Clock = Callable[[], float]


class Pictures(Dataset):
    """Images one by one, augmented by torchvision, as its own CIFAR10 hands them out."""

    def __init__(self, pixels: Pixels) -> None:
        self.images = pixels.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = pixels.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def plain(model: nn.Module, pixels: Pixels, options: argparse.Namespace) -> Side:
    """The step of pycls and many others."""
    device = options.device
    model.to(device).train()
    loader = DataLoader(
        Pictures(pixels), options.batch, shuffle=True, drop_last=True, num_workers=options.workers,
        pin_memory=device == "cuda", persistent_workers=options.workers > 0,
    )  # fmt: skip
    optimizer = torch.optim.SGD(
        model.parameters(), PHASE.lr, PHASE.momentum, weight_decay=PHASE.weight_decay, nesterov=True
    )
    meter = {"loss": 0.0, "top1": 0.0, "top5": 0.0}
    while True:
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device, non_blocking=True)
            with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                outputs = model(images)
                loss = F.cross_entropy(outputs, labels)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            right = outputs.topk(5).indices == labels[:, None]
            meter["loss"] += loss.item()
            meter["top1"] += right[:, :1].sum().item()
            meter["top5"] += right.sum().item()
            yield


def ours(
    model: nn.Module,
    pixels: Pixels,
    options: argparse.Namespace,
    mode: str,
    turns: Turns | None = None,
) -> Side:
    """The inside of `masksparsity.train.loop.fit`."""
    device = torch.device(options.device)
    model.to(device, memory_format=torch.channels_last).train()
    loader: Loader = ResidentLoader(
        pixels.images, pixels.labels,
        Plan(images=len(pixels.labels), batch_size=options.batch, train=True),
        Normalize(MEAN, STD, 32, device), crop_padding=4, flip=True,
    )  # fmt: skip
    if turns:
        loader = turns.share(loader)
    config = TrainConfig(step=mode)  # type: ignore[arg-type]
    step = Step(model, create_optimizer(model, PHASE), config)
    steps = count(1)
    for epoch in count():
        step.reset()
        for images, labels in loader.epoch(epoch):
            step(images, labels, PHASE.lr)
            if next(steps) % config.log_every == 0:
                step.read()
            yield


def turn(side: Side, steps: int, device: str, clock: Clock = time.perf_counter) -> float:
    """Seconds per step."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = clock()
    for _ in islice(side, steps):
        pass
    if device == "cuda":
        torch.cuda.synchronize()
    return (clock() - begin) / steps


def together(
    model: nn.Module, pixels: Pixels, options: argparse.Namespace, width: int
) -> list[float]:
    """Seconds per batch, turn by turn, of `width` captured trainings at once."""
    turns = Turns(width)
    sides = [ours(copy.deepcopy(model), pixels, options, "graph", turns) for _ in range(width)]

    def seconds() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        turns.run([partial(deque, islice(side, options.steps), 0) for side in sides])
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / options.steps / width

    seconds()  # warm-up and capture
    return [seconds() for _ in range(options.turns)]


def operations(side: Side, device: str) -> tuple[int, int | None]:
    """What one step does on the device, and what the host launches for it."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as found:
        turn(side, 1, device)
    events = found.events()
    if device == "cuda":
        on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        words = ("LaunchKernel", "GraphLaunch", "Memcpy", "Memset")
        calls = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU
                 and e.name.startswith("cu") and any(word in e.name for word in words)]  # fmt: skip
        return sum(not e.is_user_annotation for e in on_device), len(calls)

    def inside_another(event: Any) -> bool:
        parent = event.cpu_parent
        return parent is not None and (parent.name.startswith("aten::") or inside_another(parent))

    calls = [e for e in events if e.name.startswith("aten::") and not inside_another(e)]
    return len(calls), None


def networks(names: list[str]) -> Iterator[tuple[str, str, nn.Module, int, int]]:
    """Name, variant, network, its MACs per image, and those of the dense one."""
    for name in names:
        torch.manual_seed(0)
        dense = ms.models.create(name)
        graph = ms.trace(dense, torch.randn(1, 3, 32, 32))
        keep = ms.select.budget(graph, ms.scores.norm(dense, graph), pruned_macs=0.5)
        slim = ms.prune(dense, graph, keep)
        macs = graph.cost().macs
        yield name, "dense", dense, macs, macs
        yield name, "slim", slim, graph.cost(keep).macs, macs


def limit(name: str, batch: int, share: float) -> float | None:
    """Images/s that an H200 could reach; bytes go with the widths, MACs with their square."""
    if name not in H200 or "H200" not in torch.cuda.get_device_name():
        return None
    by_bytes, by_chain = H200[name]
    return min(by_bytes / share**0.5, by_chain * batch / 128)


def load(root: Path | None, images: int) -> Pixels:
    if root is not None:
        train = cifar(DataConfig(name="cifar10", root=root)).train
        assert isinstance(train, Pixels)
        return train
    generator = torch.Generator().manual_seed(0)
    return Pixels(
        torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator),
        torch.randint(10, (images,), generator=generator),
    )


def measure(
    model: nn.Module, pixels: Pixels, options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, tuple[int, int | None]]]:
    """Of each side: seconds per batch, turn by turn, and the operations of a step."""
    device = options.device
    clock = time.process_time if options.cpu_time else time.perf_counter
    sides = {"plain": plain(copy.deepcopy(model), pixels, options)}
    for mode in options.modes or MODES[: 3 if device == "cuda" else 2]:
        sides[mode] = ours(copy.deepcopy(model), pixels, options, mode)
    for side in sides.values():
        turn(side, WARM_UP + 2, device)
    done = {key: operations(side, device) for key, side in sides.items()}
    times: dict[str, list[float]] = {key: [] for key in sides}
    for _ in range(options.turns):
        for key, side in sides.items():
            times[key].append(turn(side, options.steps, device, clock))
    for width in options.at_once:
        times[f"graph x{width}"] = together(model, pixels, options, width)
    return times, done


def arguments() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(H200))
    parser.add_argument("--variants", nargs="+", default=["dense", "slim"])
    parser.add_argument("--modes", nargs="+", choices=MODES, help="all that the device has")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="per turn")
    parser.add_argument("--turns", type=int, default=9, help="of each side")
    parser.add_argument("--at-once", type=int, nargs="*", default=[], help="trainings on one GPU")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0, help="of the plain loop's DataLoader")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--data.root", dest="root", type=Path, help="CIFAR-10 in place of noise")
    parser.add_argument("--cpu-time", action="store_true",
                        help="of this process: for one thread, on a busy machine")  # fmt: skip
    parser.add_argument("--out", type=Path, help="write the table here, too")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.deterministic = True  # as in our pipeline; the plain loop sets its own
    device = options.device
    facts = about("torchvision", device=device)
    facts |= {"data": str(options.root or f"{options.images} random images, seed 0"),
              "n": f"{options.turns} turns of {options.steps} steps of {options.batch} images; "
              "median [quartiles]"}  # fmt: skip
    facts["clock"] = "CPU time" if options.cpu_time else "wall time"
    tell(facts)
    print(f"{'network':17}{'side':9}{'images/s':>10}{'ms/batch':>10}{'operations':>13}"
          f"{'GFLOP/s':>9}{'of limit':>9}   times the plain loop")  # fmt: skip
    pixels = load(options.root, options.images)
    rows, missed = [], []
    for name, variant, model, macs, dense_macs in networks(options.models):
        if variant not in options.variants:
            continue
        times, done = measure(model, pixels, options)
        top = limit(name, options.batch, macs / dense_macs) if device == "cuda" else None
        for side, turns in times.items():
            seconds = statistics.median(turns)
            low, ratio, high = quartiles(
                [theirs / own for theirs, own in zip(times["plain"], turns, strict=True)]
            )
            speed = options.batch / seconds
            number, launches = done.get(side, (None, None))
            rows.append({
                "network": name, "variant": variant, "macs": macs, "side": side,
                "images_per_second": speed, "ms_per_step": 1e3 * seconds,
                "turns_ms_per_step": [1e3 * t for t in turns],
                "operations": number, "launches": launches,
                "gflops": 6e-9 * macs * speed,  # backward is twice forward; a MAC is two FLOP
                "share_of_limit": speed / top if top else None,
                "ratio": ratio, "ratio_quartiles": [low, high],
            })  # fmt: skip
            told = f"{number or '-'}" + (f" ({launches})" if launches is not None else "")
            share = f"{speed / top:9.1%}" if top else f"{'-':>9}"
            print(f"{name + ' ' + variant:17}{side:9}{speed:10.0f}{1e3 * seconds:10.2f}{told:>13}"
                  f"{rows[-1]['gflops']:9.1f}{share}{ratio:9.2f} [{low:.2f}, {high:.2f}]",
                  flush=True)  # fmt: skip
            bar = device == "cpu" and (name, variant, side) == ("resnet20", "dense", "eager")
            if bar and ratio < BAR:
                missed.append(f"{name} {variant} {side}: {ratio:.2f} < {BAR}")
    return finish(facts, rows, missed, options.out)


if __name__ == "__main__":
    sys.exit(main())
