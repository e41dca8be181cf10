import json
import re
from collections import Counter
from importlib.resources import files

import numpy as np
import pytest

COLUMNS = ["instruction", "context", "response", "category"]
CONTEXT_TASKS = {"closed_qa", "summarization", "information_extraction"}
TASKS = CONTEXT_TASKS | {"creative_writing", "open_qa", "classification", "brainstorming"}


@pytest.fixture(scope="module")
def rows():
    text = files("mops_fl").joinpath("sample/dolly-sample.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_sample_has_sixty_rows_of_each_task(rows):
    assert Counter(row["category"] for row in rows) == dict.fromkeys(TASKS, 60)


def test_sample_has_dollys_columns_and_only_strings(rows):
    for row in rows:
        assert list(row) == COLUMNS
        assert all(isinstance(value, str) and value == value.strip() for value in row.values())
        assert row["instruction"]
        assert 1 <= len(row["response"].split()) <= 80


def test_sample_has_no_duplicates(rows):
    assert len({(row["instruction"], row["context"]) for row in rows}) == len(rows)
    assert len({row["response"] for row in rows}) == len(rows)


def test_sample_passages_serve_one_row_each(rows):
    # A passage in two rows would leak from training to test, and with another task's label.
    passages = [row["context"] for row in rows if row["category"] in CONTEXT_TASKS]
    assert len(set(passages)) == len(passages)
    assert all(40 <= len(passage.split()) <= 120 for passage in passages)


def test_sample_needs_no_context_in_the_other_tasks(rows):
    others = [row for row in rows if row["category"] not in CONTEXT_TASKS]
    assert sum(not row["context"] for row in others) > 0.95 * len(others)


def test_sample_mixes_tasks_throughout(rows):
    for start in range(0, len(rows), 60):
        assert {row["category"] for row in rows[start : start + 60]} == TASKS


def test_sample_tasks_can_be_told_apart_by_their_words(rows):
    # A gate must be able to learn the tasks from question and context alone.
    # Chance is 1/7 = 0.14; five seeds of the folds gave 0.73 to 0.75.
    vectors = bag_of_words([f"{row['instruction']} {row['context']}" for row in rows])
    labels = np.array([row["category"] for row in rows])
    folds = np.random.default_rng(0).permutation(len(rows)) % 5
    predicted = np.empty_like(labels)
    for fold in range(5):
        train, test = folds != fold, folds == fold
        predicted[test] = nearest_centroid(vectors[train], labels[train], vectors[test])
    assert (predicted == labels).mean() > 0.6


def bag_of_words(texts):
    """Unit-length vectors of word presence, (rows, vocabulary)."""
    words = [set(re.findall(r"\w+", text.lower())) for text in texts]
    index = {word: column for column, word in enumerate(sorted(set().union(*words)))}
    vectors = np.zeros((len(texts), len(index)))
    for row, present in enumerate(words):
        vectors[row, [index[word] for word in present]] = 1
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def nearest_centroid(vectors, labels, queries):
    """For each query, the label whose centroid has the highest cosine similarity."""
    names = np.unique(labels)
    centroids = np.stack([vectors[labels == name].mean(axis=0) for name in names])
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    return names[(queries @ centroids.T).argmax(axis=1)]
