"""Settings for every test: one thread a rank, no GPU seen by CPU tests, no time limit on a generated example."""

import os

from hypothesis import settings

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # two cores, several ranks; read when torch and numpy are imported
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
settings.register_profile("any machine", deadline=None)  # a busy one is slow, not wrong
settings.load_profile("any machine")
