"""Which networks prune, how much of them, and is the result exact?

All image networks of torchvision and the smallest member of every family of convolutional networks
of timm (a family: one module of timm and the first word of the name), or of a library what `--only`
asks for; `libraries.py` has more, which are looked at where they are installed. Each network in a
process of its own: trace, a random mask with another fraction in every group, prune; `apply_mask`
against `prune` in double precision, in eval and in train mode; a training step of the slim model;
its archive, saved and loaded to the bit. A refusal by the proof is listed, and no error. Exit code
1 if any is wrong.

    python benchmarks/coverage.py --table results/coverage.txt              # all: hours on one core
    python benchmarks/coverage.py --library timm --only 'mixnet|dpn68' --peer
    python benchmarks/coverage.py --library ultralytics --out results/coverage-ultralytics.jsonl
"""

import argparse
import collections
import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from libraries import LIBRARIES
from machine import about
from torch import Tensor, nn
from zoo import build, calibrate, forward, names

import masksparsity as ms

HEAVY = 3e8  # parameters; above, three copies in double precision need over 20 GB: in single
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
GOOD = ("exact", "refused", "nothing to prune")


def random_mask(graph: ms.ChannelGraph) -> ms.KeepMask:
    generator = torch.Generator().manual_seed(0)
    keep = {}
    for group in graph.prunable:
        values = torch.rand(group.size, generator=generator)
        kept = values >= 0.8 * torch.rand((), generator=generator)
        keep[group.name] = kept | (values == values.max())
    return ms.KeepMask(graph, keep).repaired()


def distance(expected: list[Tensor], actual: list[Tensor]) -> float:
    """Largest difference, relative to the scale of the output that differs."""
    worst = 0.0
    for a, b in zip(expected, actual, strict=True):
        if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
            return float("inf")
        a, b = a.detach().double().nan_to_num(0, 0, 0), b.detach().double().nan_to_num(0, 0, 0)
        if a.numel():
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)))
    return worst


def archived(slim: nn.Module, model: nn.Module) -> nn.Module:
    """What comes back of a slim network that is saved, and loaded into the dense one's code."""
    with tempfile.TemporaryDirectory() as folder:
        ms.save(slim, Path(folder, "slim"))
        return ms.load(Path(folder, "slim"), model=model)


def step(model: nn.Module, outputs: list[Tensor]) -> None:
    """A training step of any loss."""
    loss = sum(x.square().mean() for x in outputs if x.requires_grad)
    assert isinstance(loss, Tensor)
    loss.backward()
    torch.optim.SGD(model.parameters(), 1e-3).step()


def check(library: str, name: str, row: dict[str, Any], smallest: int = 0) -> None:
    """Fill in `row`, step by step, so that a crash leaves what came before."""
    torch.manual_seed(0)
    model, inputs = build(library, name, smallest)
    row |= {"input": inputs[0].shape[-1], "params": sum(p.numel() for p in model.parameters())}
    start = time.perf_counter()
    row["status"] = "trace crashes"
    graph = ms.trace(model, inputs)
    row["trace_s"] = round(time.perf_counter() - start, 3)
    protections: collections.Counter = collections.Counter()
    for group in graph.protected:
        assert group.reason is not None
        protections[f"{group.reason.why} ({group.reason.operation})"] += group.size
    out = protections.pop("model output (output)", 0)
    row["channels"], row["prunable"] = graph.units - out, sum(g.size for g in graph.prunable)
    row["protected"] = dict(protections.most_common())
    row["status"] = "nothing to prune"
    if not graph.prunable:
        return
    keep = random_mask(graph)
    if keep.units.all():  # groups of one channel
        return
    row["status"] = "calibration crashes"
    dtype = torch.float64 if row["params"] < HEAVY else torch.float32
    model, inputs = model.to(dtype), tuple(x.to(dtype) for x in inputs)
    calibrate(model, inputs)
    row["status"] = "prune crashes"
    start = time.perf_counter()
    try:
        slim = ms.prune(model, graph, keep)
    except ms.MaskSparsityError as error:
        row |= {"status": "refused", "error": str(error)}
        return
    row["prune_s"] = round(time.perf_counter() - start, 3)
    row["macs_kept"] = round(graph.cost(keep).macs / max(1, graph.cost().macs), 3)
    row["status"] = "run crashes"
    expected = forward(ms.apply_mask(model, graph, keep), inputs)
    actual = forward(slim, inputs)
    row["distance"] = distance(expected, actual)
    row["change"] = distance(forward(model, inputs), expected)
    row["status"] = "archive crashes"
    loaded = forward(archived(slim, model), inputs)
    same = all(torch.equal(a, b) for a, b in zip(actual, loaded, strict=True))
    row["status"] = "train step crashes"
    masked = forward(ms.apply_mask(model, graph, keep), inputs, train=True)
    outputs = forward(slim, inputs, train=True)
    row["train_distance"] = distance(masked, outputs)
    step(slim, outputs)
    bound = TOLERANCE[dtype]
    row["status"] = (
        "WRONG" if not row["distance"] <= bound
        else "WRONG in train mode" if not row["train_distance"] <= bound
        else "archive differs" if not same
        else "mask unseen" if row["change"] < 1e-6
        else "cost differs" if graph.cost(keep).params != sum(p.numel() for p in slim.parameters())
        else "exact"
    )  # fmt: skip
    if row["status"] == "WRONG in train mode" and not smallest:
        # A norm over two values (maps of one pixel) magnifies rounding: look at larger maps.
        check(library, name, row, 128)


