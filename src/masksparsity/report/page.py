"""One self-contained page: the result in a sentence, the table, the figures, how it was made."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from html import escape
from pathlib import Path

from masksparsity.errors import MaskSparsityError
from masksparsity.files import atomic
from masksparsity.report.figures import PLOTS, Draw, accuracy_over_runs, layers
from masksparsity.report.results import (
    HEAD,
    Results,
    change,
    count,
    number,
    pair,
    percent,
    read,
    rows,
    shown,
    summary,
    title,
)
from masksparsity.report.svg import PALETTE, svg

CSS = """
*{box-sizing:border-box}
body{margin:0 auto;max-width:1160px;padding:3rem 1.5rem;background:var(--page);color:var(--ink);
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{margin:0;font-size:2rem;font-weight:650;letter-spacing:-.02em}
h2{margin:0;font-size:1.05rem;font-weight:600}
.lead{max-width:58rem;margin:.5rem 0 2rem;font-size:1.1rem;color:var(--muted);text-wrap:pretty}
.tiles{display:flex;flex-wrap:wrap;gap:1rem 2.75rem;margin:0 0 2rem}
.tiles div{display:flex;flex-direction:column-reverse}
.tiles dt{color:var(--muted);font-size:.85rem}
.tiles dd{margin:0;font-size:1.6rem;font-weight:600;color:var(--strong);letter-spacing:-.01em}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem 0 .35rem 2.2rem;text-align:right;white-space:nowrap;
 border-bottom:1px solid var(--rule)}
th{font-weight:500;color:var(--muted)}
th:first-child,td:first-child{padding-left:0;text-align:left}
.warning{margin:1.5rem 0 0;padding:.2rem 0 .2rem 1rem;border-left:3px solid var(--accent)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));
 gap:3rem 2.5rem;margin:3rem 0}
figure{margin:0;min-width:0}
.wide{grid-column:1/-1;overflow-x:auto}
.wide svg{min-width:44rem}
figcaption,summary,footer{color:var(--muted);font-size:.9rem}
svg{display:block;width:100%;height:auto;margin-top:.75rem}
svg text{font-family:inherit!important}
summary{margin:.75rem 0;cursor:pointer}
footer{padding-top:1.5rem;border-top:1px solid var(--rule)}
footer dl{margin:0}
footer div{display:grid;grid-template-columns:7rem 1fr}
footer dd{margin:0;color:var(--ink);overflow-wrap:anywhere}
"""


def write(run_dir: Path) -> Path:
    """Draw `run_dir/results.json` as `run_dir/report.html`, whole or not at all.

    Runs on the same data in sibling directories join the figures that compare runs.
    """
    results = read(run_dir / "results.json")
    path = run_dir / "report.html"
    atomic.write(path, _page(results, _runs(run_dir.resolve(), results)).encode())
    return path


def _runs(run_dir: Path, results: Results) -> dict[str, Results]:
    """This run, then its siblings on the same data; one that cannot be read is left out."""
    runs = {run_dir.name: results}
    for path in sorted(run_dir.parent.glob("*/results.json")):
        try:
            other = read(path)
        except MaskSparsityError:
            continue
        if other.get("dataset") == results.get("dataset"):
            runs.setdefault(path.parent.name, other)
    return runs


def _page(results: Results, runs: Mapping[str, Results]) -> str:
    name = escape(title(results))
    light, dark = (
        "".join(f"--{colour}:{both[theme]};" for colour, both in PALETTE.items())
        for theme in (0, 1)
    )
    warnings = "".join(
        f'<p class="warning">{escape(str(w))}</p>' for w in results.get("warnings", [])
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name} · masksparsity</title>
<style>
:root{{{light}}}
@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{CSS}</style>
</head>
<body>
<h1>{name}</h1>
<p class="lead">{escape(summary(results))}</p>
<dl class="tiles">{_definitions(_tiles(results))}</dl>
{_table(HEAD, rows(results))}
{warnings}
<div class="figures">
{_figures(results, runs)}
</div>
<footer><dl>{_definitions(_origin(results))}</dl></footer>
</body>
</html>
"""


def _tiles(results: Results) -> dict[str, str]:
    """The numbers that one remembers, to be set large."""
    tiles = {
        name: change(*both)
        for key, name in (("macs", "MACs"), ("params", "parameters"), ("latency_ms", "latency"))
        if (both := pair(results, key))
    }
    dense, slim = (number(results, "accuracy", key) for key in ("baseline", "finetuned"))
    if dense is not None and slim is not None:
        tiles["accuracy, dense and slim"] = f"{100 * dense:.2f} → {percent(slim)}"
    before, after = (number(results, "correct", f"{when}_removal") for when in ("before", "after"))
    if before is not None and after is not None:
        tiles["images right across removal"] = f"{before:.0f} → {after:.0f}"
    return tiles


def _origin(results: Results) -> dict[str, str]:
    """How to make the same numbers again."""
    versions = results.get("versions", {})
    origin = {
        "hardware": results.get("device"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "seed": results.get("seed"),
        "command": results.get("command"),
    }
    return {name: str(value) for name, value in origin.items() if value not in (None, "")}


def _figures(results: Results, runs: Mapping[str, Results]) -> str:
    """Every figure that has something to show; under those with many names, the names."""
    tables: dict[Draw, str] = {
        layers: _layer_table(results),
        accuracy_over_runs: _run_table(runs),
    }
    out = []
    for plot in PLOTS:
        drawn = svg(partial(plot.draw, results, runs), salt=plot.heading)
        if drawn is None:
            continue
        out += [
            '<figure class="wide">' if plot.wide else "<figure>",
            f"<h2>{plot.heading}</h2><figcaption>{plot.caption}</figcaption>{drawn}",
        ]
        if plot.draw in tables:
            out.append(f"<details><summary>in numbers</summary>{tables[plot.draw]}</details>")
        out.append("</figure>")
    return "\n".join(out)


def _layer_table(results: Results) -> str:
    body = [
        (str(layer["name"]), str(layer["dense"]), str(layer["kept"]))
        for layer in results.get("layers", [])
    ]
    return _table(("layer", "dense", "kept"), body)


def _run_table(runs: Mapping[str, Results]) -> str:
    columns: dict[str, tuple[str, str, Callable[[float], str]]] = {
        "accuracy": ("accuracy", "finetuned", percent),
        "MACs": ("macs", "slim", count),
        "parameters": ("params", "slim", count),
        "latency, ms": ("latency_ms", "slim", "{:.3g}".format),
    }
    body = []
    for name, run in runs.items():
        values = [(number(run, *keys), text) for *keys, text in columns.values()]
        body.append([name, *(shown(value, text) for value, text in values)])
    return _table(("run", *columns), body)


def _table(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    def row(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = [row(head, "th"), *(row(cells, "td") for cells in body)]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _definitions(entries: Mapping[str, str]) -> str:
    return "".join(
        f"<div><dt>{escape(term)}</dt><dd>{escape(text)}</dd></div>"
        for term, text in entries.items()
    )
