"""A manifest to global steps and packs: shape buckets, filters, sources, the plan, its split over ranks. Reads no
file."""
