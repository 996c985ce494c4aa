"""Fair, multi-tenant LLM serving on Ray Serve."""

__version__ = "0.1.0"
