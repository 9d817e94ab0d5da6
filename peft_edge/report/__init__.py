"""The report: a Markdown page, its figures and CSV files, rendered from records alone."""

from peft_edge.report.page import write_report

__all__ = ["write_report"]
