"""How parameters are trained and kept: gradients, optimizer, ZeRO, checkpoints, averages. Knows no model; only
engine.py imports DeepSpeed."""
