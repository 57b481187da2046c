"""The rehearsal as a process that sees no GPU: a pickled request on stdin, a pickled verdict on stdout."""

import os
import pickle
import sys

from megatron_smartmoe.adapter.pretrain import choose_device


def main() -> None:
    """Read, judge, answer. What Megatron prints goes to stderr."""
    answer = os.dup(1)
    os.dup2(2, 1)
    request = pickle.loads(sys.stdin.buffer.read())
    choose_device("cpu")
    from megatron_smartmoe.adapter.rehearsal.judge import judge

    with os.fdopen(answer, "wb") as stream:
        stream.write(pickle.dumps(judge(request)))


if __name__ == "__main__":
    main()
