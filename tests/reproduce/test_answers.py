"""What makes an answer right, and how good captions are: values computed by hand, and dense oracles."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from reproduce.mergebench import answers
from reproduce.mergebench.captions import bleu, cider, longest_common, ngrams, rouge_l, words
from reproduce.mergebench.questions import Questions, read
from reproduce.mergebench.scoring import score
from reproduce.mergebench.tasks import TASKS


@pytest.mark.parametrize(
    ("answer", "named"),
    [("B", "B"), ("B. a rock", "B"), ("The answer is C.", "C"), ("Because of that. The answer is D. Yes", "D"),
     ("The answer is A. The answer is B.", None), ("b", None), ("Both", None), ("", None), ("AB", None)],
)  # fmt: skip
def test_letters_of_options(answer: str, named: str | None) -> None:
    """An option counts where it is named once and plainly."""
    assert answers.letter(answer) == named


def test_right_answers() -> None:
    """Each rule on what it takes and what it does not."""
    assert answers.equal("Two Dogs", {"answer": "two dogs"}) and not answers.equal("dogs", {"answer": "two dogs"})
    assert answers.equal("3", {"answer": 3})
    assert answers.contained("a golden retriever.", {"answer": "Golden retriever"})
    assert answers.contained("retriever", {"answer": "Golden retriever"}) and not answers.contained(
        "cat", {"answer": "dog"}
    )
    assert answers.equal_or_unanswerable("Tim", {"answer": "tim"})
    assert not answers.equal_or_unanswerable("Unanswerable", {"answer": "Unanswerable"})
    question = {"choices": ["x", "y"], "answer_index": 1}
    assert answers.option("B", question) and not answers.option("A", question)
    assert not answers.option("C", {"choices": ["x", "y"], "answer_index": 2})


def test_boxes() -> None:
    """Two unit squares that share a half have an IoU of a third; above one half is right, one half is not."""
    assert answers.iou([0, 0, 1, 1], [0.5, 0, 1.5, 1]) == pytest.approx(1 / 3)
    assert answers.iou([0, 0, 1, 1], [2, 2, 3, 3]) == 0 == answers.iou([1, 1, 1, 1], [1, 1, 1, 1])
    assert answers.box("[0.1, 0.2, 0.3, 0.4]") == (0.1, 0.2, 0.3, 0.4) and answers.box("[0.1, 0.2]") is None
    true = {"answer_bbox": "[0.0, 0.0, 1.0, 1.0]"}
    assert answers.overlapping("[0.0,0.0,1.0,0.51]", true) and not answers.overlapping("[0.0,0.0,1.0,0.5]", true)
    assert not answers.overlapping("on the left", true)


def test_true_boxes_are_checked_first(tmp_path: Path) -> None:
    """A question file with a box of another form is refused before anything is asked, not when answers are scored."""
    file = tmp_path / TASKS["REC"].questions
    file.parent.mkdir()
    rows = [{"question_id": 1, "text": "the dog", "answer_bbox": [0.1, 0.1, 0.9, 0.9]}]
    file.write_text(json.dumps(rows))
    assert answers.overlapping("[0.1,0.1,0.9,0.9]", read(TASKS["REC"], tmp_path, tmp_path).rows[0])
    file.write_text(json.dumps([*rows, {**rows[0], "answer_bbox": "left"}]))
    with pytest.raises(SystemExit, match=r"test\.json: found the box 'left': expected four numbers"):
        read(TASKS["REC"], tmp_path, tmp_path)


def test_boxes_as_published() -> None:
    """The benchmark's program loses the last digit: 0.59 becomes 0.5, which decides here."""
    true = {"answer_bbox": "[0.0, 0.0, 1.0, 1.0]"}
    assert answers.overlapping("[0.0,0.0,1.0,0.59]", true)
    assert not answers.overlapping_as_published("[0.0,0.0,1.0,0.59]", true)
    assert answers.overlapping_as_published("[0.0,0.0,1.0,0.69]", true)


def test_words() -> None:
    """Lower case, no punctuation, clitics by themselves."""
    assert words("A man's dog, isn't it? Well-known!") == ["a", "man", "'s", "dog", "is", "n't", "it", "well-known"]


def test_bleu_by_hand() -> None:
    """The classic clipped count, the brevity penalty, and the closest reference's length."""
    reference = ["the", "cat", "is", "on", "the", "mat"]
    found = bleu([["the", "the", "the", "the", "the", "the", "the"]], [[reference]])
    assert found == [pytest.approx(2 / 7), 0, 0, 0]
    # Four words of six, all matched: exp(1 - 6/4).
    assert bleu([["the", "cat", "is", "on"]], [[reference]]) == [pytest.approx(math.exp(-0.5))] * 4
    # Of references of three and nine words the one of three is closer to four.
    assert bleu([["a", "b", "c", "d"]], [[["a", "b", "c"], ["a", "b", "c", "d", "e", "f", "g", "h", "i"]]])[0] == 1.0
    assert bleu([["x", "y"], ["a", "b"]], [[["a", "b"]], [["a", "b"]]])[:2] == [0.5, 0.5]


