"""Parts of `scripts/bench_train.py`: the variants, one rank of a run, what the model predicts, and the statistics."""
