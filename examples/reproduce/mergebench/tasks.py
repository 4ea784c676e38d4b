"""The twelve tasks: their question files, how their images are cut, and what makes an answer right.

Question files are those of ``AuroraZengfh/MM-MergeBench``, adapters ``AuroraZengfh/LLaVA_7B_lora_r16_*``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from reproduce.mergebench import answers


@dataclass(frozen=True)
class MergeTask:
    """One of them."""

    name: str
    questions: str  # below the folder of instructions
    right: Callable[[str, answers.Question], bool] | None  # none: captions, measured all together
    padded: bool  # images become squares by padding; otherwise their middle is cut out
    tokens: int  # of an answer at most
    adapter: str | None = None  # end of its name on the Hub; none: unseen
    captions: str = ""  # file of the references, in COCO's form
    size: int = 0  # questions, roughly, for estimates

    @property
    def adapter_id(self) -> str | None:
        """Of the Hub."""
        return f"AuroraZengfh/LLaVA_7B_lora_r16_{self.adapter}" if self.adapter else None


_ALL = (
    MergeTask("ScienceQA", "ScienceQA/test.json", answers.option, False, 1024, "ScienceQA", size=4241),
    MergeTask("ImageNet", "ImageNet/test.json", answers.contained, False, 1024, "ImageNet", size=5000),
    MergeTask("VQAv2", "VQAv2/val.json", answers.equal, False, 1024, "VQAv2", size=5000),
    MergeTask("REC", "Grounding/test.json", answers.overlapping_as_published, False, 1024, "REC", size=5000),
    MergeTask("OCRVQA", "OCRVQA/test.json", answers.equal_or_unanswerable, True, 128, "OCRVQA", size=5000),
    MergeTask("VizWiz", "VizWiz/val.json", None, True, 128, "VizWiz", "VizWiz/val_coco_type.json", size=5000),
    MergeTask("Flickr30k", "Flickr30k/val_brief.json", None, True, 128, "flickr30k", "Flickr30k/val_coco_type.json", size=1000),
    MergeTask("IconQA", "IconQA/val.json", answers.equal, True, 128, "IconQA", size=6000),
    MergeTask("AOKVQA", "AOKVQA/val.json", answers.equal, False, 1024, size=1145),
    MergeTask("ImageNet-R", "ImageNet-R/test.json", answers.contained, True, 1024, size=6000),
    MergeTask("Screen2words", "Screen2words/test.json", None, True, 128, captions="Screen2words/test_coco_type.json", size=4300),
    MergeTask("TabMWP", "TabMWP/test.json", answers.equal, True, 128, size=7700),
)  # fmt: skip
TASKS: Mapping[str, MergeTask] = {task.name: task for task in _ALL}
"""Seen tasks first, in the order of Table 13."""
SEEN = tuple(task.name for task in _ALL if task.adapter)
UNSEEN = tuple(task.name for task in _ALL if not task.adapter)
