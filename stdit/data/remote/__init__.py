"""Files wherever they lie (local, any fsspec URL, members of tar shards), as local ones. Imports no other room of
data."""
