"""The demo's report: one HTML file that opens offline, its Markdown twin, and the numbers as JSON."""

from transfer.report.results import Comparison, Curve, Picture, Report, TaskResult, compare, headline
from transfer.report.writing import write_report

__all__ = ["Comparison", "Curve", "Picture", "Report", "TaskResult", "compare", "headline", "write_report"]
