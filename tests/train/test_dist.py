"""Two processes on one machine train as one network, the penalty included."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from safetensors.torch import load_file

SCRIPT = """
    import sys
    from dataclasses import replace
    from pathlib import Path

    import torch
    from safetensors.torch import save_file

    import masksparsity as ms
    from masksparsity.data import DataConfig, create
    from masksparsity.train import dist
    from masksparsity.train.config import Phase, TrainConfig
    from masksparsity.train.evaluate import evaluate
    from masksparsity.train.loop import fit

    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    device = dist.start("cpu")
    torch.manual_seed(0)
    model = ms.models.create("resnet20", in_channels=1, width=8)
    graph = ms.trace(model, torch.zeros(1, 1, 8, 8))
    keep = ms.select.uniform(graph, ms.scores.norm(model, graph), 0.5)
    penalty = ms.Proximal(model, graph, keep, strength=5e-3)
    data = create(
        DataConfig(name="digits"), batch_size=180, device=device, seed=0,
        rank=dist.rank(), world=dist.size(),
    )
    fit(
        model, data, Phase(epochs=2, lr=0.1), TrainConfig(amp=False), folder=out / "stage",
        seed=0, penalty=penalty,
    )
    found = evaluate(model, data.test)
    assert found.total == dist.sum_(torch.tensor(data.test.samples)), found
    save_file(dict(model.named_parameters()), out / f"{dist.rank()}.safetensors")
    dist.stop()
"""


def test_two_processes_agree(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--standalone", str(script), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any((value == 0).any() for name, value in first.items() if "bn" in name)
    assert (tmp_path / "stage" / "metrics.jsonl").read_text().count("\n") == 2
