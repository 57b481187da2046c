"""`python -m megatron_smartmoe.adapter.launch`."""

import sys

from megatron_smartmoe.adapter.launch.launcher import main

if __name__ == "__main__":
    sys.exit(main())
