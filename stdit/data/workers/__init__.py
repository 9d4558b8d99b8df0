"""Decoding in processes of their own: the pool in the parent, the child that decodes. Imports decode and measure; no
torch, no pyarrow."""
