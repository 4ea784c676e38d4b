"""From full fine-tuned models to one: the front door's part for the paper's full fine-tuning setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dc_merge_peft.engine import run_merge
from dc_merge_peft.errors import OutputError
from dc_merge_peft.full_plan import FullPlan, plan_full
from dc_merge_peft.fusing import Destination, FusedModel
from dc_merge_peft.memory import memory_in_words
from dc_merge_peft.merged import MergedAdapter
from dc_merge_peft.methods import Method, method_named
from dc_merge_peft.methods.data import statistics_places
from dc_merge_peft.outputs.directory import hidden_beside, tidy_up
from dc_merge_peft.outputs.room import check_room
from dc_merge_peft.progress import progress_bar
from dc_merge_peft.reading import Devices, checked_devices
from dc_merge_peft.result import MergeResult
from dc_merge_peft.sources.finetuned import open_model, open_models
from dc_merge_peft.sources.opening import listed
from dc_merge_peft.work.manifest import manifest
from dc_merge_peft.work.place import WorkPlace, work_place


class FullModelMerger:
    """Merges full models with the method of :class:`DCMergeAdapter`."""

    method: Method
    _options: Mapping[str, Any] | None  # of the method, as given; None where a config was

    @memory_in_words()
    def merge_full(
        self,
        base: str | Path,
        models: Sequence[str | Path],
        out: str | Path | None = None,
        weights: Sequence[float] | None = None,
        *,
        average: Sequence[str] = (),
        lora_rank: int | None = None,
        device: Devices = None,
        allow_identical: bool = False,
        max_memory: int | str | None = None,
        max_shard_size: int | str | None = None,
        trust_remote_code: bool = False,
        resume: bool | str | Path | WorkPlace | None = None,
        progress: bool | None = None,
        overwrite: bool = False,
        push_to: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
    ) -> FusedModel:
        """Merge full fine-tuned models of one base model, from and to safetensors files, one tensor of every model at a time.

        The weights of linear layers, ``Conv1D``, convolutions and experts are merged as matrices, to which each of the T models contributes
        ``floor(min(m, n) / T)`` directions if the method works on directions. Embeddings, heads, tied weights, norms, biases and
        everything else become the base model's value plus ``alpha`` times the weighted mean of the differences. What no model
        changes is copied.

        If the method was given by its name, ``smoothing`` is ``"none"`` by default, as in the paper's setting; a config
        is taken as it is.

        Args:
            base: The base model: a directory or a Hub id (``org/name``, ``org/name@revision``).
            models: Directories or Hub ids of its fine-tuned models.
            out: Where to write the result; may be omitted only with ``push_to``.
            weights: One finite number per model; 1 for each by default. Not normalised.
            average: More parameters to average: trailing parts of their names or of their layers', or regular expressions for
                whole names.
            lora_rank: Write the leading components of the merged matrices as a PEFT adapter of this rank, instead of a full
                model. What is averaged can't be in it, and is named in the remarks.
            device: Where to compute, as for :meth:`DCMergeAdapter.merge`; the CPU by default.
            allow_identical: Accept models that are equal to the base model.
            max_memory: As for :meth:`DCMergeAdapter.merge`.
            max_shard_size: Maximum size of a weight file, in bytes or as in ``"500MB"``; ``"5GB"`` by default.
            trust_remote_code: Run the Python code that the models ship with.
            resume: ``True`` keeps finished matrices and weight files next to ``out`` while the merge runs, a path keeps them in that
                folder. If the merge was interrupted, running it again continues with them. They are deleted at the end.
            progress: Show progress bars; by default only on a terminal.
            overwrite: Replace ``out`` if it exists.
            push_to: Hub repository to upload the result to, in one commit; ``private``, ``commit_message`` and
                ``create_pr`` are as for :meth:`MergedAdapter.push_to_hub`.
            token: Token for the Hub; by default that of the environment or login.

        Raises:
            SourceError: a model can't be read tensor by tensor, or holds NaN or Inf.
            IncompatibleAdaptersError: models of another class, with other tensors or shapes, or equal to the base model.
            UnsupportedAdapterError: quantised weights; with ``lora_rank``, layers that no adapter can hold.
            OptionError: a method that needs LoRA factors (``"robust"``), a wrong weight, rank, pattern or device.
            OutputError: nowhere to write, the result can't be written or pushed, or ``resume`` finds leftovers of another merge.
        """
        if out is None and push_to is None:
            raise OutputError("found no output: expected a directory, or a Hub repository to push to")
        models = listed(models, "model")
        destination = Destination(
            out=out, overwrite=overwrite, push_to=push_to, private=private, commit_message=commit_message,
            create_pr=create_pr, token=token, max_shard_size=max_shard_size, inputs=[base, *models, *statistics_places(self.method.config.to_dict())],
        )  # fmt: skip
        if out is not None:
            tidy_up(out)  # now: what is left there may be as large as the model
        destination.check()
        devices = checked_devices(device)
        with work_place(resume, out) as place:
            plan = self.plan_full(
                base, models, weights, average=average, lora_rank=lora_rank, allow_identical=allow_identical,
                max_shard_size=max_shard_size, trust_remote_code=trust_remote_code, progress=progress, token=token,
            )  # fmt: skip
            job = _Job(plan, self._full_method(), destination, devices, allow_identical, progress, max_memory, place)
            return job.extract() if lora_rank is not None else job.write()

    def plan_full(
        self,
        base: str | Path,
        models: Sequence[str | Path],
        weights: Sequence[float] | None = None,
        *,
        average: Sequence[str] = (),
        lora_rank: int | None = None,
        allow_identical: bool = False,
        max_shard_size: int | str | None = None,
        trust_remote_code: bool = False,
        progress: bool | None = None,
        token: str | bool | None = None,
    ) -> FullPlan:
        """Everything :meth:`merge_full` checks before it computes, and what would become of each tensor: a dry run."""
        Destination(max_shard_size=max_shard_size).check()
        opened = open_model(base, token, trust_remote_code=trust_remote_code, what="the base model")
        return plan_full(
            opened,
            open_models(models, opened, token, trust_remote_code=trust_remote_code),
            self._full_method(),
            weights,
            average=average,
            lora_rank=lora_rank,
            allow_identical=allow_identical,
            progress=progress_bar(progress),
        )

    def _full_method(self) -> Method:
        """The method with the defaults of full fine-tuning."""
        if self._options is None:
            return self.method
        return method_named(self.method.name, {**self.method.full_defaults, **self._options})


@dataclasses.dataclass(frozen=True)
class _Job:
    """A planned merge and where its result goes."""

    plan: FullPlan
    method: Method
    destination: Destination
    devices: tuple[torch.device, ...]
    allow_identical: bool
    progress: bool | None
    max_memory: int | str | None
    place: WorkPlace | None  # of finished matrices, where they are kept

    def write(self) -> FusedModel:
        """The full model."""
        from dc_merge_peft.outputs.full_changes import full_changes
        from dc_merge_peft.outputs.fused_stream import stream_fused

        base = self.plan.base
        # The merged deltas are as many numbers as the base model has, in float32: they wait on disk for their turn.
        with self.destination.directory() as out, hidden_beside(out) as folder:
            there = 0 if self.place is None else self.place.written(out)
            check_room(out, sum(tensor.size for tensor in base.files.tensors.values()) - there)
            merged = self._merged(keep_dense=folder)
            saved = stream_fused(
                base, full_changes(self.plan), merged, out, overwrite=self.destination.overwrite,
                max_shard_size=self.destination.max_shard_size, progress=progress_bar(self.progress),
                work=self.place.folder if self.place is not None and self.place.resume else None,
            )  # fmt: skip
            url = self.destination.push(None, merged, base.files.base, saved)
        return FusedModel(saved if self.destination.out is not None else None, url, merged, merged.remarks)

    def extract(self) -> FusedModel:
        """The leading components of its matrices, as an adapter."""
        to, merged = self.destination, self._merged(keep_dense=False)
        adapter = MergedAdapter(**vars(merged))
        saved = (
            None if to.out is None else adapter.save_pretrained(to.out, overwrite=to.overwrite, progress=self.progress)
        )
        url = None
        if to.push_to is not None:
            url = adapter.push_to_hub(
                to.push_to, private=to.private, token=to.token, commit_message=to.commit_message, create_pr=to.create_pr
            )
        return FusedModel(saved, url, adapter, adapter.remarks)

    def _merged(self, *, keep_dense: bool | Path) -> MergeResult:
        work = None if self.place is None else (self.place, self._manifest(keep_dense=bool(keep_dense)))
        result = run_merge(
            self.plan.merge, self.plan.sources, self.method, device=self.devices or None, allow_zero=self.allow_identical,
            keep_dense=keep_dense, max_memory=self.max_memory, work=work, progress=progress_bar(self.progress),
        )  # fmt: skip
        return dataclasses.replace(result, full=self.plan.record)

    def _manifest(self, *, keep_dense: bool) -> dict[str, Any]:
        """What the merged matrices, and the files in which they are written, depend on."""
        plan = self.plan
        made_of = manifest(
            plan.merge, plan.sources, self.method, plan.base,
            devices=self.devices, allow_zero=self.allow_identical, keep_dense=keep_dense,
        )  # fmt: skip
        return {**made_of, "average": list(plan.record.average)}
