"""Paths from noise to clip, noise levels, tasks, guidance and solvers. Knows no model: tensors in, tensors out."""
