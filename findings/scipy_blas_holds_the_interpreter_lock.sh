#!/usr/bin/env bash
# SciPy 1.17.1: products by scipy.linalg.blas (ssyrk, sgemm) hold the interpreter's lock for as long as they run; NumPy's
# products on the same BLAS let other threads go on.
#
# Statistics of several inputs taken on threads, each with one BLAS thread, run one after another as soon as they use the
# symmetric update, which does half the work of a product and is the natural call for a Gram matrix.
#
# Valid input: products of 3000 x 3000 in one thread, while another counts how often it wakes from naps of 2 ms. Seen:
#   numpy matmul: awake some 90 % of the time     scipy ssyrk, sgemm: not at all until the product is done
# Exits 0 while this holds, 1 once it changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q --disable-pip-version-check "scipy==1.17.1" "numpy==1.26.4"
OPENBLAS_NUM_THREADS=1 "$place/venv/bin/python" - <<'P'
import sys
import threading
import time

import numpy as np
import scipy
from scipy.linalg import blas


def longest_wait(work):
    """Seconds that this thread was kept from waking, as a share of those that `work` takes in another."""
    done, gaps = threading.Event(), [0.0]
    began = last = time.perf_counter()
    threading.Thread(target=lambda: (work(), done.set())).start()
    while not done.is_set():
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
        time.sleep(0.002)
    gaps.append(time.perf_counter() - last)
    return max(gaps) / (time.perf_counter() - began)


matrix = np.ones((3000, 3000), np.float32)
total = np.zeros((3000, 3000), np.float32, order="F")
share = {
    "numpy matmul": longest_wait(lambda: [matrix @ matrix for _ in range(4)]),
    "scipy ssyrk": longest_wait(lambda: blas.ssyrk(1.0, matrix, beta=1.0, c=total, overwrite_c=1)),
    "scipy sgemm": longest_wait(lambda: blas.sgemm(1.0, matrix.T, matrix.T)),
}
for name, waited in share.items():
    print(f"SciPy {scipy.__version__}, NumPy {np.__version__}, {name}: longest wait {waited:.0%} of the product's time")
sys.exit(not (share["numpy matmul"] < 0.5 < min(share["scipy ssyrk"], share["scipy sgemm"])))
P
