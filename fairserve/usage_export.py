"""Usage by client and day as CSV: one line for each, with a heading."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from fairserve.views import UsageView


def as_csv(views: Iterable[UsageView]) -> str:
    """RFC 4180, lines ending with CRLF; the columns are the fields of the view."""
    text = io.StringIO()
    writer = csv.writer(text)
    names = tuple(UsageView.model_fields)
    writer.writerow(names)
    writer.writerows([[getattr(view, name) for name in names] for view in views])
    return text.getvalue()
