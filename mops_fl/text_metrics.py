"""ROUGE-L and exact match of texts against several references, as Super-Natural Instructions is evaluated.

After `eval/automatic/evaluation.py` of allenai/natural-instructions (its English tracks) and Wang et al. 2022
(arXiv 2204.07705): of several references the best counts, scores are means over predictions in percent.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from rouge_score.rouge_scorer import RougeScorer

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class TextScores:
    """Means over predictions, in percent.

    Attributes:
        exact_match: predictions that equal one of their references after `normalize_answer`.
        rouge_l: see `rouge_l`.
    """

    exact_match: float
    rouge_l: float


def score_texts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> TextScores:
    """Score each prediction against its own references.

    Raises:
        ValueError: there are no predictions, not as many as lists of references, or a list is empty.
    """
    pairs = list(zip(predictions, references, strict=True))
    if not pairs:
        raise ValueError("There are no predictions to score.")
    return TextScores(
        exact_match=100 * sum(exact_match(*pair) for pair in pairs) / len(pairs),
        rouge_l=100 * sum(rouge_l(*pair) for pair in pairs) / len(pairs),
    )


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the prediction equals one of the references, both normalised.

    Raises:
        ValueError: there are no references.
    """
    _require_some(references)
    return normalize_answer(prediction) in map(normalize_answer, references)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """The best ROUGE-L F-measure in 0..1: longest common subsequence of Porter-stemmed words, `2PR / (P + R)`.

    The words are runs of a-z and 0-9 in lower case; a text that has none, such as `"+"`, scores 0 even against itself.

    Raises:
        ValueError: there are no references.
    """
    _require_some(references)
    return max(float(_scorer().score(reference, prediction)["rougeL"].fmeasure) for reference in references)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, white space as single spaces; articles stay, other than in SQuAD."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def _require_some(references: Sequence[str]) -> None:
    if not references:
        raise ValueError("A prediction has no references to be scored against.")


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)
