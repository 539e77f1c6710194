"""The arms of paper_table.py and sweep.py: baseline, controls and ours, as stages of a run each."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from turns import Turns

import masksparsity as ms
from masksparsity.pipeline.config import Config
from masksparsity.pipeline.runner import execute
from masksparsity.pipeline.workspace import Workspace
from masksparsity.train.config import Phase

Row = dict[str, Any]
BY_SCALE: Row = {"scores": "scale", "per_cost": False}  # the order of the scales, as published


class Arms:
    """All arms of one seed. Each is a function that returns its row of the table."""

    def __init__(self, config: Config, out: Path, turns: Turns | None = None):
        self.config, self.out = config, out
        self.base = Workspace(config, out / "base")
        if turns:
            data = self.base.data
            self.base.data = replace(data, train=turns.share(data.training()))
        for stage in ("train", "sparsify", "mask"):
            execute(self.base, stage)
        self.dense = out / "base/train/model.safetensors"
        self.mask = out / "base/mask/mask.json"
        own = (config.sparsify, config.mask_sparsify, config.finetune)
        self.epochs = {"B": config.baseline.epochs}
        self.epochs |= dict(zip("SMF", (phase.epochs for phase in own), strict=True))
        self.epochs["T"] = total = self._sum("SMF")
        short = round(total * 40 / 240)
        self.epochs |= {"s": (total - short) // 2, "m": -(-(total - short) // 2), "f": short}
        self.epochs["l"] = self._sum("SF") - self._sum("s")
        self.long = self._finetune("T")

    def dense_on(self) -> Row:
        work = self._work("dense", {"weights": self.dense}, finetune=self.long)
        return self._row(work, {"finetuned": execute(work, "finetune")}, "B + T")

    def slimming(self) -> Row:
        weights = self.sparsified("slimming", epochs=self._sum("sm"))
        mask = self.chosen("slimming", weights, **BY_SCALE)
        return self.removed("slimming", weights, mask, "B + sm + f", finetune=self._finetune("f"))

    def uniform(self) -> Row:
        mask = self.uniform_mask("uniform", self.mask)
        return self.removed("uniform", self.dense, mask, "B + T", finetune=self.long)

    def scratch(self) -> Row:
        phase = replace(self.config.scratch, epochs=self._sum("BT"))
        work = self._work("scratch", {"mask": self.mask}, scratch=phase)
        return self._row(work, {"finetuned": execute(work, "scratch")}, "BT", self.mask)

    def published(self) -> Row:
        rate = {"lr": self.config.sparsify.lr, "schedule": self.config.sparsify.schedule}
        return self.masked(
            "published", self.l1_mask(), "B + s (mask) + m + f",
            finetune=self._finetune("f"), penalty="masked-l1", epochs=self._sum("m"), **rate,
        )  # fmt: skip

    def ours(self) -> Row:
        return self.masked("ours", self.mask)

    def ours_l1_mask(self) -> Row:
        left = self._finetune("l")
        return self.masked("l1-mask", self.l1_mask(), "B + s (mask) + M + l", finetune=left)

    def ours_uniform_mask(self) -> Row:
        mask = self.uniform_mask("uniform", self.mask)
        return self.masked("uniform-mask", mask, "B + M + SF", finetune=self._finetune("SF"))

    def at_once(self) -> Row:
        return self.masked("at-once", self.mask, penalty="decay", decay_span=1.0)

    def taught(self) -> Row:
        execute(self._work("ours", {"weights": self.dense, "mask": self.mask}), "mask-sparsify")
        weights = self.out / "ours/mask-sparsify/model.safetensors"
        finetune = replace(self.config.finetune, distill=0.5)
        return self.removed("taught", weights, self.mask, "B + S (mask) + M + F", finetune)

    def l1_mask(self) -> Path:
        """The mask of the paper's own pipeline."""
        weights = self.sparsified("published", epochs=self._sum("s"))
        return self.chosen("published", weights, **BY_SCALE)

    def sparsified(self, name: str, **settings: Any) -> Path:
        """Weights after a penalty on all scales, trained from the baseline."""
        sparsify = replace(self.config.sparsify, **settings)
        execute(self._work(name, {"weights": self.dense}, sparsify=sparsify), "sparsify")
        return self.out / name / "sparsify/model.safetensors"

    def chosen(self, name: str, weights: Path, **settings: Any) -> Path:
        """The mask that the recipe with these settings reads from `weights`."""
        mask = replace(self.config.mask, **settings)
        execute(self._work(name, {"weights": weights}, mask=mask), "mask")
        return self.out / name / "mask/mask.json"

    def uniform_mask(self, name: str, like: Path) -> Path:
        """By filter L1 norm the same share of every layer, as near as the MACs of `like` can be
        met: by what part of its layer is worse than a channel."""
        model = self.base.network(self.dense)
        graph = self.base.trace(model)
        ranks = {n: s.argsort().argsort() / len(s) for n, s in ms.scores.norm(model, graph).items()}
        share = 1 - graph.cost(ms.KeepMask.load(like, graph)).macs / graph.cost().macs
        path = self.out / name / "chosen.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        ms.select.budget(graph, ranks, pruned_macs=share).save(path)
        return path

    def masked(
        self,
        name: str,
        mask: Path,
        spent: str = "B + S (mask) + M + F",
        finetune: Phase | None = None,
        **settings: Any,
    ) -> Row:
        """MaskSparsity with a mask: from the baseline to the finetuned slim network."""
        phase = replace(self.config.mask_sparsify, **settings)
        given = {"weights": self.dense, "mask": mask}
        execute(self._work(name, given, mask_sparsify=phase), "mask-sparsify")
        weights = self.out / name / "mask-sparsify/model.safetensors"
        return self.removed(name, weights, mask, spent, finetune)

    def removed(
        self, name: str, weights: Path, mask: Path, spent: str, finetune: Phase | None = None
    ) -> Row:
        """Removal and finetuning."""
        given = {"weights": weights, "mask": mask}
        pruned = execute(self._work(name, given), "prune")
        work = self._work(name, {}, finetune=finetune or self.config.finetune)
        found = {
            "before_removal": pruned["before_removal"],
            "after_removal": pruned["after_removal"],
        }
        found["finetuned"] = execute(work, "finetune")
        return self._row(work, found, spent, mask, weights, pruned)

    def _row(
        self,
        work: Workspace,
        found: dict[str, Row],
        spent: str,
        mask: Path | None = None,
        weights: Path | None = None,
        pruned: Row | None = None,
    ) -> Row:
        graph = self.base.trace(self.base.dense())
        keep = ms.KeepMask.load(mask, graph) if mask else ms.KeepMask(graph)
        dense, slim = graph.cost(), graph.cost(keep)
        row: Row = {f"{k}_accuracy": v["accuracy"] for k, v in found.items()}
        row |= {"macs_removed": 1 - slim.macs / dense.macs, "epochs": self._spell(spent)}
        row |= {"params_removed": 1 - slim.params / dense.params}
        row["test_images"] = found["finetuned"]["total"]
        if pruned and weights:
            tensors = load_file(weights)
            scales = [tensors[f"{n}.weight"][k].abs() for n, k in keep.by_norm().items()]
            row["kept_scale"] = float(sum(s.sum() for s in scales) / sum(map(len, scales)))
            row["latency_ms"] = pruned["latency_ms"]
        return row

    def _work(self, name: str, given: dict[str, Path], **sections: Any) -> Workspace:
        given = {"teacher": self.dense, **given}  # read where a phase has a share for it
        work = Workspace(replace(self.config, **sections), self.out / name, given=given)
        work.data = self.base.data  # decoded once
        return work

    def _finetune(self, letters: str) -> Phase:
        return replace(self.config.finetune, epochs=self._sum(letters))

    def _sum(self, letters: str) -> int:
        return sum(self.epochs[letter] for letter in letters)

    def _spell(self, spent: str) -> str:
        parts = [part.partition(" ") for part in spent.split(" + ")]
        spelt = [(self._sum(letters), note) for letters, _, note in parts]
        return " + ".join(f"{n} {note}".strip() for n, note in spelt if n)


ARMS: dict[str, Callable[[Arms], Row]] = {
    "dense": Arms.dense_on,
    "slimming": Arms.slimming,
    "uniform": Arms.uniform,
    "scratch": Arms.scratch,
    "published": Arms.published,
    "ours": Arms.ours,
    "l1-mask": Arms.ours_l1_mask,
    "uniform-mask": Arms.ours_uniform_mask,
    "at-once": Arms.at_once,
    "taught": Arms.taught,
}

# Arms that share files -> the one that makes them.
SHARES = {"l1-mask": "published", "uniform-mask": "uniform", "taught": "ours"}
