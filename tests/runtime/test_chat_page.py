"""The chat page in headless Chromium, against a server with the model that ships.

`QCOMPILER_SCREENSHOT=docs/images/chat.png` keeps a picture at the end of the first test.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from server_case import serving

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.chrome.service import Service as Driver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium here (Debian: apt-get install chromium chromium-driver)"
)
NAME = "tiny-llama"
QUESTION = "Tell me a story about the sea."


@pytest.fixture(scope="module")
def server(tiny_q4):
    options = {"max_sequences": 4, "max_cache_tokens": 4096}
    with serving(tiny_q4, load_options=options, name=NAME) as running:
        yield running
        running.rest()


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-proxy-server"):
        options.add_argument(argument)
    options.add_argument("--window-size=1000,820")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Driver(DRIVER))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


class Page:
    def __init__(self, browser, server):
        self.browser = browser
        browser.get(server.url)
        self.wait(lambda: self.one("#model").text == NAME)

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def wait(self, condition, seconds=60.0):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.02)

    def set(self, **options):
        if not self.one("#settings").is_displayed():
            self.one("#toggle").click()
        for name, value in options.items():
            field = self.one(f"#{name}")
            field.clear()
            field.send_keys(str(value))
        self.one("#toggle").click()

    def ask(self, text):
        self.one("#text").send_keys(text, Keys.ENTER)

    @property
    def answer(self):
        return self.browser.execute_script(
            "return [...document.querySelectorAll('.message.assistant .body')].at(-1)?.textContent ?? ''"
        )

    def finished(self):
        self.wait(lambda: not self.all(".message.running") and self.all(".message, .error"))


@pytest.fixture
def page(browser, server):
    page = Page(browser, server)
    yield page
    severe = [e for e in browser.get_log("browser") if e["level"] == "SEVERE" and " 400 " not in e["message"]]
    assert severe == []
    resources = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [r for r in resources if not r.startswith((server.url, "data:"))] == []


def chat(server, *messages, **options):
    body = {"messages": [{"role": "user", "content": m} for m in messages], **options}
    return server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]


def test_a_message_is_answered_piece_by_piece(page, server):
    expected = chat(server, QUESTION, temperature=0, max_tokens=48)
    page.set(temperature=0, max=48)
    page.browser.execute_script(
        "window.lengths = new Set(); const talk = document.querySelector('#talk');"
        "const look = () => lengths.add(talk.querySelector('.assistant .body')?.textContent.length);"
        "new MutationObserver(look).observe(talk, { childList: true, subtree: true })"
    )
    page.ask(QUESTION)
    page.wait(lambda: page.all(".facts"))
    seen = page.browser.execute_script("return [...lengths].filter(length => length > 0)")
    assert len(seen) > 3  # it grew before our eyes
    assert page.answer == expected.lstrip()
    assert page.one(".message.user .body").text == QUESTION
    assert page.one(".facts").text.startswith("48 tokens · ")
    assert page.one(".facts").text.endswith("ended at the token limit")
    if picture := os.environ.get("QCOMPILER_SCREENSHOT"):
        page.set(temperature=0.7, max=80)
        page.one("#text").click()
        page.ask("Write a short poem.")
        page.finished()
        Path(picture).parent.mkdir(parents=True, exist_ok=True)
        page.browser.save_screenshot(picture)


def test_a_conversation_is_sent_whole(page, server):
    page.set(temperature=0, max=8, system="Be brief.")
    page.ask("Hello")
    page.finished()
    first = server.post(
        "/v1/chat/completions",
        {
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
            "temperature": 0,
            "max_tokens": 8,
        },
    ).json()["choices"][0]["message"]["content"]
    assert page.answer == first.lstrip()
    before = server.service.stats().counters.prompt_tokens
    page.ask("And then?")
    page.wait(lambda: len(page.all(".message.assistant")) == 2)
    page.finished()
    assert len(page.all(".message")) == 4
    assert server.service.stats().counters.prompt_tokens - before > 20  # what came before, too
    page.one("#new").click()
    assert not page.all(".message")
    page.set(system="")


def test_escape_stops_an_answer_and_frees_its_place(page, server):
    page.set(temperature=0.8, max=1500)
    page.ask(QUESTION)
    page.wait(lambda: len(page.answer) > 20)
    assert page.one("#send").get_attribute("aria-label") == "Stop"
    page.one("#text").send_keys(Keys.ESCAPE)
    page.finished()
    server.rest(5)
    assert page.one(".facts").text.endswith("stopped")
    assert len(page.answer) > 20  # what came stays
    assert page.one("#send").get_attribute("aria-label") == "Send"


def test_an_error_is_shown_and_can_be_tried_again(page, server):
    page.set(max=100_000)
    page.ask(QUESTION)
    page.wait(lambda: page.all(".error"))
    assert "max_tokens" in page.one(".error").text
    assert page.one(".error").get_attribute("role") == "alert"
    assert not page.all(".message.assistant")
    page.set(max=4)
    page.one(".error button").click()
    page.wait(lambda: page.all(".facts"))
    assert not page.all(".error")
    assert page.answer


def test_text_is_never_markup(page):
    page.set(max=1)
    page.ask("<img src=x> `a < b`")
    page.finished()
    assert page.one(".message.user .body").text == "<img src=x> a < b"
    assert not page.all("main img")
    assert page.one(".message.user code").text == "a < b"


def test_light_and_dark(page):
    def shade():
        color = page.one("body").value_of_css_property("background-color")
        return sum(int(part.strip(" rgba()")) for part in color.split(",")[:3])

    for wanted in ("dark", "light"):
        page.browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": wanted}]}
        )
        assert (shade() < 200) == (wanted == "dark")
    page.one("#theme").click()
    assert shade() < 200
    page.browser.refresh()
    assert shade() < 200  # remembered
    page.one("#theme").click()
    assert shade() > 600
