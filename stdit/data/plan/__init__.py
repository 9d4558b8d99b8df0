"""A manifest to global steps and packs: shape buckets, filters, the plan, its split over ranks. Reads no file."""
