"""Catalogue, semantic IDs, model and the continuous trainer."""

import os

# OpenMP's threads spin at barriers by default. Beside Triton, a replay or a second run on the same cores that made a step
# 50 times slower (measured: 1 step against 50 in 45 s at load 7 on 2 cores); must be set before torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
