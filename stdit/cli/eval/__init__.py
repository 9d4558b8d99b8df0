"""`stdit eval …`: captions, vae, toy."""
