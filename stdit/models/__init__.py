"""The transformer: packed tokens in, velocities out. Imports shapes only."""
