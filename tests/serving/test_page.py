"""The page in real headless Chromium, as a person uses it: with the mouse, the keyboard, a phone, a screen reader."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait
from serving_cases import Server, eventually

pytestmark = pytest.mark.slow
SECRET = "page-secret-key"
DESK, PHONE = (1280, 800), (390, 844)
BOOK = "All happy families are alike; “every” unhappy family is unhappy in its own way. "


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
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


class Page:
    """What a person does and sees."""

    def __init__(self, browser: webdriver.Chrome, server: Server) -> None:
        self.browser, self.server = browser, server
        self.screen(*DESK)
        browser.get(server.url)
        self.until(lambda: self.text("model") == "tiny")

    def __getitem__(self, name: str) -> WebElement:
        return self.browser.find_element(By.ID, name)

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, name: str) -> str:
        return self[name].text

    def until(self, condition: Callable[[], object], seconds: float = 60) -> None:
        WebDriverWait(self.browser, seconds, poll_frequency=0.05).until(lambda _: condition())

    def set(self, **values: object) -> None:
        self.browser.execute_script(
            "for (const [name, value] of Object.entries(arguments[0])) { const field = document.getElementById(name);"
            " field.value = value; field.dispatchEvent(new Event('change')) }",
            values,
        )

    def screen(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def reload(self) -> None:
        self.browser.refresh()
        self.until(lambda: self.text("model") == "tiny")

    def turns(self, kind: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(one => one.textContent)"
        return self.browser.execute_script(script, f".turn.{kind} .body")

    def answered(self) -> bool:
        return self["send"].is_enabled()

    def say(self, text: str) -> str:
        """Send a text; its answer."""
        self["prompt"].send_keys(text, Keys.CONTROL, Keys.ENTER)
        self.until(lambda: self.answered() and text in self.turns("user") and self.all(".turn.model .fork"))
        return self.turns("model")[-1]

    def read(self, folder: Path, name: str = "long text.txt", text: str = BOOK * 60) -> None:
        (folder / name).write_text(text)
        self["file"].send_keys(str(folder / name))
        self.until(lambda: "tokens in" in self.text("status") and not self["now"].is_displayed())

    def rows(self) -> list[str]:
        script = "return [...document.querySelectorAll('#contexts .pick .label')].map(one => one.textContent)"
        return self.browser.execute_script(script)

    def kept(self) -> list[dict]:
        with self.server.http() as client:
            return client.get("/v1/contexts").json()["data"]

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture
def page(browser: webdriver.Chrome, serve: Callable[..., Server]) -> Iterator[Page]:
    page = Page(browser, serve())
    page.set(max_tokens=24, seed=1)
    yield page
    assert not page.errors()


@pytest.fixture
def slow(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that last long enough to be broken off."""
    step = page.server.engine.step

    def slowly() -> object:
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(page.server.engine, "step", slowly)
    page.set(max_tokens=4000, temperature=0)


def test_a_fork_goes_on_as_the_original_did(page: Page) -> None:
    first = page.say("It was a dark and stormy night")
    tokens = page.text("tokens")
    assert first and 30 < int(tokens) <= 30 + 24
    second = page.say(" and so")
    assert int(page.text("tokens")) > int(tokens) + len(" and so")
    page.all(".turn.model .fork")[0].send_keys(Keys.ENTER)
    page.until(lambda: f"forked at {tokens} tokens" in page.text("status"))
    assert page.turns("model") == [first] and page.text("tokens") == tokens
    assert page.say(" and so") == second
    assert "2 of 2" in page.all(".ways")[0].text
    page.say(" but then")
    page.all(".ways button")[0].click()
    assert page.turns("user") == ["It was a dark and stormy night", " and so"], "the way before, to its end"
    page.all(".turn.model .fork")[0].click()
    onward = page.all(".onward button")
    assert [one.text for one in onward] == ["and so", "and so"], "from the middle, the ways on are offered"
    onward[1].click()
    assert page.turns("user")[-1] == " but then"


