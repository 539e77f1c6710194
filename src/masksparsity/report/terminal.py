"""The table at the end of a run."""

from rich.table import Table
from rich.text import Text

from masksparsity.report.results import HEAD, Results, rows, summary, title


def table(results: Results) -> Table:
    """Accuracy, cost and time of every stage, under one sentence that says what came out."""
    # Names come from files and people: `Text`, so that rich reads no markup in them.
    out = Table(title=Text(title(results)), caption=Text(summary(results)), caption_justify="left")
    for name in HEAD:
        out.add_column(name, justify="left" if name == "stage" else "right")
    for row in rows(results):
        out.add_row(*map(Text, row))
    return out
