"""Replicas on the ranks: spare slots, the exchange of weights and gradients, the token split, and its balance."""
