"""A tokenizer and a LLaVA processor for tiny models, so that examples run as people write them: text in, text out."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from tests.support.models import VOCAB

IMAGE = "<image>"
WORDS = "<s> </s> <unk> user assistant what is in the picture a square circle write function that adds two numbers"
# The chat template that llava-hf's processors have, in its shape.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE + " {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
)


def tokenizer(*, image: bool = False) -> PreTrainedTokenizerFast:
    """Whole words, ``VOCAB`` of them; with ``image`` the last one stands for a piece of a picture."""
    words = [*WORDS.split(), *(f"word{index}" for index in range(VOCAB))][: VOCAB - image] + [IMAGE] * image
    made = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    named: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    named["model_input_names"] = ["input_ids", "attention_mask"]  # as that of Llama has them
    return PreTrainedTokenizerFast(tokenizer_object=made, additional_special_tokens=[IMAGE] if image else None, **named)


def llava_processor() -> LlavaProcessor:
    """For the tiny LLaVA: pictures of 8 x 8 pixels in 4 patches."""
    pictures = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        pictures,
        tokenizer(image=True),
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
