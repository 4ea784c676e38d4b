"""Files of words that say something odd: adapter configs, base configs, indexes, runs in YAML, and cards."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fuzz.damage import ANY_FILE, Mutation

DEEP: Any = []
for _ in range(300):
    DEEP = [DEEP]

EVIL = [
    r"(([a-z_.0-9]+)+)[!?]", r".*.*.*.*.*.*.*.*.*.*[!?]", r"(\w|\w\w|.)*[!?]", r"(?:.*?){50}[!?]", r"(.+)+\1[!?]", "(" * 3000, "[",
    r"(?:(?:(?:.?){999}){999}){999}[!?]", "a{99999999999}", "(?i)(q+)+!", "x" * 300_000,
]  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2.5, 1e308, 10**5, 10**9, 10**30, 2**63, float("nan"), float("inf"), -float("inf"), "", "x", "NaN", "none", "all",
    "\ud800", "\0", "a\nb", "../..", "/etc/passwd", "https://user:secret@host/x?token=abc", "\x1b[2J", "\u202egnp", "x" * 100_000, [], {},
    [None], [[]], [1, "a", None], ["query", "\ud800"], ["query"] * 1000, {"query": 2}, {"query": None}, {"": 1}, {"a": {"b": {}}},
    {"query": float("nan")}, {"query": 10**30}, {"query": "4"}, {"layers": [0]}, DEEP, *EVIL, *({pattern: 2} for pattern in EVIL),
    [EVIL[0]], {"query": -3}, {"query": True}, "LORA", "all-linear", [0, 1], {str(index): 1 for index in range(5000)},
]  # fmt: skip

ADAPTER = (
    "peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias", "lora_bias",
    "modules_to_save", "trainable_token_indices", "layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters",
    "fan_in_fan_out", "base_model_name_or_path", "revision", "task_type", "auto_mapping", "init_lora_weights", "layer_replication",
    "arrow_config", "use_qalora", "lora_dropout", "megatron_config", "inference_mode", "peft_version", "loftq_config", "corda_config",
)  # fmt: skip
BASE = (
    "model_type", "architectures", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "torch_dtype", "dtype", "hidden_act", "layer_norm_eps", "auto_map", "quantization_config", "num_labels",
    "id2label", "tie_word_embeddings", "transformers_version", "initializer_range", "pad_token_id", "type_vocab_size", "is_decoder",
)  # fmt: skip
RUN = (
    "adapters", "output", "weights", "method", "options", "rename", "svd_rank", "dtype", "device", "base", "dora_rank", "extras", "rho",
    "smoothing", "density", "alpha", "mask", "record", "models", "nonsense",
)  # fmt: skip


def _changed(values: dict[str, Any], fields: Sequence[str], chance: random.Random) -> dict[str, Any]:
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        values[chance.choice(fields)] = chance.choice(ODD)
    return values


def odd_adapter(file: Path, chance: random.Random) -> None:
    """Fields of an adapter's config."""
    file.write_text(json.dumps(_changed(json.loads(file.read_text()), ADAPTER, chance)))


def odd_base(file: Path, chance: random.Random) -> None:
    """Fields of a base model's config."""
    file.write_text(json.dumps(_changed(json.loads(file.read_text()), BASE, chance)))


def odd_json(file: Path, chance: random.Random) -> None:
    """JSON of another kind, of other letters, without end, or none."""
    text = file.read_text()
    key = chance.choice(["r", "vocab_size", "weight_map", "x"])
    contents: list[bytes] = [
        b"", b"null", b"[]", b"5", b'"x"', b"{}", b"[" * 200_000, b'{"a":' * 200_000, text.encode("utf-16"), text.encode("utf-8-sig"),
        text.encode()[:-2] + b', "x": "\xe9\xff"}', f'{{"{key}": {"9" * 5000}, {text.strip()[1:]}'.encode(), text.encode() + b"}",
        f'{{"{key}": 1e999999, {text.strip()[1:]}'.encode(), b" " * 11_000_000 + text.encode(), b"\0" * 1000,
        f'{text.strip()[:-1]}, "{key}": {{}}, "{key}": []}}'.encode(), b"'" + text.encode() + b"'",
        json.dumps({f"k{index}": index for index in range(300_000)}).encode(),
    ]  # fmt: skip
    file.write_bytes(chance.choice(contents))