def test_any_message_can_be_edited_and_answered_again(page: Page) -> None:
    page.say("One")
    kept = page.say("Two")
    page.all(".turn.user .edit")[1].click()
    assert page["prompt"].get_property("value") == "Two" and page.turns("user") == ["One"]
    page["prompt"].clear()
    page.say("Three")
    assert page.turns("user") == ["One", "Three"]
    page.all(".ways button")[0].click()
    assert page.turns("model")[-1] == kept
    page.set(seed=2)
    page.all(".turn.model .again")[1].click()
    page.until(lambda: page.answered() and "3 of 3" in page.all(".ways")[0].text)
    assert page.turns("user") == ["One", "Two"] and page.turns("model")[1] != kept
    parents = [context["parent"] for context in page.kept()]
    assert len(parents) == 4 and len(set(parents)) == 2, "three contexts of one parent"


def test_a_reload_loses_nothing(page: Page, tmp_path: Path) -> None:
    page.read(tmp_path)
    page.say("Who?")
    page["prompt"].send_keys("half a thought")

    def shown() -> list[object]:
        return [page.turns(kind) for kind in ("read", "user", "model")] + [page.text("tokens"), page.text("memory")]

    seen = shown()
    line = page["line"].get_attribute("points")
    page.reload()
    assert seen == shown()
    assert page["line"].get_attribute("points") == line
    assert page["prompt"].get_property("value") == "half a thought"
    assert page["max_tokens"].get_property("value") == "24"
    page["prompt"].clear()
    assert page.say("And where?") and page.turns("user") == ["Who?", "And where?"]


def test_what_a_reload_breaks_off_is_kept(page: Page, slow: None) -> None:
    page["prompt"].send_keys("Once", Keys.CONTROL, Keys.ENTER)
    stored = (
        "return Object.entries(localStorage).some(([key, node]) => key.includes('node') && JSON.parse(node).answer)"
    )
    page.until(lambda: page.browser.execute_script(stored))
    page.reload()
    page.until(lambda: "broken off by a reload; what came is kept" in page.text("text"))
    answer = page.turns("model")[0]
    assert answer and len(page.kept()) == 1 and page.kept()[0]["tokens"] == len(("Once" + answer).encode())
    page.set(max_tokens=8)
    page.say(" more")
    assert page.turns("model")[0] == answer


@pytest.mark.parametrize("mode", ["complete", "chat"])
def test_escape_keeps_what_came(page: Page, slow: None, mode: str) -> None:
    page.set(mode=mode)
    page["prompt"].send_keys("Stop me", Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.turns("model") and page.turns("model")[0])
    page["prompt"].send_keys(Keys.ESCAPE)
    page.until(page.answered)
    answer = page.turns("model")[0]
    assert answer and "stopped; what came is kept" in page.text("status")
    assert page.kept()[0]["tokens"] >= len(("Stop me" + answer).encode())
    page.set(max_tokens=8)
    page.say("Go on")
    assert page.turns("user") == ["Stop me", "Go on"] and page.turns("model")[0] == answer


def test_a_refused_turn_gives_the_text_back(page: Page) -> None:
    page.set(max_tokens=0, temperature=-1)
    page["prompt"].send_keys("Dear text", Keys.CONTROL, Keys.ENTER)
    page.until(lambda: "temperature" in page.text("status"))
    assert page["prompt"].get_property("value") == "Dear text" and not page.turns("user") and page.answered()
    assert [message for message in page.errors() if "400" not in message] == []


def test_a_file_is_read_with_axes_beside_a_cache(page: Page, tmp_path: Path) -> None:
    page.read(tmp_path, text="All happy families are alike. " * 1_000)
    assert page.text("tokens") == "30,000" and page.rows() == ["long text.txt"]
    assert page.text("cache") == "7.68 MB", "2 layers, keys and values of 32 numbers, 2 bytes"
    points = [tuple(map(float, point.split(","))) for point in page["line"].get_attribute("points").split()]
    assert len(points) > 3 and [x for x, _ in points] == sorted(x for x, _ in points)
    across = [one.text for one in page.all("#plot .across, #plot .last")]
    assert across == ["0", "10,000", "20,000", "30,000"]
    up = [one.text for one in page.all("#plot .up")]
    assert up == ["100 B", "1.00 kB", "10.0 kB", "100 kB", "1.00 MB", "10.0 MB"]
    assert page.all("#plot .name")[0].text == "tokens read"
    kept = page.kept()[0]["bytes"]
    labels = [one.text for one in page.all("#plot .label")]
    assert labels[0].startswith("kept: ") and abs(float(labels[0].split()[1]) * 1000 - kept) < 10
    assert labels[1] == f"memory: {page.text('memory')}" and labels[2] == "KV cache: 7.68 MB"
    cache = [float(point.split(",")[1]) for point in page["cache-line"].get_attribute("points").split()]
    assert cache == sorted(cache, reverse=True) and cache[-1] < min(y for _, y in points), "it grows, far above"
    assert "30,000 tokens" in page["plot"].get_attribute("aria-label")
    assert "7.68 MB" in page["plot"].get_attribute("aria-label")
    page.say("So")
    assert page.text("tokens").startswith("30,0")


