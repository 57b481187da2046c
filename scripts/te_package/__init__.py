"""What `scripts/test_transformer_engine.sh` runs. Its name is not the package's, which it would hide from scripts."""