def peer(library: str, name: str, row: dict[str, Any]) -> None:
    """Torch-Pruning on the same network: half of every layer."""
    import torch_pruning as tp

    model, inputs = build(library, name)
    row["peer"] = "crashes"
    start = time.perf_counter()
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    pruner = tp.pruner.MetaPruner(
        model, inputs, tp.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=heads
    )
    pruner.step()
    row["peer_s"] = round(time.perf_counter() - start, 3)
    before = row.get("params", 0)
    forward(model, inputs)
    after = sum(p.numel() for p in model.parameters())
    row["peer"] = f"{after / before:.0%} of parameters" if before else "runs"
    row["peer"] += "" if _trains(model, inputs) else ", does not train"


def _trains(model: nn.Module, inputs: tuple) -> bool:
    try:
        return bool(forward(model, inputs, train=True))
    except Exception:
        return False


def _child(work: Any, library: str, name: str, row: dict, pipe: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        work(library, name, row)
    except Exception as error:
        row["peer_error" if work is peer else "error"] = f"{type(error).__name__}: {error}"[:300]
    pipe.send(row)


def apart(work: Any, library: str, name: str, row: dict, timeout: float) -> dict[str, Any]:
    """`work` in a process of its own, so that nothing it does ends the run."""
    mine, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(
        target=_child, args=(work, library, name, dict(row), theirs)
    )
    child.start()
    theirs.close()
    failed = {"peer": "does not end"} if work is peer else {}
    key = "peer_error" if work is peer else "error"
    try:
        done = mine.poll(timeout)
        row = mine.recv() if done else {**row, **failed, key: f"over {timeout:.0f} s"}
    except EOFError:
        row = {**row, **failed, key: "killed (memory?)"}
    child.kill()
    child.join()
    return row


def line(row: dict[str, Any]) -> str:
    share = row["prunable"] / max(1, row["channels"]) if "channels" in row else float("nan")
    numbers = [
        f"{row[key]:8.0e}" if key in row else "       -" for key in ("distance", "train_distance")
    ] + [f"{row[key]:7.2f}" if key in row else "      -" for key in ("trace_s", "prune_s")]
    notes = [row["error"]] if "error" in row else []
    notes += [f"{count} {why}" for why, count in list(row.get("protected", {}).items())[:4]]
    notes += [f"[peer: {row['peer']}]"] if "peer" in row else []
    return (
        f"{row['name']:42} {row['status']:16} {share:6.1%} {' '.join(numbers)}  {'; '.join(notes)}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=LIBRARIES, help="torchvision and timm if not given")
    parser.add_argument("--only", help="regular expression: any of the library's names")
    parser.add_argument("--out", type=Path, default=Path("results/coverage.jsonl"))
    parser.add_argument("--table", type=Path, help="write the table of all of --out here, too")
    parser.add_argument("--resume", action="store_true", help="skip what is in --out already")
    parser.add_argument("--timeout", type=float, default=600, help="seconds per network")
    parser.add_argument("--peer", action="store_true", help="Torch-Pruning beside it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    if options.out.exists() and options.resume:
        rows = {r["name"]: r for r in map(json.loads, options.out.read_text().splitlines())}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for library in [options.library] if options.library else ["torchvision", "timm"]:
        for name in names(library, options.only):
            row = rows.get(f"{library}/{name}")
            if row and ("peer" in row or not options.peer):
                continue
            if row is None:
                row = {"name": f"{library}/{name}", "status": "build crashes"}
                row = apart(check, library, name, row, options.timeout)
            if options.peer:
                row = apart(peer, library, name, row, options.timeout)
            rows[row["name"]] = row
            print(line(row), flush=True)
            text = "".join(json.dumps(r) + "\n" for r in rows.values())
            options.out.write_text(text)
    tally = collections.Counter(row["status"] for row in rows.values())
    summary = ", ".join(f"{count} {status}" for status, count in tally.most_common())
    theirs = [row["peer"] for row in rows.values() if "peer" in row]
    if theirs:
        runs = sum(peer not in ("crashes", "does not end") for peer in theirs)
        trains = sum(peer.endswith("parameters") for peer in theirs)
        summary += f"; Torch-Pruning: {runs} of {len(theirs)} run afterwards, {trains} train"
    packages = dict.fromkeys(["torchvision", "timm", options.library or "timm"])
    conditions = "; ".join(f"{key} {value}" for key, value in about(*packages).items())
    heading = f"{conditions}\n{len(rows)} networks: {summary}\n"
    print(heading)
    if options.table:
        options.table.write_text(heading + "".join(line(r) + "\n" for r in rows.values()))
    return int(any(row["status"] not in GOOD for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