def test_rouge_by_hand() -> None:
    """Precision 3/4 and recall 3/5 of one reference; of several the best of each."""
    candidate, reference = ["a", "b", "c", "d"], ["a", "x", "b", "c", "y"]
    p, r = 3 / 4, 3 / 5
    assert rouge_l([candidate], [[reference]]) == pytest.approx((1 + 1.44) * p * r / (r + 1.44 * p))
    assert rouge_l([candidate], [[reference, candidate]]) == 1.0 and rouge_l([candidate], [["z"]]) == 0.0
    assert rouge_l([[]], [[reference]]) == 0.0


def test_longest_common_subsequence() -> None:
    """Against all subsequences of short lists."""
    rng = random.Random(0)
    for _ in range(50):
        a, b = ([rng.choice("abc") for _ in range(rng.randint(0, 6))] for _ in range(2))
        subsequences = {s for k in range(len(a) + 1) for s in itertools.combinations(a, k)}
        others = {s for k in range(len(b) + 1) for s in itertools.combinations(b, k)}
        assert longest_common(a, b) == max(len(s) for s in subsequences & others)


def dense_cider(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """CIDEr-D on dense float64 vectors over all n-grams."""
    scores = np.zeros(len(candidates))
    for n in range(1, 5):
        every = sorted({g for texts in [*references, candidates] for text in texts for g in ngrams(text, n)})
        position = {gram: index for index, gram in enumerate(every)}

        def vector(text: Sequence[str], n: int = n, position: dict[tuple[str, ...], int] = position) -> np.ndarray:
            counts = np.zeros(len(position))
            for start in range(len(text) - n + 1):
                counts[position[tuple(text[start : start + n])]] += 1
            return counts

        present = np.array([np.sum([vector(ref) for ref in refs], axis=0) > 0 for refs in references])
        idf = np.log(len(references)) - np.log(np.maximum(1, present.sum(axis=0)))
        for image, (candidate, refs) in enumerate(zip(candidates, references, strict=True)):
            for ref in refs:
                c, r = vector(candidate) * idf, vector(ref) * idf
                norm = np.linalg.norm(c) * np.linalg.norm(r)
                near = np.exp(-((len(candidate) - len(ref)) ** 2) / 72)
                scores[image] += 10 / 4 * near * (np.minimum(c, r) @ r / norm if norm else 0) / len(refs)
    return float(scores.mean())


def test_cider_against_dense_vectors() -> None:
    """Random captions over a few words, many n-grams shared."""
    rng = random.Random(1)
    vocabulary = ["a", "the", "dog", "man", "runs", "on", "red", "grass", "with", "ball"]
    for _ in range(5):
        references = [[[rng.choice(vocabulary) for _ in range(rng.randint(2, 9))] for _ in range(3)] for _ in range(6)]
        candidates = [[*rng.choice(refs)[: rng.randint(0, 5)], rng.choice(vocabulary)] for refs in references]
        found = cider(candidates, references)
        assert found > 0.1 and found == pytest.approx(dense_cider(candidates, references), abs=1e-12)


def test_cider_by_hand() -> None:
    """A caption that is its only reference scores ten where its n-grams are its own; one of another image scores nothing."""
    one, two = ["a", "b", "c", "d"], ["e", "f", "g", "h"]
    assert cider([one, two], [[one], [two]]) == pytest.approx(10) and cider([two, one], [[one], [two]]) == 0
    # Unigrams and bigrams alone: three words have one trigram and no four in a row.
    assert cider([["a", "b", "c"], two], [[["a", "b", "c"]], [two]]) == pytest.approx((7.5 + 10) / 2)


def test_scores_of_tasks() -> None:
    """Shares in %, boxes by both rules, captions as a mean that says what it lacks; a wrong number of answers is refused."""
    asked = Questions(TASKS["VQAv2"], [{"answer": "yes"}, {"answer": "no"}])
    assert score(asked, ["Yes", "maybe"]).value == 50.0
    with pytest.raises(ValueError, match="found 1 answers: expected 2"):
        score(asked, ["yes"])
    boxes = Questions(TASKS["REC"], [{"answer_bbox": "[0.0, 0.0, 1.0, 1.0]"}] * 2)
    found = score(boxes, ["[0.0,0.0,1.0,0.59]", "[0.0,0.0,1.0,0.90]"])
    assert found.value == 50.0 and found.parts == {"numbers read whole": 100.0}


def test_captions_without_meteor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of six measures is not compared with the paper's of seven."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    captions = Questions(TASKS["Flickr30k"], [{}, {}], [["A b c d e."], ["F g h i j!"]])
    found = score(captions, ["a b c d e", "f g h i j"])
    assert not found.comparable and set(found.parts) == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"}
    assert found.value == pytest.approx((5 * 100 + 1000) / 6)
