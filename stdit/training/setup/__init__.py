"""From a run's config to its parts: models, starting weights, adapters, plan, memory. Imports config, objectives and
engine."""
