import pytest

from mops_fl.text_metrics import TextScores, exact_match, normalize_answer, rouge_l, score_texts


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The  Cat,\n sat. ", "the cat sat"),  # the article stays
        ("U.S.A.", "usa"),
        ("state-of-the-art", "stateoftheart"),
        ("[23, 106]", "23 106"),
        ("+ !", ""),
        ("Größe „x“", "größe „x“"),  # only ASCII punctuation goes
    ],
)
def test_answers_are_normalised_as_officially(text, normalised):
    assert normalize_answer(text) == normalised


@pytest.mark.parametrize(
    ("prediction", "references", "right"),
    [
        ("Paris.", ["paris"], True),
        ("Paris", ["London", "PARIS!"], True),
        ("the Paris", ["Paris"], False),
        ("Paris is", ["Paris"], False),
        ("", ["Paris"], False),
        ("...", ["!"], True),  # both are empty after normalisation, officially too
    ],
)
def test_exact_match_is_with_any_reference(prediction, references, right):
    assert exact_match(prediction, references) is right


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("the cat sat", ["the cat sat"], 1.0),
        ("the cat sat", ["the cat sat on the mat"], 2 * 1 * 0.5 / 1.5),  # 3 of 3, 3 of 6
        ("the cat sat on the mat", ["the cat sat"], 2 * 1 * 0.5 / 1.5),
        ("a b c d", ["a x c"], 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)),  # "a c" in order
        ("c b a", ["a b c"], 1 / 3),  # out of order only one word is common
        ("Running DOGS!", ["run dog"], 1.0),  # stems
        ("He was", ["he is"], 0.5),  # words of up to three letters are not stemmed
        ("a b", ["x", "a b c d", "a"], 2 * 1 * 0.5 / 1.5),  # 0, 0.667 and 0.667
        ("x", ["a", "x y", "x"], 1.0),  # the best, wherever it stands
        ("red", ["blue"], 0.0),
        ("", ["blue"], 0.0),
        ("+", ["+"], 0.0),  # no letter, no digit
    ],
)
def test_rouge_l_is_the_best_f_measure(prediction, references, score):
    assert rouge_l(prediction, references) == pytest.approx(score, abs=1e-12)


def test_scores_are_means_in_percent():
    scores = score_texts(
        ["Paris", "the cat sat", "no", "x"], [["paris"], ["the cat sat on the mat"], ["yes"], ["y", "x"]]
    )
    assert scores == TextScores(pytest.approx(50.0), pytest.approx(100 * (1 + 2 / 3 + 0 + 1) / 4))


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], []), (["a"], [["a"], ["b"]]), (["a"], [[]])])
def test_predictions_without_references_are_refused(predictions, references):
    with pytest.raises(ValueError, match=r"no predictions|argument 2|no references"):
        score_texts(predictions, references)


def test_prediction_without_references_has_no_rouge():
    with pytest.raises(ValueError, match="no references"):
        rouge_l("a", [])
