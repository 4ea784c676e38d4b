"""Colours of the page for a light and a dark screen, chosen so that text on them can be read (WCAG: 4.5 to 1)."""

from __future__ import annotations

from collections.abc import Sequence

# Steps of a heat map from zero to its largest number, on either side of zero.
STEPS = 10

# Anchors of the two sides of a heat map: from close to the page's own colour to the strongest.
_RAMPS = {
    "light": (("#f0f4f9", "#c3d9ec", "#6aaad4", "#1f6fb2", "#08306b"), ("#fbf0e6", "#f4c08f", "#dd7d2c", "#8c3a04")),
    "dark": (("#19212a", "#1d466c", "#3a80bb", "#8ec5f0", "#dcefff"), ("#241d17", "#6b3a14", "#c2702a", "#ffdcb8")),
}

# Okabe and Ito's colours, as in the figures, darkened or lightened until they stand out from the page by 3 to 1.
LINES = 8
_LINES = {
    "light": ("#0072b2", "#c65400", "#00805f", "#a84a82", "#9a6700", "#2a7fae", "#5b4bb3", "#6f6f00"),
    "dark": ("#56b4e9", "#ff9a57", "#3ccfa4", "#e6a3c8", "#f0be3c", "#a9c9ff", "#b7a8ff", "#cfcf5a"),
}

_PLAIN = {
    "light": {
        "bg": "#ffffff", "fg": "#1c2127", "muted": "#57606a", "rule": "#d5dbe1", "panel": "#f5f7f9", "link": "#0a58a6",
        "warning": "#8a4b00", "overruled": "#a40e26", "note": "#47535f", "thin": "#8c959f",
    },
    "dark": {
        "bg": "#10151a", "fg": "#e4e9ee", "muted": "#9ba8b5", "rule": "#2c353e", "panel": "#181f26", "link": "#78b7ff",
        "warning": "#eeb04e", "overruled": "#ff9191", "note": "#aab6c2", "thin": "#75818d",
    },
}  # fmt: skip


def theme(name: str) -> dict[str, str]:
    """All colours of the theme ``"light"`` or ``"dark"`` by the name of their CSS variable.

    ``p0`` to ``p10`` and ``n1`` to ``n10`` are a heat map's cells, ``p0t`` and so on the text in them, ``l0`` and so on lines.
    """
    found = dict(_PLAIN[name])
    for side, anchors in zip("pn", _RAMPS[name], strict=True):
        for step in range(STEPS + 1):
            colour = _between(anchors, step / STEPS)
            found[f"{side}{step}"], found[f"{side}{step}t"] = colour, _text_on(colour)
    return found | {f"l{index}": colour for index, colour in enumerate(_LINES[name])}


def contrast(first: str, second: str) -> float:
    """WCAG's contrast of two colours, from 1 to 21."""
    light, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _text_on(colour: str) -> str:
    """Black or white: on any colour at least one of them has a contrast of 4.58."""
    return max(("#000000", "#ffffff"), key=lambda text: contrast(text, colour))


def _luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in _rgb(colour))]
    return sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _between(anchors: Sequence[str], share: float) -> str:
    place = share * (len(anchors) - 1)
    index = min(int(place), len(anchors) - 2)
    low, high = _rgb(anchors[index]), _rgb(anchors[index + 1])
    return "#" + "".join(f"{round(a + (b - a) * (place - index)):02x}" for a, b in zip(low, high, strict=True))


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[start : start + 2], 16) for start in (1, 3, 5))
