"""The report in headless Chromium (`make test-serve`): readable on desk and phone, in light and dark. Screenshots lie in
build/report afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from browsing import SHADES, chromium, contrast
from glidecape.bench.plots import have_matplotlib
from glidecape.bench.report import write_report
from report_runs import made

pytestmark = pytest.mark.serve
PICTURES = Path(__file__).parents[1] / "build" / "report"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a greedy run and one at T=1, of twelve methods and two libraries in three categories."""
    folder = tmp_path_factory.mktemp("report")
    runs = [made(folder / "t0", 0.0), made(folder / "t1", 1.0)]
    return write_report(runs, folder)[0]


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.mark.parametrize(
    ("name", "scheme", "width"),
    [("light", "light", 1180), ("dark", "dark", 1180), ("phone", "light", 390), ("phone-dark", "dark", 320)],
)
def test_it_is_readable_in_light_and_dark_and_on_a_phone(browser, page, name, scheme, width) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened, complaints = context.new_page(), []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda asked: asked.url.startswith(page.as_uri()) or complaints.append(asked.url))
    opened.goto(page.as_uri())
    PICTURES.mkdir(parents=True, exist_ok=True)
    opened.screenshot(path=PICTURES / f"{name}.png", full_page=True)
    panels = [one.bounding_box() for one in opened.locator(".panel").all()]
    assert (panels[0]["y"] == panels[1]["y"]) == (width > 600)  # side by side, where there is room
    assert panels[1]["y"] + panels[1]["height"] < (900 if width > 600 else 1700)
    for place in (".sentence", "p.soft", "h1", ".bars dt", "th", "td"):
        assert contrast(*opened.locator(place).first.evaluate(SHADES)) >= 4.5, place
    ground = opened.locator("body").evaluate("one => getComputedStyle(one).backgroundColor")
    shades = opened.locator(".row:not(.peer) .bar").evaluate_all(
        "all => all.map(one => getComputedStyle(one).backgroundColor)"
    )
    assert min(contrast(shade, ground) for shade in shades) >= 3
    opened.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    opened.screenshot(path=PICTURES / f"{name}-open.png", full_page=True)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert complaints == []
    if have_matplotlib():
        covered(opened)
    context.close()


def covered(page) -> None:
    """No legend lies on the axes of its plot, and none has more than six entries."""
    figures = page.locator("figure").all()
    assert len(figures) >= 8
    for figure in figures:
        axes = figure.locator("g[id^=axes] > g[id^=patch] path").first.bounding_box()
        for legend in figure.locator("svg g[id^=legend]").all():
            box = legend.bounding_box()
            assert box["y"] >= axes["y"] + axes["height"]
            assert 1 <= legend.locator("g[id^=text]").count() <= 6
