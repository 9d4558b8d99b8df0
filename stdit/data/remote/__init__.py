"""Files from anywhere (local, any fsspec URL, inside tar shards) as local files. Imports no other room of data."""
