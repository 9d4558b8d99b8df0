"""What several commands share: lazy groups, progress bars, devices, output paths, number ranges."""
