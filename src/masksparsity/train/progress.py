"""Progress for a person to see: a bar on a terminal, now and then a line elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from masksparsity.train import dist

console = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """One line for the person watching, from process 0 only."""
    if dist.rank() == 0:
        console.print(escape(text), soft_wrap=True)


class Meter:
    """Counts `total` steps under `title`, with a text that changes along."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title = title
        self.total = total
        self.done = done
        self.spoke = time.monotonic()
        self.bar: Progress | None = None
        if console.is_terminal and dist.rank() == 0:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=console,
                transient=True,
            )
            self.task = self.bar.add_task(title, total=total, completed=done, text="")

    def advance(self) -> None:
        """One step is done."""
        self.done += 1
        if self.bar:
            self.bar.advance(self.task)

    def tell(self, text: str) -> None:
        """Show `text` beside the bar; without a terminal, as a line every few seconds."""
        if self.bar:
            self.bar.update(self.task, text=text)
        elif time.monotonic() - self.spoke > 5 or self.done == self.total:
            self.spoke = time.monotonic()
            say(f"{self.title}: {self.done}/{self.total}  {text}")

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar:
            self.bar.stop()
