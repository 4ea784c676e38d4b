"""Tiny random models of several architectures, and LoRA adapters on them, in memory and on disk.

Names of adapters must not be contained in "lora_" (PEFT warns about them), so they are words here; nor in names of modules, as
"code" is in "encoder": older PEFT then saves all adapters as that one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

VOCAB = 40
IDS = torch.tensor([[1, 5, 9, 2, 30, 7]])


def seeded(build: Any, seed: int) -> Any:
    """What ``build`` makes under a seed of its own, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def bert(seed: int = 0, kind: type[PreTrainedModel] = BertModel) -> Any:
    """A BERT of two layers, width 16: linear layers, no head unless ``kind`` has one."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=VOCAB, max_position_embeddings=32, **sizes)  # type: ignore[arg-type]
    return seeded(lambda: kind(config), seed)


def bert_classifier(seed: int = 0) -> Any:
    """The same BERT under a classification head, so that its paths begin with ``bert.``."""
    return bert(seed, BertForSequenceClassification)


def gpt2(seed: int = 0, *, tied: bool = True) -> Any:
    """A GPT-2 of two layers, width 16: its ``Conv1D`` layers store weights as (in, out)."""
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return seeded(lambda: GPT2LMHeadModel(config), seed)


def llama(seed: int = 0, *, width: int = 16, layers: int = 2) -> Any:
    """A Llama with grouped key and value heads."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=3 * width // 2, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return seeded(lambda: LlamaForCausalLM(config), seed)


def resized(model: Any, tokens: int) -> Any:
    """The model with a vocabulary of another size; the new rows are zero."""
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(tokens, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight.data[VOCAB:] = 0
    return model


class Block(nn.Module):
    """Two linear layers with a name that also occurs further up."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 12)
        self.out = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.fc(x)))


class Patches(nn.Module):
    """Embedding, Conv2d and Linear layers; ``fc`` is also the end of ``blk.fc``."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, 8)
        self.conv = nn.Conv2d(1, 6, (3, 2), padding=(1, 0), stride=(1, 2))
        self.mix = nn.Conv2d(6, 3, 1)
        self.fc = nn.Linear(12, 12)
        self.blk = Block()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.mix(torch.tanh(self.conv(self.tokens(ids)[:, None])))  # (batch, 3, tokens, 4)
        return self.blk(torch.tanh(self.fc(x.permute(0, 2, 1, 3).flatten(2))))


def patches(seed: int = 0) -> Any:
    """A plain torch module with an embedding and convolutions."""
    return seeded(Patches, seed)


def output(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """Logits or hidden states, whichever the model gives."""
    with torch.no_grad():
        result = model(ids)
    if isinstance(result, Tensor):
        return result
    return result.logits if "logits" in result else result.last_hidden_state


def randomize(model: nn.Module, adapter: str, seed: int, scale: float = 0.3) -> None:
    """Fill every LoRA factor of an adapter with normal numbers, lora_B too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and adapter in name.split("."):
            values = torch.randn(parameter.shape, generator=generator) * scale
            parameter.data.copy_(values.to(parameter.dtype))


def with_lora(model: Any, adapters: Mapping[str, Mapping[str, Any]], *, seed: int = 10) -> Any:
    """The model with one random LoRA adapter for each name, made by PEFT from these config fields."""
    wrapped = model if isinstance(model, PeftModel) else None
    for offset, (name, fields) in enumerate(adapters.items()):
        config = LoraConfig(**fields)
        if wrapped is None:
            wrapped = get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
        randomize(wrapped, name, seed + offset)
    assert wrapped is not None
    return wrapped.eval()


def save_adapters(model: PeftModel, folder: Path, names: Iterable[str] | None = None) -> list[Path]:
    """Each adapter in a directory of its own, by PEFT's ``save_pretrained``, without base weights of embeddings."""
    chosen = list(names or model.peft_config)
    model.save_pretrained(str(folder), selected_adapters=chosen, save_embedding_layers=False)
    return [folder / name for name in chosen]


def layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    """The LoRA layers of an adapter by their path in the base model."""
    found = {}
    for name, module in model.named_modules():
        held = isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A)
        if held:
            found[name.removeprefix("base_model.model.").replace(".base_layer", "")] = module
    return found


def delta(layer: Any, adapter: str) -> Tensor:
    """PEFT's own weight delta of one layer as (outputs, inputs): the oracle for what was read or written."""
    weight = layer.get_delta_weight(adapter).detach()
    base = layer.get_base_layer()
    transposed = type(base).__name__ == "Conv1D" or isinstance(base, nn.Embedding)
    return (weight.mT if transposed else weight.flatten(1)).contiguous()


def deltas(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """All deltas of one adapter by module path."""
    return {name: delta(layer, adapter) for name, layer in layers(model, adapter).items()}


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def factors(m: int, n: int, r: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random (lora_A, lora_B)."""
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(r, n, generator=generator), torch.randn(m, r, generator=generator)
    return A.to(dtype), B.to(dtype)


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor] | None = None, **fields: Any) -> Path:
    """A raw adapter directory: ``adapter_config.json`` of ``fields`` beside these tensors, without PEFT.

    ``target_modules`` are the last parts of the modules' names, unless given.

    Without tensors it holds one module, ``enc.q`` of shape (6, 5) and rank 2.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        A, B = factors(6, 5, 2, seed=sum(map(ord, folder.name)))
        tensors = {"base_model.model.enc.q.lora_A.weight": A, "base_model.model.enc.q.lora_B.weight": B}
    paths = {re.split(r"\.lora_(?:embedding_)?[AB]\b", key)[0] for key in tensors}
    targets = sorted({path.rpartition(".")[2] for path in paths})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets, **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    return folder
