"""The benchmark's tasks in their fixed order."""

from __future__ import annotations

from functools import partial

from vision import drawn, readers
from vision.pictures import ImageTask

CLIPART = (
    "animals", "buildings", "computer", "education", "food", "people", "plants", "recreation", "shapes", "signs_and_symbols",
    "tools", "transportation",
)  # fmt: skip
EMOJI = (
    "Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects",
    "Symbols", "Flags",
)  # fmt: skip
# Those whose letters Noto has in sans serif and serif, in two weights each.
SCRIPTS = (
    "Armenian", "Bengali", "Devanagari", "Ethiopic", "Georgian", "Gujarati", "Gurmukhi", "Hebrew", "Kannada", "Khmer", "Lao",
    "Malayalam", "Sinhala", "Tamil", "Telugu", "Thai",
)  # fmt: skip
CONTEXTS = ("actions", "apps", "devices", "mimetypes", "places", "status")
NUMBERS = ("1", "2", "3", "4", "5", "6")

# With 2, 3, 4, 6, 8 tasks these are taken from the front, in pairs, threes and fours that stand side by side.
_ORDER = (
    ImageTask("digits", "Handwritten digit", tuple("0123456789"), (readers.DIGITS,), readers.digits),
    ImageTask("emoji", "Group of an emoji, from its picture", EMOJI, (readers.EMOJI,), readers.emoji),
    ImageTask("script", "Script of two letters", SCRIPTS, (drawn.NOTO,), partial(drawn.scripts, names=SCRIPTS)),
    ImageTask("clothes", "Kind of garment", tuple("0123456789"), (readers.FASHION,), readers.clothes),
    ImageTask("clipart", "Subject of a drawing", CLIPART, (readers.CLIPART,), readers.clipart),
    ImageTask("typeface", "Typeface of two letters", tuple(drawn.TYPEFACES),
              (drawn.DEJAVU, drawn.LIBERATION, drawn.LATO, drawn.COMIC, drawn.LIBERTINE), drawn.typefaces),
    ImageTask("icons", "What an icon stands for", CONTEXTS, tuple(readers.ICON_FOLDERS),
              partial(readers.icons, contexts=CONTEXTS)),
    ImageTask("count", "Number of things", NUMBERS, (readers.EMOJI,), partial(drawn.counts, numbers=NUMBERS)),
)  # fmt: skip
TASKS: dict[str, ImageTask] = {task.name: task for task in _ORDER}
"""The tasks in their order."""
