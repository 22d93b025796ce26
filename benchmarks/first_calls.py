"""How long the first call of an operator takes in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

CHILD = """
import json, torch
torch.set_num_threads(1)
from retrofit.kernels import block_sparse_attention, neighborhood_attention
from retrofit.runtime.timing import timed
q = torch.randn(1, 1, 8192, 64)
mask = torch.rand(1, 1, 64, 64).argsort(-1) < 6
took = {}
for name, call in {
    "block-sparse": lambda: block_sparse_attention(q, q, q, mask, block_size=(128, 128)),
    "windows": lambda: neighborhood_attention(q, q, q, grid=(2, 64, 64), window_size=(2, 11, 11)),
}.items():
    took[name] = timed(call)[1]
print(json.dumps(took))
"""


def time_first_calls(cache: str) -> dict[str, float]:
    """Seconds of each operator's first call in a fresh process with this cache."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": cache,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-P", "-c", CHILD]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    took: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return took