def odd_index(file: Path, chance: random.Random) -> None:
    """Which weight file holds what, wrongly."""
    index = json.loads(file.read_text())
    names = index["weight_map"]
    kind = chance.randrange(5)
    name = chance.choice(list(names))
    if kind == 0:
        names[name] = chance.choice(
            [*ODD, "../adapter.safetensors", "/etc/passwd", "config.json", "missing.safetensors"]
        )
    elif kind == 1:
        index["weight_map"] = chance.choice(ODD)
    elif kind == 2:
        names[chance.choice(["x", "\ud800", "", "x" * 9999])] = names.pop(name)
    elif kind == 3:
        names[name] = chance.choice(sorted(set(map(str, names.values()))))
    else:
        index["metadata"] = chance.choice(ODD)
    file.write_text(json.dumps(index))


def odd_run(file: Path, chance: random.Random) -> None:
    """A run's YAML: other values, other kinds, aliases that grow, tags that would run code."""
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + level)}: &{chr(98 + level)} [{', '.join(['*' + chr(97 + level)] * 9)}]\n" for level in range(12)
    )
    merges = "a: &a {x: 1}\n" + "".join(
        f"{chr(98 + level)}: &{chr(98 + level)} {{<<: [{', '.join(['*' + chr(97 + level)] * 9)}], y{level}: 1}}\n"
        for level in range(9)
    )
    text = file.read_text()
    names = ["adapters", "output", "options", "weights", "extras", "record", "method"]
    contents = [
        f"{text}\n{bomb}{chance.choice(names)}: *m\n", f"{text}\n{merges}{chance.choice(names)}: *j\n", f"{text}\nrho: &r [*r]\n",
        f"{text}\nalpha: !!python/object/apply:os.system ['touch ran']\n", "[" * 5000, "{a: " * 2000, "a\n- b", "\t", "- x", "5", "",
        "? [1, 2]\n: x", f"{text}\n1: 2\n", f"{text}\n[1]: 2\n", f"{text}\nnull: 3\n", "x: '" + "a" * 3_000_000 + "'", "%YAML 9.9\n---\nx",
        f"{text}---\n{text}", f"{text}\nmethod: dc\n", text.replace("dc", "\x07"), f"{text}\ndate: 2001-01-01\n", f"{text}\nrho: .nan\n",
        f"{text}\nsvd_rank: 0x7fffffffffffffffffff\n", f"{text}\nweights: [1, .inf]\n", f"{text}\nrho: !!binary aGFsbG8=\n",
        f"{text}\nsvd_rank: 1_000:59:59\n", f"{text}\noutput: !!set {{a, b}}\n",
    ]  # fmt: skip
    if chance.random() < 0.5:
        value = json.dumps(chance.choice(ODD))
        file.write_text(f"{text}\n{chance.choice(RUN)}: {value if len(value) < 10_000 else value[:9000]}\n")
    else:
        file.write_text(chance.choice(contents))


def odd_card(file: Path, chance: random.Random) -> None:
    """The block of metadata on a model card."""
    blocks = [
        "a: &a [x,x]\nb: &b [*a,*a]\nlicense: *b",
        "[" * 20_000,
        "license: {a: b}",
        "license: [[]]",
        "\0",
        "x: !!python/name:os.system",
    ]
    file.write_text(f"---\n{chance.choice(blocks)}\n---\n" + "x" * chance.choice([0, 10**6]))


CONFIG: tuple[Mutation, ...] = (odd_adapter,) * 8 + (odd_json, *ANY_FILE)
BASE_CONFIG: tuple[Mutation, ...] = (odd_base,) * 6 + (odd_json, odd_json, *ANY_FILE)
INDEX: tuple[Mutation, ...] = (odd_index,) * 4 + (odd_json, *ANY_FILE)
YAML: tuple[Mutation, ...] = (odd_run,) * 8 + ANY_FILE
CARD: tuple[Mutation, ...] = (odd_card, *ANY_FILE)
