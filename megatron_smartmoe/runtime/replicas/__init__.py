"""Replicas on the ranks: spare slots, weights out and gradients home, the token split, and what was balanced."""
