"""The layer: project, attend, project; checks, plans, weights, what the native layers share."""
