"""The transformer: packed tokens in, velocities out. Imports no other room, only stdit.shapes and stdit.errors."""
