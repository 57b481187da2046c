"""The search for better placements: moves, the cuts that bound them, and the objective."""