def test_files_are_dropped_anywhere_and_read_one_after_the_other(page: Page) -> None:
    page.browser.execute_script(
        "const dropped = new DataTransfer();"
        "for (const name of ['one.txt', 'two.txt'])"
        " dropped.items.add(new File([`The text of ${name}. `.repeat(20)], name));"
        "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: dropped, bubbles: true, cancelable: true}))"
    )
    page.until(lambda: page.rows() == ["two.txt", "one.txt"] and not page["now"].is_displayed())
    assert page.turns("read") == ["two.txt"] and page.text("tokens") == str(20 * len("The text of two.txt. "))
    page.until(lambda: page["heat"].is_displayed())


def test_two_tabs_do_not_write_over_each_other(page: Page) -> None:
    page.say("In the first")
    first = page.browser.current_window_handle
    page.browser.switch_to.new_window("tab")
    try:
        page.browser.get(page.server.url)
        page.until(lambda: page.text("model") == "tiny" and page.turns("user") == ["In the first"])
        page.set(max_tokens=8)
        page.say("and in the second")
    finally:
        page.browser.close()
        page.browser.switch_to.window(first)
    page.until(lambda: [one.text for one in page.all(".onward button")] == ["and in the second"])
    assert page.turns("user") == ["In the first"], "this tab stays where it was"
    page.say("go on in the first")
    assert "2 of 2" in page.all(".ways")[0].text


def test_surprise_is_the_loss_of_each_character(page: Page, tmp_path: Path) -> None:
    page.read(tmp_path, text=BOOK)
    page.until(lambda: page["heat"].is_displayed())
    letters = page.all("#heat span")
    assert "".join(one.get_property("textContent") for one in letters) == BOOK
    body = {"model": "tiny", "prompt": BOOK, "echo": True, "logprobs": 0, "max_tokens": 0}
    with page.server.http() as client:
        scores = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["token_logprobs"]
    right, at = [], 0
    for letter in BOOK:  # bytes are the tokens here
        width = len(letter.encode())
        right.append(-sum(score or 0 for score in scores[at : at + width]) / math.log(2))
        at += width
    shown = [one.get_attribute("title") for one in letters]
    assert shown[0] == "nothing before it"
    assert [float(one.split()[0]) for one in shown[1:]] == pytest.approx(right[1:], abs=0.06)
    levels = [int(one.get_attribute("class")[1:]) for one in letters]
    assert levels[BOOK.index("“")] == 9 == max(levels), "three bytes that nobody expects"
    order = sorted(range(1, len(right)), key=right.__getitem__)
    assert [levels[place] for place in order] == sorted(levels[1:])
    mean = sum(right) / (len(scores) - 1)
    assert f"{mean:.2f} bits a token" in page.text("heat-summary")
    page.set(how="again")
    page["look"].click()
    page.until(lambda: "knowing all that was read" in page.text("heat-summary"))
    again = page.all("#heat span")[0].get_attribute("title")
    assert again.endswith("bits"), "after a context, the first character has something before it"


