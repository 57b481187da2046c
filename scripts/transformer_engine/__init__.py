"""What `scripts/test_transformer_engine.sh` runs: this project's code for TransformerEngine on the real package."""
