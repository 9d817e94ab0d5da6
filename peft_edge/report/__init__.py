"""Write the report: a Markdown page with figures and CSV files, computed only from JSON records."""

from peft_edge.report.page import write_report

__all__ = ["write_report"]
