"""The page and the table show what `results.json` says, whatever of it there is."""

import copy
import json
import re

import pytest
from rich.console import Console

from masksparsity import report
from masksparsity.errors import MaskSparsityError

RESULTS = {
    "accuracy": {
        "baseline": 355 / 360,
        "before_removal": 354 / 360,
        "after_removal": 354 / 360,
        "finetuned": 353 / 360,
    },
    "correct": {"baseline": 355, "before_removal": 354, "after_removal": 354, "finetuned": 353},
    "total": 360,
    "macs": {"dense": 40_550_000, "slim": 20_150_000},
    "params": {"dense": 269_722, "slim": 159_136},
    "latency_ms": {"dense": 3.41, "slim": 2.06},
    "kept_scale_mean": {"global_l1": 0.541, "masked": 0.923},
    "seconds": {"train": 41.23, "sparsify": 30.41, "finetune": 12.6, "profile": 1.5},
    "recipe": "digits-resnet20",
    "model": "resnet20",
    "dataset": "digits",
    "seed": 7,
    "versions": {"python": "3.11.2", "torch": "2.15.0"},
    "device": "cpu, 2 threads",
    "command": "masksparsity run digits-resnet20 --seed 7",
    "layers": [{"name": f"layer{i}.conv1", "dense": 16, "kept": 16 - i % 16} for i in range(110)],
    "scales": {
        name: {
            "edges": [0.03 * i for i in range(51)],
            "kept": [0] * 20 + [7] * 30,
            "pruned": [90] + [0] * 49,
        }
        for name in ("baseline", "global_l1", "masked")
    },
    "curves": {
        stage: [
            {"epoch": i, "train_loss": 1 / i, "test_accuracy": 1 - 0.5 / i, "lr": 0.1}
            for i in range(1, 9)
        ]
        for stage in ("train", "sparsify", "mask-sparsify", "finetune")
    },
    "warnings": ["3 masked scales are above 0.01"],
}


@pytest.fixture
def page(tmp_path):
    """A function from results to the page that is made of them."""

    def make(results, name="run"):
        run = tmp_path / name
        run.mkdir(exist_ok=True)
        (run / "results.json").write_text(json.dumps(results))
        path = report.write(run)
        assert path == run / "report.html"
        return path.read_text()

    return make


def terminal(results):
    console = Console(width=140, no_color=True)
    with console.capture() as capture:
        console.print(report.table(results))
    return capture.get()


def test_page_shows_the_run(page):
    html = page(RESULTS)
    assert "50.3 % of the MACs and 41.0 % of the parameters removed" in html
    assert "98.61 % → 98.06 %" in html
    assert "equals accuracy before it to the image (354 of 360)" in html
    assert "0.54 after global L1, 0.92 after MaskSparsity" in html
    for text in ("40.55 M", "20.15 M", "269.7 k", "−50.3 %", "−39.6 %", "2.06 ms", "41.2"):
        assert text in html
    for layer in RESULTS["layers"]:
        assert f"<td>{layer['name']}</td><td>16</td><td>{layer['kept']}</td>" in html
    for text in ("3 masked scales", "cpu, 2 threads", "torch 2.15.0", "--seed 7"):
        assert text in html
    assert html.count("<svg") == 5, "one run: nothing to compare it with"


def test_removal_that_costs_is_said(page):
    results = copy.deepcopy(RESULTS)
    results["correct"]["after_removal"] = 40
    assert "removal took accuracy from 354 to 40 of 360 images" in page(results)


def test_runs_on_the_same_data_are_compared(page):
    page(RESULTS | {"macs": {"dense": 4e7, "slim": 1e7}}, "smaller")
    page(RESULTS | {"dataset": "cifar10"}, "elsewhere")
    page({"accuracy": {}, "dataset": "digits"}, "unfinished")
    html = page(RESULTS)
    assert html.count("<svg") == 7
    assert "smaller" in html
    assert "elsewhere" not in html


def test_a_broken_sibling_does_no_harm(page, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{")
    assert page(RESULTS).count("<svg") == 5


@pytest.mark.parametrize("key", RESULTS)
def test_partial_results(page, key):
    results = {"accuracy": {}, key: RESULTS[key]}
    html = page(results)
    assert ("<svg" in html) == (
        key in ("accuracy", "macs", "params", "latency_ms", "layers", "scales", "curves")
    )
    assert "None" not in html + terminal(results)


def test_nothing_measured(page):
    assert "nothing measured yet" in page({"accuracy": {}})


def test_training_that_cannot_be_drawn_on_a_log_axis(page):
    """No error at all, a loss that is missing, a single epoch: each leaves its page whole."""
    epochs = [{"epoch": 1, "train_loss": None, "test_accuracy": 1.0}]
    assert page(RESULTS | {"curves": {"train": epochs, "finetune": []}}).count("<svg") == 5


def test_nothing_is_read_as_markup(page):
    evil = '<script>alert("1")</script>&[red]$x$'
    results = json.loads(json.dumps(RESULTS).replace("digits", json.dumps(evil)[1:-1]))
    results |= {"warnings": [evil], "model": evil, "device": evil, "versions": {evil: evil}}
    results["layers"][0]["name"] = results["layers"][1]["name"] = evil
    results["curves"][evil] = results["curves"]["train"]
    results["seconds"][evil] = 1.0
    page(results, "<b>sibling")
    html = page(results)
    assert "<script" not in html
    assert "<b>" not in html
    assert "[red]$x$" in html
    assert evil in terminal(results).replace("\n", "")


def test_same_results_same_bytes(page):
    page(RESULTS, "other")
    assert page(RESULTS) == page(RESULTS)


def test_page_asks_nothing_of_the_network(page):
    page(RESULTS, "other")
    html = page(RESULTS)
    targets = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)""", html)
    assert targets
    assert all((link or url).startswith("#") for link, url in targets)
    assert not re.search(r"<(script|link|iframe|img|object|embed)\b|@import", html)


def test_both_themes_colour_the_figures(page):
    html = page(RESULTS)
    assert "prefers-color-scheme:dark" in html
    for drawing in re.findall(r"<svg.*?</svg>", html, flags=re.S):
        assert "var(--ink)" in drawing or "var(--muted)" in drawing
        assert not re.search(r"(fill|stroke): #", drawing), "a colour that no theme changes"


def test_table_shows_the_stages():
    lines = terminal(RESULTS).splitlines()
    prune = next(line for line in lines if "after removal" in line)
    assert re.findall(r"[\w./%]+", prune) == (
        ["prune", "after", "removal", "98.33", "%", "354", "/", "360", "20.15", "M", "159.1", "k"]
    )
    assert any("sparsify" in line and "30.4" in line for line in lines)
    assert any("profile" in line and "1.5" in line for line in lines), "a stage unknown to us"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"accuracy": 1}', b"\xff\xfe"])
def test_what_is_no_results_file_is_named(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "report.html").write_text("earlier")
    with pytest.raises(MaskSparsityError, match=re.escape(str(path))):
        report.write(tmp_path)
    assert (tmp_path / "report.html").read_text() == "earlier"


def test_missing_results_file_is_named(tmp_path):
    with pytest.raises(MaskSparsityError, match=r"results\.json"):
        report.write(tmp_path)
