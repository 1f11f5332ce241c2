"""The playground in a real browser, headless Chromium (`make test-serve`). Screenshots lie in build/playground afterwards."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from browsing import SHADES, chromium, contrast
from serving import PROMPTS, Running, alone, wait_for

pytestmark = pytest.mark.serve
ROOT = Path(__file__).parents[1]
MODELS = ROOT / "models" / "pysource"
PICTURES = ROOT / "build" / "playground"


@pytest.fixture(scope="module")
def running(target, drafter):
    made = Running(target, drafter)
    made.service.method = "glide+cape"
    yield made
    made.close()


@pytest.fixture(scope="module")
def browser():
    with chromium() as made:
        yield made


@pytest.fixture
def page_of(browser):
    """Opens a server's page; whatever the browser complains about, the Content-Security-Policy's refusals too, is a failure."""
    contexts, complaints = [], []

    def make(one: Running, allowed: str = "", **options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1180, "height": 1000}} | options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        address = f"http://127.0.0.1:{one.port}/"

        def console(said) -> None:
            if said.type == "error" and not re.search(allowed or "^$", said.text):
                complaints.append(said.text)

        page.on("console", console)
        page.on("request", lambda asked: asked.url.startswith((address, "data:")) or complaints.append(asked.url))
        page.goto(address)
        return page

    yield make
    for context in contexts:
        context.close()
    assert complaints == []


def ends(page, state: str = "done") -> None:
    page.wait_for_function("state => document.body.dataset.state === state", arg=state, timeout=60_000)


def text(page, pane: int = 0) -> str:
    """The emitted text of a pane, without the prompt."""
    return "".join(page.locator(".pane").nth(pane).locator(".token").all_text_contents())


def figure(page, name: str, pane: int = 0) -> float:
    return float(page.locator(".pane").nth(pane).locator(f".{name}").text_content())


def shoot(page, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(200)
    page.screenshot(path=PICTURES / f"{name}.png", full_page=True)


def test_a_prompt_is_typed_and_coloured_tokens_and_rounds_arrive(running, target, page_of) -> None:
    page = page_of(running)
    page.wait_for_function("() => document.querySelector('#model').textContent.includes('pysource')")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(PROMPTS[1])
    page.get_by_label("Most tokens").fill("240")
    page.get_by_label("Temperature").fill("0")
    page.keyboard.press("Control+Enter")
    page.wait_for_function("() => document.querySelectorAll('.token[title]').length > 3")
    assert page.evaluate("document.body.dataset.state") == "running"
    assert page.get_by_role("button", name="Complete").is_disabled()
    ends(page)
    assert text(page) == alone(target, PROMPTS[1], max_new_tokens=240)
    origins = set(page.locator(".pane .token").evaluate_all("all => all.map(one => one.title)"))
    assert origins == {"chain", "sibling", "bonus"}
    assert figure(page, "tau") > 1.2
    assert figure(page, "speed") > 0
    rounds = int(page.locator("#which").get_attribute("max"))
    assert page.locator("#strip .bar").count() == rounds
    assert figure(page, "count") == pytest.approx(rounds * figure(page, "tau"), rel=0.01)


def test_rounds_are_looked_at_by_keyboard(running, page_of) -> None:
    page = page_of(running)
    page.keyboard.press("Control+Enter")
    ends(page)
    slider = page.locator("#which")
    slider.focus()
    page.keyboard.press("Home")
    assert page.locator("#which-label").text_content().startswith("Round 1 of ")
    for _ in range(30):
        page.keyboard.press("ArrowRight")
        taken = re.search(r"(\d+) drafted, (\d+) accepted, (\d+) emitted", page.locator("#which-label").text_content())
        drafted, accepted, emitted = map(int, taken.groups())
        assert page.locator("#tree .node:not(.bonus)").count() == drafted + 1
        assert page.locator("#tree .node.yes:not(.bonus):not(.root)").count() == accepted
        assert emitted == accepted + 1
        assert ("drafting stopped" in page.locator("#tree").text_content()) == (drafted > 0)
    order = []
    page.locator("#prompt").focus()
    for _ in range(9):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id"))
    assert order == ["max_tokens", "temperature", "top_p", "seed", "stop", "chat", "start", "race", order[-1]]


def test_escape_stops_and_the_row_is_free(running, page_of) -> None:
    page = page_of(running)
    step = running.engine.step

    def slow_step(*given):
        time.sleep(0.05)
        return step(*given)

    running.engine.step = slow_step
    try:
        page.get_by_label("Most tokens").fill("400")
        page.keyboard.press("Control+Enter")
        page.wait_for_function("() => document.querySelectorAll('.token[title]').length > 3")
        page.keyboard.press("Escape")
        ends(page, "stopped")
        wait_for(lambda: not running.service.worker.jobs)
    finally:
        running.engine.step = step
    assert re.fullmatch(r"Stopped after \d+ tokens\.", page.get_by_role("status").text_content())
    count = page.locator(".token[title]").count()
    page.wait_for_timeout(300)
    assert page.locator(".token[title]").count() == count > 3
    page.keyboard.press("Control+Enter")
    ends(page)


def test_an_error_is_a_sentence(running, page_of) -> None:
    page = page_of(running, allowed="status of 400|ERR_CONNECTION_REFUSED|ERR_FAILED")
    page.get_by_label("Most tokens").fill("600")
    page.get_by_role("button", name="Complete").click()
    ends(page, "error")
    told = page.get_by_role("alert").text_content()
    assert re.fullmatch(r"The prompt has \d+ tokens and 600 are asked for, .* or shorten the prompt\.", told)
    page.get_by_label("Temperature").fill("9")
    page.get_by_role("button", name="Complete").click()
    assert page.evaluate("document.querySelector('#temperature').validationMessage") != ""
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("20")
    page.route("**/stream", lambda route: route.abort())
    page.get_by_role("button", name="Complete").click()
    page.wait_for_function("() => document.querySelector('#error').textContent.includes('cannot be reached')")
    page.unroute("**/stream")
    page.get_by_role("button", name="Complete").click()
    ends(page)
    assert page.get_by_role("alert").count() == 0


def test_a_race_ends_with_the_same_text_and_can_be_replayed(running, target, page_of) -> None:
    page = page_of(running)
    page.get_by_label("Prompt").fill(PROMPTS[0])
    page.get_by_label("Temperature").fill("0.8")
    page.get_by_label("Seed").fill("11")
    page.get_by_role("button", name="Race").click()
    ends(page)
    assert page.evaluate("document.body.dataset.equal") == "true"
    expected = alone(target, PROMPTS[0], temperature=0.8, seed=11, max_new_tokens=120)
    assert [text(page, 0), text(page, 1)] == [expected] * 2
    assert figure(page, "tau", 0) > 1 == figure(page, "tau", 1)
    status = page.get_by_role("status").text_content()
    assert re.fullmatch(
        r"Both wrote the same text, \d+ tokens\. glide\+cape was [\d.]+ times as fast as plain .*\.", status
    )
    page.get_by_role("button", name="Replay").click()
    ends(page, "running")
    ends(page)
    assert [text(page, 0), text(page, 1)] == [expected] * 2
    assert page.get_by_role("status").text_content() == status


def test_a_server_with_a_key_asks_for_it(target, drafter, page_of) -> None:
    one = Running(target, drafter, api_key=("right",))
    try:
        page = page_of(one, allowed="status of 401")
        page.locator("#key").wait_for(state="visible")
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.press("Control+Enter")
        page.get_by_text("This server asks for an API key").wait_for()
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Control+Enter")
        page.get_by_text("The server does not know this API key.").wait_for()
        page.get_by_label("API key").fill("right")
        page.keyboard.press("Control+Enter")
        ends(page)
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    finally:
        one.close()


@pytest.mark.parametrize(
    ("name", "scheme", "width"),
    [("light", "light", 1180), ("dark", "dark", 1180), ("phone", "dark", 390), ("phone-light", "light", 320)],
)
def test_it_is_readable_in_light_and_dark_and_on_a_phone(running, page_of, name, scheme, width) -> None:
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme, "has_touch": width < 600}
    page = page_of(running, **options)
    shoot(page, f"{name}-empty")
    page.keyboard.press("Control+Enter")
    ends(page)
    page.locator("#which").evaluate("one => { one.value = 6; one.dispatchEvent(new Event('input')); }")
    shoot(page, name)
    page.get_by_role("button", name="Race").click()
    ends(page)
    shoot(page, f"{name}-race")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for token in ("chain", "sibling", "bonus", "copied"):
        colours = page.locator(f".legend .{token}").evaluate(
            "one => [getComputedStyle(one).color, getComputedStyle(one).backgroundColor]"
        )
        assert contrast(*colours) >= 4.5, token
    for place in ("#status", ".quiet", "dt", ".prompt", "button.main"):
        assert contrast(*page.locator(place).first.evaluate(SHADES)) >= 4.5, place
