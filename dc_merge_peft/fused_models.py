"""From adapters and their base model to one full model: the front door's part for fusing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_merge_peft.fusing import Destination, FusedModel, FusePlan, fuse_in_memory, fuse_to_disk, plan_fused
from dc_merge_peft.memory import memory_in_words
from dc_merge_peft.merged import MergedAdapter
from dc_merge_peft.methods import Method
from dc_merge_peft.methods.data import statistics_places
from dc_merge_peft.plan import MergePlan
from dc_merge_peft.progress import progress_bar
from dc_merge_peft.sources import Source
from dc_merge_peft.sources.base_model import BaseModel
from dc_merge_peft.sources.opening import listed

if TYPE_CHECKING:
    from torch import nn


class ModelFuser:
    """Adds what :class:`DCMergeAdapter` merges to a base model's own weights."""

    method: Method
    merge: Callable[..., MergedAdapter]
    merging: Callable[..., AbstractContextManager[MergedAdapter]]
    plan: Callable[..., MergePlan]

    @memory_in_words()
    def fuse(
        self,
        base: str | Path | nn.Module,
        sources: Sequence[str | Path | Source],
        out: str | Path | None = None,
        weights: Sequence[float] | None = None,
        *,
        overwrite: bool = False,
        push_to: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
        trust_remote_code: bool = False,
        **merge_options: Any,
    ) -> nn.Module:
        """Merge adapters and add the result to the base model's own weights, in memory: a full model without PEFT.

        Args:
            base: A model directory, a Hub id (``org/name``, ``org/name@revision``), or a model in memory (changed in
                place).
            sources: As for :meth:`merge`.
            out: Where to save it; nowhere by default.
            weights: As for :meth:`merge`.
            overwrite: Replace ``out`` if it exists.
            push_to: Hub repository to upload the model to, in one commit; ``private``, ``commit_message`` and
                ``create_pr`` are as for :meth:`MergedAdapter.push_to_hub`.
            token: Token for the Hub, to read and to push; by default that of the environment or login.
            trust_remote_code: Run the Python code that the base model ships with.
            **merge_options: Everything else :meth:`merge` takes. Without an ``svd_rank`` nothing is truncated.

        Returns:
            The fused model. If you only need the files, :meth:`fuse_to_disk` takes less memory and time.

        Raises:
            OutputError: a module is missing from the base, has another shape or shares its weight with another one, or
                the model can't be saved or pushed.
            SourceError: the base model can't be loaded.
        """
        sources = listed(sources)
        destination = Destination(
            out=out, overwrite=overwrite, push_to=push_to, private=private, commit_message=commit_message,
            create_pr=create_pr, token=token, inputs=[base, *sources, *statistics_places(self.method.config.to_dict())],
        )  # fmt: skip
        merge = partial(self.merge, sources, weights, token=token)
        found = BaseModel(base, token=token, trust_remote_code=trust_remote_code)
        return fuse_in_memory(merge, found, destination, **merge_options)[0]

    @memory_in_words()
    def fuse_to_disk(
        self,
        base: str | Path,
        sources: Sequence[str | Path | Source],
        out: str | Path | None = None,
        weights: Sequence[float] | None = None,
        *,
        max_shard_size: int | str | None = None,
        trust_remote_code: bool = False,
        progress: bool | None = None,
        overwrite: bool = False,
        push_to: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
        **merge_options: Any,
    ) -> FusedModel:
        """What :meth:`fuse` makes, written straight from the base model's safetensors files, a few rows of a tensor at a time.

        Tensors that no adapter changes, and the config, are those of the base model, byte for byte. A base model whose files
        don't allow this (pickles, conversions that can't be reversed) is fused in memory, with a warning.

        Args:
            base: A model directory or a Hub id.
            sources: As for :meth:`merge`.
            out: Where to write it; may be omitted only with ``push_to``.
            weights: As for :meth:`merge`.
            max_shard_size: Maximum size of a weight file, in bytes or as in ``"500MB"``; ``"5GB"`` by default.
            trust_remote_code: Run the Python code that the base model ships with.
            progress: Show progress bars; by default only on a terminal.
            overwrite: As for :meth:`fuse`, and so are all others; ``resume=True`` keeps finished modules and files next to ``out``.
        """
        sources = listed(sources)
        destination = Destination(
            out=out, overwrite=overwrite, push_to=push_to, private=private, commit_message=commit_message,
            create_pr=create_pr, token=token, max_shard_size=max_shard_size, inputs=[base, *sources, *statistics_places(self.method.config.to_dict())],
        )  # fmt: skip
        return fuse_to_disk(
            partial(self.merge, sources, weights, token=token, progress=progress),
            partial(self.merging, sources, weights, token=token, progress=progress),
            partial(self.plan, sources, weights, token=token),
            base,
            destination,
            progress_bar(progress),
            trust_remote_code=trust_remote_code,
            **merge_options,
        )

    def plan_fused(
        self,
        base: str | Path,
        sources: Sequence[str | Path | Source],
        weights: Sequence[float] | None = None,
        *,
        max_shard_size: int | str | None = None,
        trust_remote_code: bool = False,
        token: str | bool | None = None,
        **merge_options: Any,
    ) -> FusePlan:
        """Everything :meth:`fuse_to_disk` checks before it reads factors, and what it would write: a dry run."""
        plan = partial(self.plan, sources, weights, token=token)
        destination = Destination(token=token, max_shard_size=max_shard_size)
        return plan_fused(plan, base, destination, trust_remote_code=trust_remote_code, **merge_options)