def test_a_token_tells_what_it_was_expected_from(page: Page, tmp_path: Path) -> None:
    page.read(tmp_path, text=BOOK)
    page.until(lambda: page["heat"].is_displayed())
    letters, place = page.all("#heat span"), BOOK.index("own")
    letters[place].click()
    page.until(lambda: "It was expected most from" in page.text("heat-summary"))
    with page.server.http() as client:
        body = {"model": "tiny", "prompt": BOOK[: place + 1]}
        told = client.post("/v1/explain", json=body).json()
    right = [0.0] * place
    for offset, share in zip(told["text_offset"], told["relevance"], strict=True):
        if share is not None:
            right[offset] += 100 * share
    shown = [one.get_attribute("title") for one in letters]
    assert [float(one.split()[0]) for one in shown[:place]] == pytest.approx(right, abs=0.06)
    assert set(shown[place:]) == {"not looked at"} and "chosen" in letters[place].get_attribute("class")
    levels = [int(one.get_attribute("class").split()[0][1:]) for one in letters[:place]]
    assert max(levels[:-1]) == 9 and levels[right.index(max(right[:-1]))] == 9
    assert f"cost {-told['logprob'] / math.log(2):.1f} bits" in page.text("heat-summary")
    page["heat"].send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ENTER)
    page.until(lambda: page.text("heat-summary").startswith(f"“{BOOK[place - 2]}” cost"))
    page["look"].click()
    page.until(lambda: "bits a token" in page.text("heat-summary"))


def test_a_place_further_in_can_be_looked_at(page: Page, tmp_path: Path) -> None:
    text = "".join(f"{number}, " for number in range(2_000))
    page.read(tmp_path, text=text)
    page.until(lambda: page["heat"].is_displayed())
    assert page["heat"].get_property("textContent") == text[:2000]
    page.set(place=100)
    page["look"].click()
    page.until(lambda: page["heat"].get_property("textContent") == text[-2000:])
    page.reload()
    page["look"].click()
    page.until(lambda: page["heat"].get_property("textContent") == text[:2000])
    assert not page["place"].is_displayed(), "the file is not there any more, what it begins with is"


def test_contexts_are_a_tree_of_names(page: Page, tmp_path: Path) -> None:
    page.read(tmp_path, "War & Peace.txt")
    page.say("Who?")
    page.say("Where?")
    page.all(".turn.read .fork")[0].click()
    page.say("When?")
    page.until(lambda: page.rows() == ["War _ Peace.txt", "Who?", "When?"])
    below = [one.get_property("textContent") for one in page.all("#contexts ul ul .label, #contexts > li > ul .label")]
    assert below == ["Who?", "When?"]
    page.all("#contexts .pick")[1].send_keys(Keys.ENTER)
    assert page.turns("user") == ["Who?", "Where?"], "a row leads to its last turn"
    page.all("#contexts .pick")[0].send_keys(Keys.ARROW_DOWN)
    page.browser.switch_to.active_element.send_keys(Keys.F2)
    page.browser.switch_to.active_element.send_keys(Keys.CONTROL, "a")
    page.browser.switch_to.active_element.send_keys("People", Keys.ENTER)
    page.until(lambda: page.rows() == ["War _ Peace.txt", "People", "When?"])
    named = next(context for context in page.kept() if context["name"] == "People")
    assert named["expires_at"] is None, "what has a name stays"
    page.read(tmp_path, "War & Peace.txt")
    page.until(lambda: "War _ Peace.txt 2" in page.rows())


def test_a_deletion_can_be_undone(page: Page, tmp_path: Path) -> None:
    page.read(tmp_path)
    page.say("Who?")
    page.until(lambda: len(page.rows()) == 2)
    page.all("#contexts .pick")[1].send_keys(Keys.DELETE)
    assert page["toast"].is_displayed() and page.rows() == ["long text.txt"] and not page.turns("user")
    assert len(page.kept()) == 2
    page["undo"].click()
    assert page.rows() == ["long text.txt", "Who?"] and page.turns("user") == ["Who?"]
    page.all("#contexts .pick")[1].send_keys(Keys.TAB, Keys.TAB)
    page.browser.switch_to.active_element.send_keys(Keys.ENTER)  # its ×
    assert page.rows() == ["long text.txt"]
    page.until(lambda: not page["toast"].is_displayed())
    assert eventually(lambda: len(page.kept()) == 1)
    page.all("#contexts .pick")[0].send_keys(Keys.DELETE)
    page.reload()  # leaving the page does not outlive the wish
    assert eventually(lambda: page.kept() == [])
    page.reload()
    page.until(lambda: page["hero"].is_displayed() and page["no-contexts"].is_displayed())
    nodes = "return Object.keys(localStorage).filter(key => key.includes('node')).length"
    assert page.browser.execute_script(nodes) == 0, "and nothing of it stays in the browser"


