"""The page of `mops-fl explore` in Chromium: what a user clicks and sees, and that nothing is asked of anybody else."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium", path=os.pathsep.join(["/usr/bin", os.environ.get("PATH", "")]))
# Chromium's own services, which are no part of the page.
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
PATIENCE_MS = 60_000
NOTES = "[...document.querySelectorAll('.block.note')].map(note => note.innerText.trim()).filter(text => text)"


@pytest.fixture(scope="module")
def servers():
    """The command that `address` starts for the first test; it then ends by Ctrl-C, leaving nothing running."""
    started = []
    yield started
    for server in started:
        try:
            children = psutil.Process(server.pid).children(recursive=True)
            server.send_signal(signal.SIGINT)
            _, errors = server.communicate(timeout=30)
            assert server.returncode == 0, errors
            assert "Traceback" not in errors
            assert not [child for child in children if child.is_running()]
        finally:
            server.kill()


@pytest.fixture
def address(servers, make_usable_run):
    """Where a command serves a run of each prompt method, the same for all tests."""
    if not servers:
        runs = [make_usable_run(method, method=method).path for method in ("fedprompt", "mops")]
        command = [Path(sys.executable).with_name("mops-fl"), "explore", *runs, "--port", "0"]
        server = subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        servers.append(server)
        said = server.stdout.readline()
        match = re.match(r"(http://127\.0\.0\.1:\d+) ", said)
        assert match, said + server.stderr.read()
        server.address = match[1]
    return servers[0].address


@pytest.fixture
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium at /usr/bin/chromium or on the PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield started
        started.close()


@pytest.fixture
def page(browser, address):
    """The page, loaded; `page.asked` lists every address that it asked for anything."""
    opened = browser.new_page(viewport={"width": 1400, "height": 1000})
    opened.set_default_timeout(PATIENCE_MS)
    opened.asked, opened.mistakes = [], []
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.on("pageerror", lambda error: opened.mistakes.append(str(error)))
    opened.goto(address)
    opened.wait_for_selector("#ask")
    return opened


def image_of_map(page):
    return page.locator(".wide img").get_attribute("src")


def test_user_asks_an_example_and_sees_answers_gate_and_map(page, address):
    before = image_of_map(page)
    page.get_by_role("button", name="open qa", exact=True).click()
    page.wait_for_function("document.querySelector('#instruction textarea').value.length > 0")
    page.click("#ask")
    page.wait_for_function(f"{NOTES}.length === 3 && {NOTES}.every(note => note.includes(' a second'))")
    labels = [text.strip() for text in page.locator(".answer label > span").all_inner_texts()]
    assert labels == ["bare model", "FedPrompt", "MoPs"]
    answers = [box.input_value() for box in page.locator(".answer textarea").all()]
    assert len(set(answers)) == 3
    assert all(answers)
    percent = [float(text) for text in re.findall(r"([\d.]+)%", page.locator("#gate-2").inner_text())]
    assert len(percent) == 7
    assert sum(percent) == pytest.approx(100, abs=4)  # each is rounded
    assert image_of_map(page) != before
    assert page.locator("#perplexity td").count() == 8 * 6
    assert not page.mistakes
    outside = [url for url in page.asked if not url.startswith((address, "data:", "blob:"))]
    assert not outside
    assert len(page.asked) > 20


def test_stop_ends_an_answer_and_the_next_question_is_answered(page):
    page.get_by_role("button", name="How answers are made").click()
    page.locator("input[type=number]").first.fill("400")
    page.locator("#instruction textarea").fill("Go on.")
    page.click("#ask")
    page.wait_for_function(f"{NOTES}.includes('writing …')")
    page.click("#stop")
    page.wait_for_function(f"{NOTES}.some(note => note === 'stopped')")
    page.locator("input[type=number]").first.fill("8")
    page.click("#ask")
    page.wait_for_function(f"{NOTES}.length === 3 && {NOTES}.every(note => note.startsWith('8 tokens'))")


def test_empty_question_is_told_and_narrow_screens_are_not_overflown(page):
    page.click("#ask")
    page.get_by_text("Type an instruction first.").wait_for()
    page.set_viewport_size({"width": 400, "height": 800})
    page.wait_for_function("document.documentElement.scrollWidth <= 400")
