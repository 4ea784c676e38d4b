"""Which LoRA configs have the delta ``scaling * B @ A``, or DoRA's; the rest is refused. What they hold beside the factors
is not judged here: see :mod:`dc_merge_peft.extras`.

The rules read a config as a mapping, so that a JSON file and a ``LoraConfig`` in memory meet the same ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dc_merge_peft.errors import SourceError, UnsupportedAdapterError

_EXTRACT = "merge it into its base model and extract a LoRA"
_TO_PLAIN = f"convert it to plain LoRA, or {_EXTRACT}"

# field: (what it means, what to do); refused where the field is set to anything but its "off" value.
_FEATURES: dict[str, tuple[str, str]] = {
    "layer_replication": ("layers that are used several times", _EXTRACT),
    "use_qalora": ("QALoRA, which pools its input", _TO_PLAIN),
    "use_bdlora": ("BD-LoRA, whose factors are block-diagonal", _TO_PLAIN),
    "alora_invocation_tokens": ("aLoRA, which acts on some tokens only", "it can't be a plain LoRA"),
    "arrow_config": ("Arrow routing, which picks adapters per token", "merge the routed adapters one by one"),
    "kasa_config": ("KaSA, whose delta has a third factor", _EXTRACT),
    "monteclora_config": ("MonteCLoRA, which samples its factors", _TO_PLAIN),
}

# Of them those that an empty mapping, which takes its defaults, switches on.
_SUB_CONFIGS = ("use_bdlora", "arrow_config", "kasa_config", "monteclora_config")

# Initialisations that take a part out of the base weights: the saved factors are relative to another base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


# Fields of LoRA configs that are known here, of PEFT up to 0.21 and of its first releases; what they mean is dealt with, or does not matter.
_KNOWN = frozenset(_FEATURES) | {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "enable_lora", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "merge_weights", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "target_parameters", "task_type", "trainable_token_indices", "use_dora", "use_rslora", "velora_config",
}  # fmt: skip


def unknown_fields(config: Mapping[str, Any]) -> list[str]:
    """Fields of a config file that are set and that nothing here knows, as a newer PEFT may write."""
    return sorted(name for name in config if name not in _KNOWN and not _is_off(config[name]))


def _is_off(value: Any) -> bool:
    return (
        value is None or value is False or (isinstance(value, Collection) and not isinstance(value, str) and not value)
    )


def refuse_unless_plain_lora(config: Mapping[str, Any], adapter: str) -> None:
    """Check one adapter's config.

    Raises:
        SourceError: the adapter is no LoRA at all.
        UnsupportedAdapterError: a LoRA whose delta is not ``scaling * B @ A`` on the stated base model.
    """
    kind = _plain(config.get("peft_type"))
    if kind != "LORA":
        convert = "; peft.convert_to_lora turns some kinds into LoRA" if kind else ""
        raise SourceError(f"adapter '{adapter}' has peft_type {kind or 'missing'}: expected LORA{convert}")
    if config.get("use_dora") and config.get("lora_bias"):
        raise UnsupportedAdapterError(
            f"adapter '{adapter}' has use_dora=True and lora_bias=True, for which PEFT's forward pass and its merged weight "
            "differ: expected one of them; train it with lora_bias=False"
        )
    for name, (meaning, remedy) in _FEATURES.items():
        value = config.get(name)
        if not _is_off(value) or (name in _SUB_CONFIGS and isinstance(value, Mapping)):
            raise UnsupportedAdapterError(
                f"adapter '{adapter}' has {name}={value!r}: {meaning}; expected plain LoRA, whose delta is "
                f"scaling * B @ A: {remedy}"
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise UnsupportedAdapterError(
            f"adapter '{adapter}' has init_lora_weights={init!r}: its factors are relative to a base model that this "
            "initialisation changed; expected factors relative to the base model: save it with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), which converts it"
        )


def dora_without_base(adapter: str) -> UnsupportedAdapterError:
    """The refusal of a DoRA adapter whose base model is not at hand."""
    return UnsupportedAdapterError(
        f"adapter '{adapter}' has use_dora=True: DoRA, whose delta is rescaled by a magnitude vector and depends on the base "
        f"model's weights; expected plain LoRA, whose delta is scaling * B @ A, or the base model beside it: name that "
        f"(base=..., --base), or {_TO_PLAIN}"
    )


def extras_without_policy(adapter: str, reason: str) -> UnsupportedAdapterError:
    """The refusal of an adapter that holds more than B and A where nobody has said what becomes of that."""
    return UnsupportedAdapterError(
        f"adapter '{adapter}' {reason}; or say what becomes of them: 'average', 'first', 'drop' or the name of one adapter "
        "(extras=..., --extras)"
    )


def refused_kinds() -> list[tuple[str, str, str]]:
    """``(what is refused, what it means, what to do)`` for every rule above and those on other kinds of adapters."""
    return [
        ("peft_type other than LORA", "another kind of adapter", "convert it with peft.convert_to_lora where PEFT can"),
        *((name, meaning, remedy) for name, (meaning, remedy) in _FEATURES.items()),
        (
            f"init_lora_weights of {', '.join(_CHANGES_BASE)}",
            "factors are relative to a base model that this initialisation changed",
            "save it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), which converts it",
        ),
    ]


def _plain(value: Any) -> str | None:
    """An enum's value, or the string itself."""
    return getattr(value, "value", value)
