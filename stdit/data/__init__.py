"""From files to balanced packs of clips. Imports shapes, errors, keyed randomness and files, but no model."""
