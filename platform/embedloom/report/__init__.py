"""What a run made: ``summary.json`` for programs, ``report.html`` for people, a table for the terminal."""

from embedloom.report.stage import write_report
from embedloom.report.table import summary_table

__all__ = ["summary_table", "write_report"]
