"""Run one step: continuous batching over transformers' own model code."""
