"""Validation of the cost model and the planner against published runs."""
