"""The report of a run: one HTML page to look at, one table for the terminal."""

from masksparsity.report.page import write
from masksparsity.report.terminal import table

__all__ = ["table", "write"]
