"""What a run writes: averaged weights, samples, the model folder, metrics, progress. Imports the rooms before it."""
