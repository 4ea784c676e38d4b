"""The front door: ``DCMergeAdapter(...).merge([...])`` and ``.fuse(...)``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dc_merge_peft.errors import OptionError
from dc_merge_peft.full_models import FullModelMerger
from dc_merge_peft.fused_models import ModelFuser
from dc_merge_peft.memory import memory_in_words
from dc_merge_peft.merged import MergedAdapter
from dc_merge_peft.merging import merging
from dc_merge_peft.methods import Method, MethodConfig, method_for, method_named
from dc_merge_peft.plan import MergePlan, plan_merge
from dc_merge_peft.progress import progress_bar
from dc_merge_peft.reading import Devices
from dc_merge_peft.sources import Source
from dc_merge_peft.sources.base_model import BaseModel
from dc_merge_peft.sources.dora import DoraReading, with_base
from dc_merge_peft.sources.opening import sources_opened
from dc_merge_peft.work.place import WorkPlace

if TYPE_CHECKING:
    from torch import nn


class DCMergeAdapter(ModelFuser, FullModelMerger):
    """Merge LoRA adapters from disk or the Hub, without their base model.

    Examples:
        >>> from dc_merge_peft import DCMergeAdapter, DCMergeConfig
        >>> merger = DCMergeAdapter(DCMergeConfig(smoothing="average"))
        >>> merger = DCMergeAdapter(method="dc", smoothing="average")  # the same
        >>> merger
        DCMergeAdapter(method='dc', smoothing='average')
        >>> merged = merger.merge(["org/lora-a", "./lora-b"])  # doctest: +SKIP
        >>> merged.save_pretrained("out")  # doctest: +SKIP
    """

    def __init__(self, config: MethodConfig | None = None, *, method: str | None = None, **options: Any) -> None:
        """
        Args:
            config: The config of a method, such as :class:`DCMergeConfig`; or instead:
            method: A method's name, ``"dc"`` by default; ``dc-merge methods`` lists them.
            **options: Fields of that method's config.

        Raises:
            OptionError: an unknown method or option, a value out of range, or both a config and options.
        """
        if config is not None and (options or method is not None):
            raise OptionError("found both a config and a method or options: expected one of them")
        self.method: Method = method_for(config) if config is not None else method_named(method or "dc", options)
        self._options = None if config is not None else options

    def __repr__(self) -> str:
        """The method, and its options that are not the defaults."""
        changed = [
            f"{field.name}={value!r}"
            for field in dataclasses.fields(self.config)
            if (value := getattr(self.config, field.name)) != field.default
        ]
        return f"{type(self).__name__}({', '.join([f'method={self.method.name!r}', *changed])})"

    @property
    def config(self) -> MethodConfig:
        """The method's options, with their current values."""
        return self.method.config

    def merge(
        self,
        sources: Sequence[str | Path | Source],
        weights: Sequence[float] | None = None,
        *,
        svd_rank: int | None = None,
        dtype: torch.dtype | str | None = None,
        device: Devices = None,
        allow_different_bases: bool = False,
        allow_zero: bool = False,
        rename: str | None = None,
        base: str | Path | nn.Module | BaseModel | None = None,
        dora_rank: int | None = None,
        extras: str | None = None,
        keep_dense: bool | Path = False,
        max_memory: int | str | None = None,
        resume: str | Path | WorkPlace | None = None,
        progress: bool | None = None,
        token: str | bool | None = None,
    ) -> MergedAdapter:
        """Merge adapters.

        Args:
            sources: Directories, Hub ids (``org/name``, ``org/name@revision``, ``org/name/subfolder``) or a mix.
            weights: One finite number per adapter; 1 for each by default. Not normalised.
            svd_rank: Maximum rank of the merged adapter, by optimal truncation. By default the sum of the adapters' ranks,
                which loses nothing, except for methods on the entries of dW, whose result has full rank.
            dtype: Type of the written factors; by default the widest among the sources.
            device: Where to compute; by default where the factors are, which is the CPU for files. Several GPUs (``"cuda:0,cuda:1"``,
                a list, ``"auto"`` for all) merge modules in parallel.
            allow_different_bases: Merge adapters whose configs name different base models.
            allow_zero: Merge adapters with an all-zero factor.
            rename: For adapters of an old or foreign layout, as in ``"llava-hf"`` or ``"clip-vision-v5"``: read their modules
                under today's names of the base model. :data:`dc_merge_peft.sources.renames.RENAMES` lists them all.
            base: The base model, needed for DoRA adapters, whose deltas depend on it: a directory, a Hub id or a model in
                memory. It is loaded only if an adapter is DoRA.
            dora_rank: Rank at which the dense deltas of DoRA adapters are read; nothing is lost if it is at least the smaller
                side of a weight. By default twice the adapter's rank.
            extras: What to do with tensors that adapters hold outside B and A (fully trained modules and tokens, biases, base
                weights): ``"average"``, ``"first"``, ``"drop"`` or the name of the adapter whose values to keep; by
                default adapters that hold any are refused.
            keep_dense: Keep the result of a method on the entries of dW dense, without truncation, to be added to full
                weights, as :meth:`fuse` does. With a folder, the numbers are in files there instead of in memory.
            max_memory: Main memory that this process may use, as in ``"8GB"`` or in bytes: fewer modules are merged at the same
                time, with the same result. It is a conservative estimate.
            resume: A folder that keeps finished modules while the merge runs; created if needed. If the merge was interrupted,
                running it again continues there, without merging finished modules again. The folder is deleted at the end.
            progress: Show a progress bar; by default only on a terminal.
            token: Token for the Hub; by default that of the environment (``HF_TOKEN``) or of the login.

        Raises:
            SourceError: an adapter can't be read or holds bad numbers.
            UnsupportedAdapterError: an adapter that is not plain LoRA, DoRA without a base model, or tensors outside B and A
                without ``extras``.
            IncompatibleAdaptersError: adapters that don't belong together.
            OptionError: a wrong weight, rank, dtype, device or rename, or too little memory.
            OutputError: ``resume`` is a folder of another merge, or can't be written.
        """
        with self.merging(
            sources, weights, svd_rank=svd_rank, dtype=dtype, device=device, allow_different_bases=allow_different_bases,
            allow_zero=allow_zero, rename=rename, base=base, dora_rank=dora_rank, extras=extras, keep_dense=keep_dense,
            lazily=False, max_memory=max_memory, resume=resume, progress=progress, token=token,
        ) as merged:  # fmt: skip
            return merged

    @contextmanager
    def merging(
        self,
        sources: Sequence[str | Path | Source],
        weights: Sequence[float] | None = None,
        *,
        svd_rank: int | None = None,
        dtype: torch.dtype | str | None = None,
        allow_different_bases: bool = False,
        extras: str | None = None,
        lazily: bool = True,
        progress: bool | None = None,
        out: str | Path | None = None,
        **merge_options: Any,
    ) -> Iterator[MergedAdapter]:
        """:meth:`merge` for a result that is written and not kept: the merged factors are never all in memory.

        They are multiplied out one layer at a time while they are written, from the adapters' files, which stay open until the
        ``with`` block ends. The written files are identical to those of :meth:`merge`.

        Args:
            sources: As for :meth:`merge`, and so are all others. What ``resume`` keeps is deleted when the block ends without an error.
            lazily: ``False`` multiplies the factors out at once.
            out: Where the result will be written; if there is no room for it, the merge is refused before any work.
            **merge_options: Everything else :meth:`merge` takes.

        Examples:
            >>> with DCMergeAdapter().merging(["org/lora-a", "./lora-b"]) as merged:  # doctest: +SKIP
            ...     merged.save_pretrained("out")
        """
        with memory_in_words(), merging(
            self.method, sources, weights, svd_rank=svd_rank, dtype=dtype, allow_different_bases=allow_different_bases,
            extras=extras, lazily=lazily, progress=progress_bar(progress), out=out, **merge_options,
        ) as merged:  # fmt: skip
            yield merged

    def plan(
        self,
        sources: Sequence[str | Path | Source],
        weights: Sequence[float] | None = None,
        *,
        svd_rank: int | None = None,
        dtype: torch.dtype | str | None = None,
        allow_different_bases: bool = False,
        rename: str | None = None,
        base: str | Path | nn.Module | BaseModel | None = None,
        dora_rank: int | None = None,
        extras: str | None = None,
        token: str | bool | None = None,
    ) -> MergePlan:
        """Everything :meth:`merge` checks before it reads factors, and what would come out: a dry run."""
        model = BaseModel.of(base, token)
        with sources_opened(sources, token, rename, keep_extras=extras not in (None, "drop")) as opened:
            return plan_merge(
                with_base(opened, model, DoraReading(dora_rank)),
                self.method,
                weights,
                svd_rank=svd_rank,
                dtype=dtype,
                allow_different_bases=allow_different_bases,
                extras=extras,
                base=None if model is None else model.location,
            )