def test_reading_can_be_stopped(page: Page, tmp_path: Path) -> None:
    (tmp_path / "endless.txt").write_text(BOOK * 5_000)
    assert page["invite"].is_displayed() and not page["meanwhile"].is_displayed()
    page["file"].send_keys(str(tmp_path / "endless.txt"))
    page.until(lambda: page.text("tokens") != "0")
    assert page.text("meanwhile-name") == "Reading endless.txt" and not page["invite"].is_displayed()
    page["stop-reading"].click()
    page.until(lambda: "nothing of it is kept" in page.text("status"))
    assert page["invite"].is_displayed() and not page["meanwhile"].is_displayed()
    assert not page["now"].is_displayed() and page.text("tokens") == "0" and page.kept() == []


def test_a_new_text_begins_with_the_keyboard(page: Page) -> None:
    page.say("Hello")
    page["prompt"].send_keys(Keys.ALT, "n")
    page.until(lambda: page.text("tokens") == "0")
    assert page["hero"].is_displayed() and page.browser.switch_to.active_element == page["prompt"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_desk_and_on_a_phone(page: Page, tmp_path: Path, scheme: str) -> None:
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    page.read(tmp_path)
    page.say("Who?" + " and" * 60 + "x" * 200)
    background = page.browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) > 384) == (scheme == "light")
    assert all(page[name].is_displayed() for name in ("talk", "reading", "library"))
    page.browser.save_screenshot(str(tmp_path / f"{DESK[0]}-{scheme}.png"))
    page.screen(*PHONE)
    page.reload()
    assert page["prompt"].is_displayed() and page["talk"].rect["y"] < 160, "the chat is what is reached first"
    for name in ("talk", "reading", "library"):
        page.all(f"#views [data-view={name}]")[0].click()
        assert [one for one in ("talk", "reading", "library") if page[one].is_displayed()] == [name]
        width = page.browser.execute_script(
            "return Math.max(...[...document.querySelectorAll('html, section')].map(one => one.scrollWidth))"
        )
        assert width <= PHONE[0], "nothing lies beside the screen"
        page.browser.save_screenshot(str(tmp_path / f"{PHONE[0]}-{name}-{scheme}.png"))
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    page["theme"].click()
    page["theme"].click()
    assert page["theme"].get_attribute("aria-label") == "colours: dark"
    page.reload()
    assert page["theme"].get_attribute("aria-label") == "colours: dark"


def test_a_screen_reader_finds_a_name_for_everything(page: Page, tmp_path: Path) -> None:
    page.read(tmp_path)
    page.say("Who?")
    page.until(lambda: len(page.rows()) == 2)
    tree = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    acted = ("button", "textbox", "combobox", "spinbutton", "slider", "region", "img", "image", "progressbar", "log")
    found = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node["ignored"] and node["role"]["value"] in acted
    ]
    assert len(found) > 20 and [role for role, name in found if not name.strip()] == []
    names = {name for _, name in found}
    assert {"Conversation", "Reading", "Library", "Your text", "rename Who?", "delete Who?"} <= names
    assert page["announce"].get_property("textContent") == "Answer: " + page.turns("model")[-1]


def test_what_the_model_says_is_text_and_no_markup(page: Page) -> None:
    page.say("<img src=x onerror=alert(1)><script>document.title='bad'</script>")
    assert not page.all("#text img") and page.browser.title == "megalodon"


def test_nothing_is_asked_of_any_other_server(page: Page) -> None:
    names = page.browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert names and all(name.startswith(page.server.url + "/") for name in names)


def test_a_key_is_asked_for_and_used(
    browser: webdriver.Chrome, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGALODON_API_KEYS", SECRET)
    browser.get(serve().url)
    WebDriverWait(browser, 20).until(lambda _: "no API key" in browser.find_element(By.ID, "status").text)
    browser.find_element(By.ID, "key").send_keys(SECRET, Keys.TAB)
    WebDriverWait(browser, 20).until(lambda _: browser.find_element(By.ID, "model").text == "tiny")
    assert not browser.execute_script("return JSON.stringify([localStorage, sessionStorage])").count(SECRET)
