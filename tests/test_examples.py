"""Every example runs to its end, where its library is installed, and is short."""

import importlib.util
from pathlib import Path

import pytest

from .process import run_python

EXAMPLES = sorted(Path(__file__).parents[1].glob("examples/*.py"))
NEEDS = {
    "accelerate_loop": "accelerate",
    "lightning_module": "lightning",
    "plain": "torch",
    "timm_training": "timm",
}


def test_all_examples_are_run() -> None:
    assert [example.stem for example in EXAMPLES] == sorted(NEEDS)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec(NEEDS[example.stem]) is None:
        pytest.skip(f"needs {NEEDS[example.stem]}")
    lines = example.read_text().splitlines()
    assert len(lines) < 40
    assert any("torch.testing.assert_close(" in line for line in lines)
    run_python(str(example), cwd=tmp_path)
