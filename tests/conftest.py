"""Settings for every test: one torch thread a worker, no network, no colours."""

from __future__ import annotations

import os
import signal

# Before anything imports torch, transformers or rich. The suite runs on several workers, and threads inside each of them
# would fight over the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("NO_COLOR", "1")
os.environ.setdefault("COLUMNS", "120")

import torch

torch.set_num_threads(1)
# A shell starts what it puts in the background with interrupts ignored, and programs that the tests start would be so, too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
