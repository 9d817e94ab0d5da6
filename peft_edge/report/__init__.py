"""The report: a page, figures and a data file, from records alone."""

from peft_edge.report.write import write_report

__all__ = ["write_report"]
