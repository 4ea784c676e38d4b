"""From adapters to a full model: straight from the base model's files where they allow it, else in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dc_merge_peft.errors import OptionError, OutputError, SourceError, preview, warn
from dc_merge_peft.outputs.directory import check_target, hidden_beside, tidy_up
from dc_merge_peft.outputs.room import check_room, scratch
from dc_merge_peft.plan import MergePlan
from dc_merge_peft.progress import Progress
from dc_merge_peft.result import MergeResult
from dc_merge_peft.sources.base_files import NotStreamable, open_base_files
from dc_merge_peft.sources.base_model import BaseModel
from dc_merge_peft.work.place import WorkPlace, work_place


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where a fused model goes."""

    out: str | Path | None = None
    overwrite: bool = False
    max_shard_size: int | str | None = None
    push_to: str | None = None
    private: bool | None = None
    commit_message: str | None = None
    create_pr: bool = False
    token: str | bool | None = None
    inputs: Sequence[Any] = ()  # what the model is made from, by directories among others

    def __post_init__(self) -> None:
        if self.out is not None and not isinstance(self.out, (str, Path)):
            raise OptionError(
                f"found a {type(self.out).__name__} in the place of the output: expected a directory; weights come after it, or by name "
                "(weights=[...])"
            )

    def check(self) -> None:
        """Refuse what can't be written or pushed to, before any work is done.

        Raises:
            OptionError: no size of a file.
            OutputError: the directory exists or is an input, or the repository's name is none.
        """
        from dc_merge_peft.outputs.publish import check_repository
        from dc_merge_peft.outputs.shards import shard_size

        shard_size(self.max_shard_size)
        if self.push_to is not None:
            check_repository(self.push_to)
        if self.out is not None:
            named = [part for part in self.inputs if isinstance(part, (str, Path))]
            check_target(self.out, overwrite=self.overwrite, inputs=named)

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """Where to write: ``out``, or a place that lasts until the upload is done."""
        if self.out is not None:
            yield Path(self.out).expanduser()
            return
        with scratch() as folder:
            yield folder / "model"

    def push(
        self, model: nn.Module | None, result: MergeResult, base: str | Path | None, saved: Path | None
    ) -> str | None:
        """Upload what was saved, or a model in memory, where that is asked for; returns the URL."""
        from dc_merge_peft.outputs.push_fused import push_fused

        if self.push_to is None:
            return None
        return push_fused(
            model, result, self.push_to, base=base, saved=saved, keeps=self.out is not None,
            private=self.private, token=self.token, commit_message=self.commit_message, create_pr=self.create_pr,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class FusedModel:
    """A fused model on disk or on the Hub; any class of transformers loads it."""

    path: Path | None  # None where it was pushed alone
    url: str | None  # of the commit or pull request
    merged: MergeResult  # what was added to the base model; the deltas themselves are no longer at hand
    remarks: tuple[str, ...]  # of the merge, and why the model had to be in memory, if it had


@dataclass(frozen=True)
class FusePlan:
    """A fused model that has passed every check that needs no factors."""

    base: str
    merge: MergePlan
    tensors: int  # in the base model's files; 0 where it has to be loaded to know
    changed: int  # of them
    changed_bytes: int
    total_bytes: int
    shards: int
    remarks: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """Plain figures for a dry run."""
        names = ("base", "tensors", "changed", "changed_bytes", "total_bytes", "shards")
        return {"modules": len(self.merge.modules), **{name: getattr(self, name) for name in names}}


def fuse_in_memory(
    merge: Callable[..., MergeResult],
    base: BaseModel,
    destination: Destination,
    **options: Any,
) -> tuple[nn.Module, MergeResult, str | None]:
    """Merge, load the base model, add the result to it, and save and push it as asked for.

    Args:
        merge: Merges the adapters, given a base model and how to keep dense deltas.
        base: The base model, loaded once for DoRA adapters and the result.
        destination: Where it goes.
        **options: Of the merge.

    Returns:
        The model, the merge, and the URL of an upload.
    """
    from dc_merge_peft.outputs.fused import fuse_into, save_fused

    destination.check()
    with work_place(options.pop("resume", None), destination.out) as place:
        merged = merge(**{"base": base, **_whole(options), "resume": place})
        model, where = base.model, base.location
        fuse_into(model, merged)
        saved = None
        if destination.out is not None:
            saved = save_fused(
                model, merged, destination.out, base=where, overwrite=destination.overwrite, token=destination.token,
                max_shard_size=destination.max_shard_size,
            )  # fmt: skip
    return model, merged, destination.push(model, merged, where, saved)


def fuse_to_disk(
    merge: Callable[..., MergeResult],
    merging: Callable[..., AbstractContextManager[MergeResult]],
    plan: Callable[..., MergePlan],
    base: str | Path,
    destination: Destination,
    progress: Progress,
    *,
    trust_remote_code: bool,
    **options: Any,
) -> FusedModel:
    """Merge, and write the base model's files with the result in them; where they don't allow that, in memory.

    Args:
        merge: As for :func:`fuse_in_memory`.
        merging: The same merge for as long as its result is written: its factors are multiplied out one by one.
        plan: Plans the same merge.
        base: A model directory or Hub id.
        destination: Where it goes.
        progress: Shows how far the writing is.
        trust_remote_code: Run the Python code that the base model brings along.
        **options: Of the merge.
    """
    if destination.out is None and destination.push_to is None:
        raise OutputError("found no output: expected a directory, or a Hub repository to push to")
    if destination.out is not None:
        tidy_up(destination.out)  # now: what is left there may be as large as the model
    destination.check()
    with work_place(options.pop("resume", None), destination.out) as place:
        options["resume"] = place
        try:
            return _fuse_streamed(merging, plan, base, destination, progress, trust_remote_code, options)
        except NotStreamable as found:
            reason = _in_memory(base, found)
        whole = BaseModel(base, token=destination.token, trust_remote_code=trust_remote_code)
        _, merged, url = fuse_in_memory(merge, whole, destination, **options)
    warn(reason)  # now that it could be loaded
    path = None if destination.out is None else Path(destination.out).expanduser()
    return FusedModel(path, url, merged, (*merged.remarks, reason))


def plan_fused(
    plan: Callable[..., MergePlan],
    base: str | Path,
    destination: Destination,
    *,
    trust_remote_code: bool,
    **options: Any,
) -> FusePlan:
    """Everything that is checked before factors are read, and what would be written: a dry run."""
    from dc_merge_peft.outputs.shards import plan_shards

    destination.check()
    try:
        model, changes, planned = _located(plan, base, destination.token, trust_remote_code, options)
    except NotStreamable as found:
        planned = plan(**{"base": BaseModel(base, token=destination.token), **_planning(options)})
        return FusePlan(str(base), planned, 0, 0, 0, 0, 0, (*planned.remarks, _in_memory(base, found)))
    tensors = model.files.tensors
    return FusePlan(
        base=str(base),
        merge=planned,
        tensors=len(tensors),
        changed=len(changes.keys),
        changed_bytes=sum(tensors[key].size for key in changes.keys),
        total_bytes=sum(tensor.size for tensor in tensors.values()),
        shards=len(plan_shards(tensors, destination.max_shard_size)),
        remarks=planned.remarks,
    )


def _fuse_streamed(
    merging: Callable[..., AbstractContextManager[MergeResult]],
    plan: Callable[..., MergePlan],
    base: str | Path,
    destination: Destination,
    progress: Progress,
    trust_remote_code: bool,
    options: Mapping[str, Any],
) -> FusedModel:
    from dc_merge_peft.outputs.fused_stream import stream_fused

    model, changes, planned = _located(plan, base, destination.token, trust_remote_code, options)
    place: WorkPlace | None = options["resume"]
    # Methods of full rank leave as many numbers as the base model has, in float32: they wait on disk for their turn.
    with destination.directory() as out, hidden_beside(out) as folder:
        there = 0 if place is None else place.written(out)
        check_room(out, sum(tensor.size for tensor in model.files.tensors.values()) - there)
        whole = _whole(options)
        with merging(**{"base": model, **whole, "keep_dense": whole["keep_dense"] and folder}) as merged:
            _refuse_others(planned, merged)
            saved = stream_fused(
                model, changes, merged, out, overwrite=destination.overwrite, max_shard_size=destination.max_shard_size,
                work=place.folder if place is not None and place.resume else None, progress=progress,
            )  # fmt: skip
        url = destination.push(None, merged, base, saved)
    return FusedModel(saved if destination.out is not None else None, url, merged, merged.remarks)


def _located(
    plan: Callable[..., MergePlan],
    base: str | Path,
    token: str | bool | None,
    trust_remote_code: bool,
    options: Mapping[str, Any],
) -> tuple[Any, Any, MergePlan]:
    """The base model in its files, what changes there, and the plan of the merge."""
    from dc_merge_peft.outputs.fused_changes import find_changes
    from dc_merge_peft.sources.base_names import FiledModel

    model = FiledModel(open_base_files(base, token), trust_remote_code=trust_remote_code)
    planned = plan(**{"base": model, **_planning(options)})
    wanted = {module.name: (module.layout, module.shape) for module in planned.modules}
    specs = {extra.name: extra.spec for extra in planned.extras.kept}
    return model, find_changes(model, wanted, specs, options.get("rename")), planned


def _refuse_others(planned: MergePlan, merged: MergeResult) -> None:
    """The adapters are opened again to be merged. What they have by then goes where it was to go by the plan, or nowhere.

    Raises:
        SourceError: they have other modules, or other tensors outside B and A.
    """
    modules = {module.name: (module.layout, module.shape) for module in planned.modules}
    specs = {extra.name: extra.spec for extra in planned.extras.kept}
    if modules != {name: (module.layout, module.delta.shape) for name, module in merged.modules.items()} or (
        specs != {name: extra.spec for name, extra in merged.extras.values.items()}
    ):
        pairs = zip(planned.adapters, merged.adapters, strict=True)
        changed = [now.name for before, now in pairs if before.fingerprint != now.fingerprint]
        which = f"adapter {preview(changed)}" if changed else "an adapter"
        raise SourceError(
            f"{which} was changed after it had been opened: expected the same modules until they are fused; fuse again"
        )


def _whole(options: Mapping[str, Any]) -> dict[str, Any]:
    """Without a rank that is asked for, nothing of the result is truncated."""
    return {"keep_dense": options.get("svd_rank") is None, **options}


# What of a merge's options a plan does not ask for: how it is computed.
_COMPUTING = ("device", "allow_zero", "keep_dense", "max_memory", "resume", "progress")


def _planning(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in _COMPUTING}


def _in_memory(base: str | Path, found: NotStreamable) -> str:
    return f"the base model '{base}' has to be in memory as a whole, since {found}"
