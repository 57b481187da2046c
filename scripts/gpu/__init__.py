"""The first twelve minutes on a GPU: what `scripts/gpu_check.sh` runs."""
