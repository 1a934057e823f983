"""The playground in real headless Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait
from serving_cases import Server

pytestmark = pytest.mark.slow
SECRET = "page-secret-key"


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    chromium, driver = (
        next(filter(None, map(shutil.which, names)), None)
        for names in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver", "chromium-driver"))
    )
    if chromium is None or driver is None:
        pytest.skip("needs Chromium and its driver (Debian: chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,800"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


class Page:
    """What a person does and sees."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser = browser
        browser.get(url)
        self.until(lambda: self.text("model") == "tiny")

    def __getitem__(self, name: str) -> WebElement:
        return self.browser.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return self[name].text

    def until(self, condition: Callable[[], object], seconds: float = 60) -> None:
        WebDriverWait(self.browser, seconds, poll_frequency=0.05).until(lambda _: condition())

    def set(self, name: str, value: object) -> None:
        self[name].clear()
        self[name].send_keys(str(value))

    def turns(self, kind: str) -> list[str]:
        return [one.text for one in self.browser.find_elements(By.CSS_SELECTOR, f".turn.{kind} > div:first-child")]

    def answered(self) -> bool:
        return self["send"].is_enabled()

    def contexts(self) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, "#contexts .pick")

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture
def page(browser: webdriver.Chrome, serve: Callable[..., Server]) -> Page:
    page = Page(browser, serve().url)
    for name, value in (("max_tokens", 24), ("seed", 1)):
        page.set(name, value)
    return page


def test_complete_fork_and_pick_with_the_keyboard_alone(page: Page) -> None:
    page["prompt"].send_keys("It was a dark and stormy night", Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.answered() and page.turns("model"))
    first = page.turns("model")[0]
    tokens = page.text("tokens")
    assert first and 30 < int(tokens) <= 30 + 24
    page["prompt"].send_keys(" and so", Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.answered() and len(page.turns("model")) == 2)
    second = page.turns("model")[1]
    assert int(page.text("tokens")) > int(tokens) + len(" and so")
    fork = page.browser.find_elements(By.CSS_SELECTOR, ".turn .row button")[0]
    fork.send_keys(Keys.ENTER)
    page.until(lambda: f"forked at {tokens} tokens" in page.text("status"))
    assert page.turns("model") == [first] and page.text("tokens") == tokens
    page["prompt"].send_keys(" and so", Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.answered() and len(page.turns("model")) == 2)
    assert page.turns("model")[1] == second, "a fork goes on as the original did"
    page["prompt"].send_keys(Keys.ALT, "n")
    page.until(lambda: page.text("tokens") == "0")
    assert len(page.contexts()) == 4 and not page.errors()


def test_a_file_is_read_with_progress_and_memory_stays_flat(page: Page, tmp_path: Path) -> None:
    long = tmp_path / "long text.txt"
    long.write_text("All happy families are alike. " * 1_000)
    page["file"].send_keys(str(long))
    page.until(lambda: page["progress"].is_displayed())
    page.until(lambda: "tokens in" in page.text("status"))
    assert page.text("tokens") == "30,000" and page.contexts()[0].text.startswith("long text.txt")
    points = [tuple(map(float, point.split(","))) for point in page["line"].get_attribute("points").split()]
    assert len(points) > 3 and points == sorted(points)
    page["prompt"].send_keys("So", Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.answered() and page.turns("model"))
    assert page.text("tokens").startswith("30,0") and not page.errors()


def test_chat_and_stop(page: Page) -> None:
    page["mode"].send_keys("chat")
    page["prompt"].send_keys("Hello", Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.answered() and page.turns("model"))
    assert page.turns("user") == ["Hello"]
    page["mode"].send_keys("complete")
    page.set("max_tokens", 4000)
    page["prompt"].send_keys("Stop me", Keys.CONTROL, Keys.ENTER)
    page.until(lambda: len(page.turns("model")) == 2 and page.turns("model")[1])
    page["prompt"].send_keys(Keys.ESCAPE)
    page.until(page.answered)
    assert "stopped" in page.text("status")


def test_what_the_model_says_is_text_and_no_markup(page: Page) -> None:
    page["prompt"].send_keys(
        "<img src=x onerror=alert(1)><script>document.title='bad'</script>", Keys.CONTROL, Keys.ENTER
    )
    page.until(lambda: page.answered() and page.turns("model"))
    assert not page.browser.find_elements(By.CSS_SELECTOR, "#text img") and page.browser.title == "megalodon"


def test_nothing_is_asked_of_any_other_server(page: Page) -> None:
    names = page.browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert names and all(name.startswith(page.browser.current_url) for name in names)


def test_a_key_is_asked_for_and_used(
    browser: webdriver.Chrome, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGALODON_API_KEYS", SECRET)
    browser.get(serve().url)
    WebDriverWait(browser, 20).until(lambda _: "no API key" in browser.find_element(By.ID, "status").text)
    browser.find_element(By.ID, "key").send_keys(SECRET, Keys.TAB)
    WebDriverWait(browser, 20).until(lambda _: browser.find_element(By.ID, "model").text == "tiny")
