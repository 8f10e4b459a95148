"""Measurements of llmhub-meter on one machine: `python -m benchmarks.overhead`."""
