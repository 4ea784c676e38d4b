"""What older versions of the dependencies can't do: the package refuses it there, and the tests of it are skipped."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from huggingface_hub import constants
from torch.torch_version import TorchVersion

from dc_merge_peft.sources.files import SAFE_PICKLES

# Version 5 of transformers has experts as parameters.
V5 = int(transformers.__version__.split(".")[0]) >= 5

# For comparisons with text, as PEFT < "0.19".
PEFT = TorchVersion(peft.__version__)
TRANSFORMERS = TorchVersion(transformers.__version__)

# A full model is read tensor by tensor only where transformers tells how, as it does since version 5.6.
STREAMS = TRANSFORMERS >= "5.6"
needs_v5 = pytest.mark.skipif(not STREAMS, reason="older transformers does not say how it names what it loads")

# An older PyTorch can't read pickles safely, and then they are refused.
needs_safe_pickles = pytest.mark.skipif(torch.__version__ < SAFE_PICKLES, reason="pickles are refused as a whole")

# The loopback Hub speaks with the client of today.
needs_hub_client = pytest.mark.skipif(
    not hasattr(constants, "HF_URL_HOSTS"), reason="the loopback Hub speaks with a newer client"
)
