"""`stdit sample`."""
