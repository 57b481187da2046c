"""Where Megatron saves to."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

NON_PERSISTENT = "non_persistent"  # Megatron's folder, in --save and --load, for checkpoints that replace each other


def save_directory(args: Namespace, *, non_persistent: bool) -> Path | None:
    """Where Megatron saves to; None where that is not a folder that all ranks share."""
    directory = args.save
    if non_persistent:
        if args.non_persistent_ckpt_type != "global":
            return None
        directory = args.non_persistent_global_ckpt_dir or os.path.join(args.save, NON_PERSISTENT)
    return None if "://" in str(directory) else Path(directory)
