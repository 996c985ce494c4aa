"""What the outside speaks: the OpenAI-compatible HTTP surface."""
