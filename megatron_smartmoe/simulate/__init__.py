"""Replay a routing trace through placement rules: the same functions that train, the peers' beside them, one
yardstick."""
