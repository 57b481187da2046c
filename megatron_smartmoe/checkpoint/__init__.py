"""Checkpoints as data: what is in their files, without torch and without running anything that a file says."""
