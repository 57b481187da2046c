"""What `scripts/test_transformer_engine.sh` runs. Not named after the package: scripts find each other by their folder."""
