"""Settings of every test run."""

from __future__ import annotations

import os
import signal

# Tiny tensors gain nothing from threads, and waiting threads slow down everything beside them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A run in the background of a shell inherits a Ctrl-C that is ignored.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch  # noqa: E402

torch.set_num_threads(1)

from hypothesis import settings  # noqa: E402

from tests.checkpoint_fixtures import (  # noqa: E402, F401
    copy_of,
    encoder,
    patched,
    patched_pipeline,
    pipeline,
    refused,
    run_command,
)

settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")
