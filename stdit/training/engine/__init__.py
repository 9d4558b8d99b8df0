"""How parameters are trained and kept: gradients, optimizer, ZeRO, checkpoints, averages. Knows no model; only
zero.py imports DeepSpeed."""
