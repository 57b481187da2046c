"""The simulator: a routing trace replayed through the planners that training runs and through the peers' rules."""
