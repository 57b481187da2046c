"""Decisions made again: what a run records of its start, and the replay that compares decision by decision."""
