"""The diagonal Fisher information of a model's weights: what Fisher merging asks of each task's data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dc_merge_peft.errors import OptionError, SourceError
from dc_merge_peft.linalg import without_autocast
from dc_merge_peft.methods.data import Statistics
from dc_merge_peft.statistics.batches import (
    Forward,
    call,
    checked_count,
    evaluating,
    inputs_of,
    labels_of,
    nothing_seen,
)
from dc_merge_peft.statistics.owner import delta_norms
from dc_merge_peft.statistics.watching import Watched, recording, refuse_spoilt, refuse_unseen, watched

Labels = Literal["sampled", "all", "given"]
RULES: dict[str, str] = {
    "sampled": "squared gradients of each example's log-likelihood of a label drawn from the model's own prediction",
    "all": "squared gradients of each example's log-likelihood, in expectation over the model's own prediction",
    "given": "squared gradients of each example's log-likelihood of its given label (empirical Fisher)",
    "loss": "squared gradients of each example's loss",
}
# Passes of one layer in one batch: inputs (examples, .., n) and outputs (examples, .., m), in the order of their positions.
Passes = list[tuple[Tensor, Tensor]]


def fisher(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    modules: Sequence[str] | None = None,
    labels: Labels = "sampled",
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    forward: Forward = call,
    examples: int | None = None,
    seed: int = 0,
) -> Statistics:
    """``F = 1/N sum_x (d log p(y | x) / dW)^2`` of every layer's whole weight ``W = W_0 + dW``, entry by entry, over N examples.

    Which labels y: ``"sampled"`` draws one an example from the model's own prediction, an unbiased estimate of the Fisher information
    at the cost of one backward pass; ``"all"`` takes the expectation over all classes, exactly, a backward pass a class, as
    the published code of Matena & Raffel does; ``"given"`` takes those of the data, which makes the *empirical* Fisher. Gradients are squared example by example, not
    batch by batch: a layer's gradient for one example is ``sum_t g_t a_t^T`` over its positions t, from inputs a and the gradients
    g by the outputs, and no gradient of a parameter is computed.

    Args:
        model: The task's own fine-tuned model: a PEFT model whose one active adapter is the task's, or any model.
        dataloader: The task's examples in batches, as for :func:`input_grams`. Every tensor has its examples in the first dimension.
        modules: Paths of layers, or their trailing parts; by default the layers of the active adapter.
        labels: Whose log-likelihood.
        loss: In the place of logits and labels: the (examples,) negative log-likelihoods of a batch, such as :func:`next_token_loss`.
        forward: The (examples, classes) logits of a batch, or an output that has them as ``logits``; by default that of the model.
        examples: At most so many, to the nearest whole batch above; by default all.
        seed: Of the labels that are drawn.

    Returns:
        A float32 (m, n) matrix a layer, on the CPU.

    Raises:
        OptionError: no examples, labels, logits or losses of the wrong form, unknown modules, layers that nothing goes through, or that see
            more rows than there are examples.
        SourceError: NaN in the logits, or NaN or Inf in the gradients.
        UnsupportedAdapterError: a layer that is neither Linear, Conv1D nor a convolution.
    """
    if labels not in ("sampled", "all", "given"):
        raise OptionError(f"labels is {labels!r}: expected 'sampled', 'all' or 'given'")
    most, layers = checked_count(examples), watched(model, modules)
    sums: dict[str, Tensor] = {}
    passes: dict[str, Passes] = {}
    generator = torch.Generator().manual_seed(seed)

    def see(path: str, x: Tensor, output: Tensor) -> Tensor:
        # Its own copy, and another one for the model: either may be written to on the way.
        kept = output if output.requires_grad else output.detach().requires_grad_()
        passes.setdefault(path, []).append((layers[path].rows(x.detach().clone()), kept))
        return kept.clone()

    seen = 0
    with torch.enable_grad(), evaluating(model, dataloader) as batches, recording(layers, see):
        for batch in batches:
            passes.clear()
            terms = losses(model, batch, loss, forward, labels, generator)
            for index, term in enumerate(terms):
                if index == 0:
                    seen += len(term)
                add_squares(sums, layers, passes, term)
            if most is not None and seen >= most:
                break
    if not seen:
        raise nothing_seen()
    refuse_unseen(layers, set(sums))
    found = {path: (sums[path] / seen).to("cpu", torch.float32) for path in layers}
    for path, F in found.items():
        refuse_spoilt(path, F)
    rule = RULES["loss" if loss is not None else labels]
    return Statistics("fisher", found, seen, rule, delta_norms=delta_norms(model, layers))


def losses(
    model: nn.Module,
    batch: Any,
    loss: Callable[[nn.Module, Any], Tensor] | None,
    forward: Forward,
    labels: Labels,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """(examples,) negative log-likelihoods, each by itself to be differentiated and squared: their squares add up.

    Raises:
        OptionError: logits or losses of another form.
        SourceError: logits that are NaN.
    """
    if loss is not None:
        found = loss(model, batch)
        if not isinstance(found, Tensor) or found.ndim != 1:
            raise OptionError(
                f"loss gave {describe(found)}: expected one number an example, (examples,), not their mean; use reduction='none'"
            )
        yield found
        return
    output = forward(model, batch)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise OptionError(
            f"the model gave {describe(logits if logits is not None else output)} for logits: expected (examples, classes); give forward= "
            "a function that gives them, or loss=, such as next_token_loss for a causal language model"
        )
    likelihoods = logits.float().log_softmax(dim=1) if logits.dtype != torch.float64 else logits.log_softmax(dim=1)
    if bool(likelihoods.isnan().any()):
        raise SourceError(
            "the model's logits hold NaN: expected finite ones; compute in float32 or bfloat16, and look for damaged examples"
        )
    if labels == "all":
        weights = likelihoods.detach().exp().sqrt()  # their squares are the probabilities
        for label in range(likelihoods.shape[1]):
            yield -likelihoods[:, label] * weights[:, label]
        return
    if labels == "given":
        chosen = labels_of(batch).to(likelihoods.device)
        if chosen.shape != likelihoods.shape[:1] or chosen.is_floating_point():
            raise OptionError(
                f"found labels of shape {tuple(chosen.shape)}, {chosen.dtype}, for {len(likelihoods)} examples: expected one whole "
                "number an example; give loss= for other tasks"
            )
    else:
        # On the CPU, so that the same seed draws the same labels everywhere.
        chosen = torch.multinomial(likelihoods.detach().exp().cpu(), 1, generator=generator)[:, 0].to(
            likelihoods.device
        )
    yield -likelihoods.gather(1, chosen[:, None])[:, 0]


def add_squares(
    sums: dict[str, Tensor], layers: Mapping[str, Watched], passes: Mapping[str, Passes], losses: Tensor
) -> None:
    """Add every example's squared gradient by every layer's weight; a layer that is passed more than once has one gradient.

    Raises:
        OptionError: a layer's rows are not those of the examples, or the loss does not depend on the layers.
    """
    outputs = [output for found in passes.values() for _, output in found]
    if not outputs or not losses.requires_grad:
        raise OptionError(
            "the loss does not depend on any of the layers: expected a loss of the model's output, computed with gradients"
        )
    gradients = iter(torch.autograd.grad(losses.sum(), outputs, retain_graph=True, allow_unused=True))
    for path, found in passes.items():
        pairs = [(rows, g, output) for (rows, output), g in zip(found, gradients, strict=False)]
        if path not in sums:
            device, dtype = pairs[0][2].device, torch.promote_types(pairs[0][2].dtype, torch.float32)
            sums[path] = torch.zeros(layers[path].shape, dtype=dtype, device=device)
        by_example = [aligned(path, layers[path], rows, g, len(losses)) for rows, g, _ in pairs if g is not None]
        with without_autocast(sums[path].device):
            for example in range(len(losses) if by_example else 0):
                # sum_t g_t a_t^T, (m, n)
                gradient = torch.stack([g[example].mT @ a[example] for a, g in by_example]).sum(dim=0)
                sums[path].addcmul_(gradient, gradient)


def aligned(path: str, layer: Watched, rows: Tensor, g: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Inputs and gradients of one pass by example and position: (examples, positions, n) and (examples, positions, m).

    Raises:
        OptionError: the examples are not in the first dimension.
    """
    if count > 1 and len(rows) != count:
        raise OptionError(
            f"'{path}' sees {len(rows)} rows for {count} examples: expected the examples in the first dimension; give a dataloader with "
            "one example a batch"
        )
    dtype = torch.promote_types(g.dtype, torch.float32)
    m, n = layer.shape
    return rows.reshape(count, -1, n).to(dtype), layer.gradients(g).reshape(count, -1, m).to(dtype)


def next_token_loss(model: nn.Module, batch: Any) -> Tensor:
    """Negative log-likelihoods of whole texts, for :func:`fisher` with a causal language model: the sum over their tokens.

    Args:
        model: Gives (examples, tokens, vocabulary) logits as ``logits``.
        batch: A mapping with ``input_ids``; with ``labels`` those tokens whose label is not -100 count, otherwise all under
            ``attention_mask`` but the first, on whichever side texts are filled up.

    Returns:
        (examples,).
    """
    logits = model(**inputs_of(batch)).logits[:, :-1]
    targets = batch["labels"] if "labels" in batch else batch["input_ids"]
    if "labels" not in batch and "attention_mask" in batch:
        padding = batch["attention_mask"] == 0
        targets = targets.masked_fill(padding | padding.roll(1, dims=1), -100)  # nothing tells what follows padding
    likelihoods = nn.functional.cross_entropy(logits.float().mT, targets[:, 1:], ignore_index=-100, reduction="none")
    return likelihoods.sum(dim=1)


def describe(found: Any) -> str:
    """What was found, in words."""
    return f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
