"""Measures of captions: BLEU, ROUGE-L and CIDEr, as the evaluation of COCO captions defines them.

BLEU: Papineni et al., ACL 2002. ROUGE-L: Lin, 2004. CIDEr: Vedantam, Zitnick, Parikh, CVPR 2015; what the COCO program calls
so is the paper's CIDEr-D, without its stemming. Tokens are the caller's; :func:`words` is close to the COCO program's Penn
Treebank tokenizer (lower case, no punctuation) and not the same.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

ORDERS = 4  # n-grams up to
BETA = 1.2  # of ROUGE-L: how much more recall counts than precision
SIGMA = 6.0  # of CIDEr-D: how far lengths may differ
NGrams = Counter[tuple[str, ...]]


def words(text: str) -> list[str]:
    """Lower case, without punctuation; a hyphen or a dot within a word stays, ``'s`` and ``n't`` are words of their own."""
    apart = re.sub(r"(?<=[a-z])(n't|'(?:s|re|ve|ll|d|m))\b", r" \1", text.lower())
    return re.findall(r"n't\b|'(?:s|re|ve|ll|d|m)\b|[a-z0-9]+(?:[-.][a-z0-9]+)*", apart)


def ngrams(tokens: Sequence[str], n: int) -> NGrams:
    """How often each sequence of ``n`` words occurs."""
    return Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def bleu(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """Corpus BLEU-1 to BLEU-4 with the length of the closest reference.

    Args:
        candidates: One tokenised caption an image.
        references: Several an image.
    """
    matched, total = [0] * ORDERS, [0] * ORDERS
    length = closest = 0
    for candidate, refs in zip(candidates, references, strict=True):
        length += len(candidate)
        closest += min((abs(len(ref) - len(candidate)), len(ref)) for ref in refs)[1]
        for n in range(1, ORDERS + 1):
            counts, most = ngrams(candidate, n), Counter()
            for ref in refs:
                most |= ngrams(ref, n)
            matched[n - 1] += (counts & most).total()
            total[n - 1] += max(len(candidate) - n + 1, 0)
    brevity = 1.0 if length > closest else math.exp(1 - closest / max(length, 1))
    scores, logs = [], 0.0
    for n in range(ORDERS):
        logs += math.log(matched[n] / total[n]) if matched[n] and total[n] else -math.inf
        scores.append(brevity * math.exp(logs / (n + 1)))
    return scores


def rouge_l(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """Mean over images of the F measure of the longest common subsequence, with the best recall and the best precision over the
    references."""
    scores = []
    for candidate, refs in zip(candidates, references, strict=True):
        common = [longest_common(candidate, ref) for ref in refs]
        precision = max(c / len(candidate) for c in common) if candidate else 0.0
        recall = max(c / len(ref) if ref else 0.0 for c, ref in zip(common, refs, strict=True))
        below = recall + BETA**2 * precision
        scores.append((1 + BETA**2) * precision * recall / below if precision and recall else 0.0)
    return sum(scores) / len(scores)


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = row
        row = [0]
        for column, other in enumerate(b, 1):
            row.append(before[column - 1] + 1 if word == other else max(before[column], row[-1]))
    return row[-1]


def cider(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """CIDEr-D, mean over images: ten times the mean over n of the clipped cosine of TF-IDF vectors, less for other lengths.

    An n-gram's document frequency is the number of images in whose references it occurs.
    """
    frequencies: list[Counter[tuple[str, ...]]] = [Counter() for _ in range(ORDERS)]
    for refs in references:
        for n in range(ORDERS):
            frequencies[n].update({gram for ref in refs for gram in ngrams(ref, n + 1)})
    images = math.log(len(references))
    scores = []
    for candidate, refs in zip(candidates, references, strict=True):
        total = 0.0
        for ref in refs:
            near = math.exp(-((len(candidate) - len(ref)) ** 2) / (2 * SIGMA**2))
            total += near * sum(
                _clipped(ngrams(candidate, n + 1), ngrams(ref, n + 1), frequencies[n], images) for n in range(ORDERS)
            )
        scores.append(10 * total / ORDERS / len(refs))
    return sum(scores) / len(scores)


def _clipped(candidate: NGrams, reference: NGrams, frequency: Mapping[tuple[str, ...], int], images: float) -> float:
    """Cosine of two TF-IDF vectors, the candidate's entries at most the reference's."""

    def weighted(counts: NGrams) -> dict[tuple[str, ...], float]:
        return {gram: count * (images - math.log(max(1, frequency[gram]))) for gram, count in counts.items()}

    ours, theirs = weighted(candidate), weighted(reference)
    lengths = math.hypot(*ours.values()) * math.hypot(*theirs.values())
    product = sum(min(value, theirs[gram]) * theirs[gram] for gram, value in ours.items() if gram in theirs)
    return product / lengths if lengths else 0.0


def caption_scores(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> dict[str, float]:
    """Every measure but METEOR, of tokenised captions."""
    found = {f"BLEU-{n}": value for n, value in enumerate(bleu(candidates, references), 1)}
    return {**found, "ROUGE-L": rouge_l(candidates, references), "CIDEr": cider(candidates, references)}
