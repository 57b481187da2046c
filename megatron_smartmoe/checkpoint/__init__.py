"""Checkpoints as data: manifests, digests and readers, without torch and without running anything that a file says."""
