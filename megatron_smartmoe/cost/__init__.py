"""Seconds and bytes: one cost model of layer, step and memory for planner, trainer and simulator. Pure numpy."""
