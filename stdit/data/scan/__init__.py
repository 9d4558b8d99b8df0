"""A folder, a URL or tar shards to a manifest. Imports manifest, captions, remote, decode, measure and workers."""
