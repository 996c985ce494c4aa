"""The table of metrics, for people: ``python -m fairserve.observe.metrics`` prints it as Markdown.

The rows themselves are :mod:`fairserve.metric_table`, which the floors below may import.
"""

from __future__ import annotations

from collections.abc import Sequence

from fairserve.metric_table import BY_NAME, COMMON_LABEL, METRICS, OTHER, RAY_LABELS, SERVE_LABELS, Metric

__all__ = ["BY_NAME", "COMMON_LABEL", "METRICS", "OTHER", "RAY_LABELS", "SERVE_LABELS", "Metric", "markdown"]


def markdown(metrics: Sequence[Metric] = METRICS) -> str:
    """One row per metric; the text of ``deployments/monitoring/metrics.md``, which a test compares."""
    lines = [
        "| metric | kind | unit | labels | meaning | from |",
        "|---|---|---|---|---|---|",
    ]
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "-"
        lines.append(
            f"| `{metric.prometheus}` | {metric.kind} | {metric.unit} | {labels} | {metric.meaning} | {metric.source} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
