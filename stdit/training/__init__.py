"""A run: its config, its loop, its clips. Rooms: engine, objectives, setup, outputs. Only the commands import it."""
