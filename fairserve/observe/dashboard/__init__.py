"""The live dashboard: one page at /dashboard that draws what /admin/v1 says (:mod:`fairserve.views`)."""

from fairserve.observe.dashboard.serving import install

__all__ = ["install"]
