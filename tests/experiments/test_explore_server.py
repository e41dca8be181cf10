"""The page over HTTP, without a browser: its answers, its reports, and that it keeps to this machine."""

import json
import re

import pytest
from starlette.testclient import TestClient

from experiments.explore_answers import Answerer
from experiments.explore_models import load_exhibits
from experiments.explore_page import build_page
from experiments.explore_server import build_app
from experiments.report import write_report

METHODS = ("fedprompt", "mops")
GREEDY = [8, 0, 1]  # most tokens, temperature, penalty


@pytest.fixture
def runs(make_usable_run):
    return [make_usable_run(method, method=method) for method in METHODS]


@pytest.fixture
def exhibits(runs):
    return load_exhibits(runs, None, "auto", "auto")


@pytest.fixture
def client(runs, exhibits):
    answerer = Answerer(exhibits)
    write_report(runs[1])
    with TestClient(build_app(build_page(exhibits, answerer), runs), base_url="http://127.0.0.1") as made:
        yield made
    answerer.close()


def is_unchanged(value):
    return isinstance(value, dict) and value.get("__type__") == "update"


def ask(client, *values):
    """The server's events for one question: their names, and what the page shows after the last."""
    call = client.post("/gradio_api/call/answer", json={"data": list(values)})
    assert call.status_code == 200, call.text
    text = client.get(f"/gradio_api/call/answer/{call.json()['event_id']}").text
    events = re.findall(r"event: (\w+)\ndata: (.*)\n", text)
    shown = {}
    for values in (json.loads(data) for name, data in events if name in ("generating", "complete")):
        shown |= {place: value for place, value in enumerate(values) if not is_unchanged(value)}
    return [name for name, _ in events], [shown[place] for place in sorted(shown)]


def test_question_is_answered_by_all_with_bars_and_map(client, exhibits):
    names, shown = ask(client, "Sum up.", "A text.", *GREEDY)
    assert names.count("generating") > 3
    assert names[-1] == "complete"
    texts, notes, (bars, heat_map) = shown[:3], shown[3:6], shown[6:]
    options = {"max_new_tokens": 8, "do_sample": False}
    assert texts == [exhibit.model.answer(["Sum up."], ["A text."], **options)[0] for exhibit in exhibits]
    assert all(note.startswith("8 tokens, ") for note in notes)
    mops = exhibits[2].model
    scores = mops.gate(**mops.encode(["Sum up."], ["A text."]))[0].tolist()
    given = {bar["label"]: bar["confidence"] for bar in bars["confidences"]}
    expected = dict(zip(mops.description.expert_names, scores, strict=True))
    assert given == pytest.approx({name.replace("_", " "): score for name, score in expected.items()})
    assert 'src="data:image/png;base64,' in heat_map


@pytest.mark.parametrize("values", [("  ", "A text.", *GREEDY), ("Why? " * 300, "", *GREEDY)])
def test_question_that_cannot_be_answered_is_not_and_the_next_one_is(values, client):
    names, shown = ask(client, *values)
    assert names[-1] == "complete"
    assert not any(shown[:6])
    names, shown = ask(client, "Why?", "", *GREEDY)
    assert names[-1] == "complete"
    assert all(shown[:6])


def test_settings_out_of_range_are_refused(client):
    assert ask(client, "Why?", "", 100_000, 0, 1)[0][-1] == "error"


def test_page_holds_the_runs_figures_and_examples(client):
    text = client.get("/").text
    assert "| task | bare model | FedPrompt, before | FedPrompt | MoPs, before | MoPs |" in text
    assert "information extraction" in text


def test_reports_are_those_of_the_runs(client, runs):
    assert client.get("/report/1").text == (runs[1].path / "report.html").read_text(encoding="utf-8")
    assert [client.get(f"/report/{place}").status_code for place in (0, 2, -1)] == [404, 404, 404]
    page = client.get("/").text
    assert "[MoPs](report/1)" in page
    assert "report/0" not in page


def test_page_loads_and_may_load_nothing_from_elsewhere(client):
    response = client.get("/")
    assert response.headers["content-security-policy"].startswith("default-src 'self' ")
    loaded = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="([^"]+)"', response.text)
    assert loaded
    assert not [address for address in loaded if re.match(r"(https?:)?//(?!127\.0\.0\.1)", address)]
    style = client.get("/theme.css").text
    assert "system-ui" in style
    assert not re.search(r"""(url\(|@import )['"]?(https?:)?//""", style)


def test_other_names_of_this_machine_are_refused(client):
    assert client.get("/", headers={"host": "example.org"}).status_code == 400
    assert client.get("/", headers={"host": "localhost:7860"}).status_code == 200
