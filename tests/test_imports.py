"""What imports what: the rooms from the bottom up, and the package of others."""

import subprocess
import sys
from pathlib import Path

import pytest

import masksparsity as ms

BELOW = {"tracing": ("..errors",), "channels": ("..errors", "..tracing")}


@pytest.mark.parametrize("room", BELOW)
def test_the_heart_imports_torch_alone(room):
    for file in Path(ms.__file__).with_name(room).glob("*.py"):
        for line in file.read_text().splitlines():
            words = line.split()
            if words[:1] in (["from"], ["import"]):
                name = words[1]
                alone = name.split(".")[0] in {*sys.stdlib_module_names, "torch", ""}
                upward = name.startswith("..") and not name.startswith(BELOW[room])
                assert alone, f"{file.name}: {line}"
                assert not upward, f"{file.name}: {line}"


def test_importing_the_package_needs_torch_and_safetensors_only():
    code = (
        "import sys\n"
        "for name in ('torchvision', 'timm', 'tyro', 'rich', 'matplotlib', 'PIL'):\n"
        "    sys.modules[name] = None\n"
        "import masksparsity"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
