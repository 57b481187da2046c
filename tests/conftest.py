"""Settings for every test: one thread a rank, no GPU seen by CPU tests."""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # two cores, several ranks; read when torch and numpy are imported
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
