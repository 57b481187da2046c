"""torch's flight recorder: NCCL's last operations on every rank, written when one of them times out.

torch records them by default and has no place to write them to but /tmp; here they go to the run directory, where
`torchfrtrace` reads them. gloo has none. It ends the job after `--distributed-timeout-minutes`; the watchdog's line
comes long before.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

FOLDER = "flight_recorder"
_EVENTS = "2000"  # torch's own default, today

# What is set unless the user has set it, under its present or under its former name.
_FORMER_NAMES = {
    "TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_FR_DUMP_TEMP_FILE": "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "TORCH_NCCL_DUMP_ON_TIMEOUT",
}


def write_to(run_dir: str | None, environ: MutableMapping[str, str] = os.environ) -> None:
    """Have NCCL's groups, which are made after this call, write their last operations to files of this directory.

    Args:
        run_dir: the run directory; None for none, which leaves everything to torch.
        environ: where torch looks it up.
    """
    if run_dir is None:
        return
    folder = Path(run_dir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {
        "TORCH_FR_BUFFER_SIZE": _EVENTS,
        "TORCH_FR_DUMP_TEMP_FILE": f"{folder.resolve()}/rank",  # torch appends the rank
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    for name, value in wanted.items():
        if not environ.keys() & {name, _FORMER_NAMES[name]}:
            environ[name] = value
