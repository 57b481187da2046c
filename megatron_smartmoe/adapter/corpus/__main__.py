"""`python -m megatron_smartmoe.adapter.corpus`: what scripts/prepare_data.py runs, and the launcher."""

import sys

from megatron_smartmoe.adapter.corpus.command import main

if __name__ == "__main__":
    sys.exit(main())
