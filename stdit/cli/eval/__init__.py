"""`stdit eval …`: toy, captions, vae."""
