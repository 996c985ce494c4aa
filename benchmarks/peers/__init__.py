"""Our engine beside others that serve the same model on the same machine. ``__main__.py`` says how."""
