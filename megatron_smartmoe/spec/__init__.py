"""Models, clusters, launches, placements, traces: dataclasses, read from files and checked where they are defined.

No torch, no Megatron.
"""
