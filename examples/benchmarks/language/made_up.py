"""Questions that a program asks: the same ones from the same seed, each once, so that training and test parts share none."""

from __future__ import annotations

import calendar
import datetime
import random
from collections.abc import Callable, Hashable

QA = tuple[str, str]  # question and answer
SIZES = {"test": 400, "validation": 200, "train": 4000}
SEED = 0  # the same questions for adapters of all seeds

WORDS = [
    "apple", "arrow", "autumn", "bridge", "butter", "button", "cabin", "candle", "carpet", "castle", "cheese",
    "cherry", "circle", "coffee", "copper", "corner", "cotton", "desert", "dinner", "doctor", "dragon", "engine",
    "evening", "farmer", "feather", "finger", "forest", "garden", "ginger", "hammer", "harbor", "hotel", "island",
    "jacket", "jungle", "kettle", "kitchen", "ladder", "lemon", "letter", "lizard", "magnet", "market", "melon",
    "mirror", "monkey", "mountain", "needle", "nephew", "ocean", "office", "orange", "oven", "paper", "parrot",
    "pencil", "pepper", "pillow", "pocket", "prison", "queen", "rabbit", "ribbon", "river", "rocket", "saddle",
    "sailor", "school", "shadow", "silver", "spider", "summer", "table", "teacher", "temple", "ticket", "tiger",
    "tunnel", "turtle", "uncle", "valley", "velvet", "village", "violin", "wagon", "water", "window", "winter",
    "yellow",
]  # fmt: skip
UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = [
    "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
]  # fmt: skip


def parts(name: str, ask: Callable[[random.Random], tuple[Hashable, str, str]]) -> dict[str, list[QA]]:
    """Test, validation and training questions, drawn in this order.

    Args:
        name: Of the task, part of the seed.
        ask: The identity of a question, the question and its answer. Of questions with one identity only the first is kept,
            so that no other wording of it is in another part.
    """
    rng = random.Random(f"{name}-{SEED}")
    seen: set[Hashable] = set()
    found: dict[str, list[QA]] = {}
    for part, size in SIZES.items():
        found[part] = []
        while len(found[part]) < size:
            identity, question, answer = ask(rng)
            if identity not in seen:
                seen.add(identity)
                found[part].append((question, answer))
    return found


def date(rng: random.Random) -> tuple[Hashable, str, str]:
    """A day of two centuries in one of three ways of writing, and as ISO 8601 has it."""
    first = datetime.date(1900, 1, 1).toordinal()
    day = datetime.date.fromordinal(first + rng.randrange(365 * 200))
    month = calendar.month_name[day.month]
    forms = (f"{day.day} {month} {day.year}", f"{month} {day.day}, {day.year}", f"{day.day}.{day.month}.{day.year}")
    return day, rng.choice(forms), day.isoformat()


def addition(rng: random.Random) -> tuple[Hashable, str, str]:
    """Two numbers of two or three digits, and their sum; which one is first does not make another question."""
    a, b = rng.randrange(10, 1000), rng.randrange(10, 1000)
    return frozenset((a, b)), f"{a} + {b}", str(a + b)


def sorting(rng: random.Random) -> tuple[Hashable, str, str]:
    """Three words, and the same in the order of the alphabet; their order does not make another question."""
    words = rng.sample(WORDS, 3)
    return frozenset(words), " ".join(words), " ".join(sorted(words))


def number(rng: random.Random) -> tuple[Hashable, str, str]:
    """A number below a million in words, every length alike, and its digits."""
    value = int(10 ** rng.uniform(1.5, 6))
    return value, in_words(value), str(value)


def in_words(value: int) -> str:
    """English words of a number below a million, as "forty-two thousand three hundred and seven"."""
    thousands, rest = divmod(value, 1000)
    if thousands:
        tail = f" {'and ' if rest < 100 else ''}{in_words(rest)}" if rest else ""
        return f"{in_words(thousands)} thousand{tail}"
    hundreds, rest = divmod(value, 100)
    if hundreds:
        return f"{UNITS[hundreds]} hundred" + (f" and {in_words(rest)}" if rest else "")
    tens, units = divmod(value, 10)
    return UNITS[value] if value < 20 else TENS[tens - 2] + (f"-{UNITS[units]}" if units else "")
