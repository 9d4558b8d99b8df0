"""Turns a folder, a URL or tar shards into a manifest. Imports manifest, captions, remote, decode, measure, workers."""
