"""What the documentation shows runs, and prints what it says."""

import re
from pathlib import Path

import pytest

from .process import run_python

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


@pytest.mark.parametrize("page", ["guide.md", "how-it-works.md"])
def test_blocks_run_and_print_what_follows_them(page: str, tmp_path: Path) -> None:
    blocks = BLOCK.findall((DOCS / page).read_text())
    code = "".join(text for kind, text in blocks if kind == "python")
    printed = "".join(text for kind, text in blocks if kind == "text")
    assert run_python("-W", "error", "-c", code, cwd=tmp_path) == printed


@pytest.mark.parametrize("page", [*DOCS.glob("*.md"), DOCS.parent / "README.md"])
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), link
