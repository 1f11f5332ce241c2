"""The site: its drawings are those that the scripts make, it builds without a warning, and its pages fit a phone.

`make docs-check` installs what the slow tests need: mkdocs, Playwright, and a Chromium of the system.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
if not IMAGES.is_dir():
    pytest.skip("the documentation is not in this checkout", allow_module_level=True)


def test_the_drawings_are_those_that_the_script_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "runs" / "drawings.py", tmp_path], check=True)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["cross-attention.svg", "mask.svg", "round.svg", "tree.svg"]
    for name in made:
        assert (tmp_path / name).read_bytes() == (IMAGES / name).read_bytes(), f"run runs/drawings.py: {name} is old"


@pytest.mark.parametrize(
    ("script", "page", "picture"),
    [("picture.py", "README.md", "speed.svg"), ("auto_picture.py", "docs/auto.md", "auto.svg")],
)
def test_a_picture_shows_the_table_of_its_page(script: str, page: str, picture: str, tmp_path: Path) -> None:
    made = tmp_path / picture
    subprocess.run([sys.executable, ROOT / "runs" / script, ROOT / page, made], check=True)
    assert made.read_bytes() == (IMAGES / picture).read_bytes(), f"run runs/{script}: the table has changed"


def pages_of(entries: list) -> Iterator[str]:
    for entry in entries:
        for value in entry.values():
            yield from pages_of(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation_once() -> None:
    named = sorted(pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert named == sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))


def test_every_exported_name_is_in_the_reference() -> None:
    import glidecape

    text = (ROOT / "docs" / "reference" / "api.md").read_text()
    missing = [name for name in glidecape.__all__ if not re.search(rf"glidecape\.{name}\b", text)]
    assert not missing


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: make docs-check")
    made = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", made]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width", "scheme"), [("desktop", 1280, "light"), ("phone", 390, "dark")])
def test_pages_fit_and_load_nothing_from_elsewhere(site: Path, name: str, width: int, scheme: str) -> None:
    """Screenshots lie in build/site afterwards."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: make docs-check")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    pictures = ROOT / "build" / "site"
    pictures.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 1000}, color_scheme=scheme)
        elsewhere: list[str] = []
        page.on("request", lambda asked: asked.url.startswith(("file:", "data:")) or elsewhere.append(asked.url))
        for path in sorted(site.rglob("index.html")):
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{path} is wider than its page"
            broken = (
                "[...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.src)"
            )
            assert page.evaluate(broken) == []
            shown = str(path.parent.relative_to(site)).replace("/", "-").replace(".", "home")
            page.screenshot(path=pictures / f"{shown}-{name}.png", full_page=False)
        assert elsewhere == []
        browser.close()
