"""Pages of results, one HTML file each that opens offline, and the comparison of two arms over seeds."""

from transfer.report.comparison import Report, write_report
from transfer.report.page import Curve, Picture, render
from transfer.report.results import Comparison, TaskResult, compare, headline

__all__ = [
    "Comparison",
    "Curve",
    "Picture",
    "Report",
    "TaskResult",
    "compare",
    "headline",
    "render",
    "write_report",
]
