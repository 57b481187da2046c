"""Megatron and nothing else: the only package of the project that imports it."""
