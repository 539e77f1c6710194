"""From a figure to SVG text that lives inside a page.

Every colour is drawn as its light value and then replaced by a CSS variable, so that one SVG serves
a light and a dark page; text stays text, in the font of the page. The same figure gives the same
bytes.
"""

import re
from collections.abc import Callable
from io import StringIO
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure

# name: (light, dark). No two may share a light value: it is what tells them apart in the SVG.
PALETTE = {
    "page": ("#fdfdfc", "#15181c"),
    "ink": ("#1c2127", "#e5e8eb"),
    "muted": ("#69727d", "#97a1ac"),
    "rule": ("#e2e5e9", "#2c3239"),
    "pale": ("#cbd9e7", "#2d4257"),
    "strong": ("#1f5f9b", "#62a6e3"),
    "accent": ("#d8702a", "#f0955a"),
}
PAGE, INK, MUTED, RULE, PALE, STRONG, ACCENT = (light for light, _ in PALETTE.values())

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}


def svg(draw: Callable[[], Figure | None], salt: str) -> str | None:
    """What `draw` draws, as an `<svg>` element for a page that defines the palette as variables.

    Identifiers are derived from `salt`: another one for every figure keeps those of a page apart.
    """
    with style.context(STYLE | {"svg.hashsalt": salt}, after_reset=True):
        figure = draw()
        if figure is None:
            return None
        buffer = StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for name, (light, _) in PALETTE.items():
        text = text.replace(light, f"var(--{name})")
    return text
