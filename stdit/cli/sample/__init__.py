"""`stdit sample`: its options, its arguments, and the files that it writes."""
