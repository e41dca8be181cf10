"""Streamed answers are the library's, one is computed at a time, and what is given up ends."""

import itertools
import time

import pytest

from experiments.explore_answers import Answerer
from experiments.explore_models import load_exhibits
from mops_fl.errors import InputError

OPTIONS = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def exhibits(make_usable_run):
    runs = [make_usable_run(method, method=method) for method in ("fedprompt", "mops")]
    return load_exhibits(runs, None, "auto", "auto")


@pytest.fixture
def answerer(exhibits):
    made = Answerer(exhibits)
    yield made
    made.close()


def endless(exhibits, monkeypatch):
    """Let no answer end by itself; hands back the token counts of those that have ended."""
    lengths = []
    for exhibit in exhibits:
        generate = exhibit.model.generate

        def counted(*, generate=generate, **options):
            output = generate(**{**options, "eos_token_id": -1})
            lengths.append(output.shape[1] - options["input_ids"].shape[1])
            return output

        monkeypatch.setattr(exhibit.model, "generate", counted)
    return lengths


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_answers_grow_one_behind_the_other_into_the_librarys(answerer, exhibits):
    answers = list(answerer.stream("Sum up.", "A text.", OPTIONS))
    for place, exhibit in enumerate(exhibits):
        *growing, last = [answer for answer in answers if answer.place == place]
        assert last.text == exhibit.model.answer(["Sum up."], ["A text."], **OPTIONS)[0]
        assert all(later.text.startswith(earlier.text) for earlier, later in itertools.pairwise(growing))
        assert {answer.note for answer in growing} == {""}
        assert last.note.startswith("12 tokens, ")
        assert last.note.endswith(" a second, cut off at the limit")
    assert [answer.place for answer in answers] == sorted(answer.place for answer in answers)


def test_gate_scores_are_the_models_own(answerer, exhibits):
    bare, fedprompt, mops = answerer.gate_scores("Sum up.", "A text.")
    assert bare is fedprompt is None
    assert mops == exhibits[2].model.gate(**exhibits[2].model.encode(["Sum up."], ["A text."]))[0].tolist()
    assert sum(mops) == pytest.approx(1)


def test_answer_that_nobody_reads_on_ends_and_the_next_is_computed(answerer, exhibits, monkeypatch):
    lengths = endless(exhibits, monkeypatch)
    stream = answerer.stream("Why?", "", {**OPTIONS, "max_new_tokens": 400})
    next(stream)
    stream.close()
    assert answerer.gate_scores("Why?", "")[2]  # waits for the one thread
    assert len(lengths) == 1
    assert 0 < lengths[0] < 400


def test_closing_ends_what_is_computed(exhibits, monkeypatch):
    lengths = endless(exhibits, monkeypatch)
    answerer = Answerer(exhibits)
    stream = answerer.stream("Why?", "", {**OPTIONS, "max_new_tokens": 400})
    next(stream)
    answerer.close()
    wait_until(lambda: lengths)
    assert 0 < lengths[0] < 400


def test_failure_reaches_the_reader_instead_of_leaving_it_waiting(answerer, exhibits, monkeypatch):
    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(exhibits[1].model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(answerer.stream("Why?", "", OPTIONS))


def test_question_that_does_not_fit_is_refused(answerer):
    with pytest.raises(InputError, match=r"longer than \d+ tokens; shorten it or the answer"):
        list(answerer.stream("Why? " * 200, "", OPTIONS))
    with pytest.raises(InputError, match=r"longer than \d+ tokens"):
        answerer.gate_scores("Why? " * 200, "")
