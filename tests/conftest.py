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
# A shell's background and nohup start programs with these signals ignored, and what the tests start would ignore them, too.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (getattr(signal, "SIGHUP", None), signal.SIG_DFL)):
    if number is not None and signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)
