"""Write the report, a Markdown page with figures and CSV files, from records alone."""

from peft_edge.report.page import write_report

__all__ = ["write_report"]
