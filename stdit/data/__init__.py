"""From files to balanced packs of clips. Imports shapes, errors, keyed randomness and files; no model."""
