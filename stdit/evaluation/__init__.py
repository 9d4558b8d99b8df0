"""Metrics on tensors, the harness that wires them to a pipeline, and the run's report. Imports sampling and what it
imports."""
