"""What the methods of this library are called as combination types of PEFT's ``add_weighted_adapter``."""

from __future__ import annotations

from dc_merge_peft.methods import EVERY_METHOD

# Names of combination types that stay PEFT's own.
PEFT_TYPES = frozenset(
    {"svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd"}
    | {"magnitude_prune", "magnitude_prune_svd"}
)


def combination_types() -> dict[str, str]:
    """The combination types this library adds to ``add_weighted_adapter``, each with its method's name.

    Every method is one under its own name; where PEFT has a type of that name, which stays PEFT's, under the name with
    ``_dw``: it works on the entries of dW, where PEFT's works on those of A and B.
    """
    return {f"{name}_dw" if name in PEFT_TYPES else name: name for name in EVERY_METHOD}
