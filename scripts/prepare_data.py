#!/usr/bin/env python3
"""Turn text into a dataset for Megatron; see --help. The code is in megatron_smartmoe/adapter/corpus/."""

import sys

from megatron_smartmoe.adapter.corpus.command import main

if __name__ == "__main__":
    sys.exit(main())
