"""A merged adapter, and the ways out of it: to disk, to the Hub, into a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dc_merge_peft.outputs.adapter import inputs_of, push_adapter, write_adapter
from dc_merge_peft.outputs.directory import check_target
from dc_merge_peft.outputs.publish import check_repository
from dc_merge_peft.outputs.rows import in_a_line, merged_table
from dc_merge_peft.progress import progress_bar
from dc_merge_peft.result import MergeResult
from dc_merge_peft.shown import Shown, Table, first_of
from dc_merge_peft.sources.base import Source

if TYPE_CHECKING:
    from torch import nn


class MergedAdapter(Shown, MergeResult):
    """A merged adapter in memory: a :class:`MergeResult` with ways out. A notebook shows its modules as a table."""

    def _shown(self) -> Iterable[Table | str]:
        yield merged_table(self)
        yield in_a_line(self)
        yield from first_of([f"note: {remark}" for remark in self.remarks], "merged.remarks")

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        overwrite: bool = False,
        report: bool = False,
        progress: bool | None = False,
    ) -> Path:
        """Write a PEFT adapter directory that ``PeftModel.from_pretrained(base, directory)`` loads as it is.

        Args:
            directory: Where.
            overwrite: Replace what is there, if it is an adapter or a model.
            report: Put a report next to the model card, as in :func:`dc_merge_peft.report_merge`, with pictures in the card; needs
                the extra ``plots``, and adapters from disk or the Hub, which are read again.
            progress: Show a progress bar; None shows it only on a terminal.

        Raises:
            OutputError: the directory exists (pass ``overwrite=True``), or can't be written.
        """
        beside = None
        if report:
            from dc_merge_peft.report.card import beside_card

            check_target(directory, overwrite=overwrite, inputs=inputs_of(self))
            beside = beside_card(self, progress=progress)
        return write_adapter(self, directory, overwrite=overwrite, beside=beside, progress=progress_bar(progress))

    def save_report(
        self,
        path: str | Path,
        sources: Sequence[str | Path | Source] | None = None,
        *,
        overwrite: bool = False,
        progress: bool | None = None,
    ) -> Path:
        """Write one HTML page about this merge; see :func:`dc_merge_peft.report_merge`.

        Args:
            path: The file.
            sources: The adapters, in their order; by default they are read again from their original location.
            overwrite: Replace an earlier report.
            progress: Show progress bars; by default only on a terminal.
        """
        from dc_merge_peft.report import report_merge

        return report_merge(self, path, sources, overwrite=overwrite, progress=progress)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        report: bool = False,
    ) -> str:
        """Upload to the root of a Hub repository in one commit, without local paths; returns the commit's URL.

        Args:
            repo_id: ``owner/name``, or a name under the user's own account; created if need be.
            private: Whether a new repository is private; by default as set for the account. ``True`` refuses an existing public one.
            token: Token for the Hub; by default that of the environment (``HF_TOKEN``) or of the login.
            commit_message: Title of the commit or pull request.
            create_pr: Propose a pull request instead of committing to the main branch.
            report: As for :meth:`save_pretrained`.

        Raises:
            OutputError: the Hub refuses, fails or can't be reached. No file is published then; a repository that was
                created for it stays, empty, and the error says so.
        """
        beside = None
        if report:
            from dc_merge_peft.report.card import beside_card

            check_repository(repo_id)
            beside = beside_card(self, public=True, token=token)
        return push_adapter(
            self,
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
            beside=beside,
        )

    def add_to(self, model: nn.Module, adapter_name: str = "merged", *, activate: bool = True) -> nn.Module:
        """Add the adapter to a model in memory.

        Args:
            model: A ``PeftModel``, changed in place, or a base model, which gets wrapped in one.
            adapter_name: Its name there.
            activate: Make it the active adapter; otherwise the active one stays.

        Returns:
            The ``PeftModel``.

        Raises:
            OptionError: the name is taken or holds a dot.
            OutputError: a merged module is missing from the model, or has another shape.
        """
        from dc_merge_peft.outputs.live import install

        return install(self, model, adapter_name, activate=activate)
