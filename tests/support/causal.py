"""A causal language model and a tokenizer so small that tests can train them."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "\n abcdefghijklmnopqrstuvwxyz:"


def tiny_model() -> Any:
    """A Llama of two layers with random weights."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, bos_token_id=None, eos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer() -> Any:
    """One token a letter."""
    made = Tokenizer(WordLevel({letter: number for number, letter in enumerate(LETTERS)} | {"?": 31}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")
