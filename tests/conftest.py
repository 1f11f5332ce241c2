"""One thread: the models of the tests are tiny, and on a crowded machine two threads mostly wait for each other."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from glidecape import progress

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can `import toys`
torch.set_num_threads(1)
# Tests decode eagerly, and never touch the user's own packages; tests/test_compiled.py compiles in folders of its own.
os.environ["GLIDECAPE_COMPILE"] = "off"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is measured is kept for this session, by all its processes."""
    base = tmp_path_factory.getbasetemp()
    os.environ["GLIDECAPE_CACHE"] = str((base.parent if base.name.startswith("popen-") else base) / "cache")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny corpus, target and drafts, made by the shipped commands once a session."""
    from tinyworld import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of compiled programs, one for all workers: compiling takes seconds."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "programs"
    folder.mkdir(exist_ok=True)
    return folder


MODELS = Path(__file__).parents[1] / "models" / "pysource"


@pytest.fixture(scope="module")
def target() -> Any:
    """The shipped target."""
    from glidecape import Target

    return Target.from_pretrained(MODELS / "target", dtype=torch.float32)


@pytest.fixture(scope="module")
def drafter(target: Any) -> Any:
    """GliDe with CaPE for the shipped target."""
    from glidecape import load_draft, make_drafter

    return make_drafter("glide+cape", load_draft(MODELS / "glide", target), length=4, bins=(2, 1))


@pytest.fixture(scope="module")
def running(target: Any, drafter: Any) -> Iterator[Any]:
    """A server of both."""
    from serving import Running

    made = Running(target, drafter)
    yield made
    made.close()


@pytest.fixture
def server(target: Any, drafter: Any) -> Iterator[Any]:
    """Makes servers with settings of their own."""
    from serving import Running

    made = []

    def make(**settings: Any) -> Any:
        made.append(Running(target, settings.pop("drafter", drafter), **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


# Files that take longest, the longest first: two workers then end at about the same time.
LONGEST = (
    "against_transformers",
    "compiled",
    "kernels",
    "serve",
    "grammar",
    "docs",
    "families",
    "fake_cuda",
    "real_models",
    "resume",
    "exact_law",
    "certify",
    "bench",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A command with --quiet silences its process: not the tests that come after."""
    yield
    progress.be_quiet(False)


@pytest.fixture(autouse=True)
def prices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run side by side, and prices are kept all the same; and no test needs them exact."""
    monkeypatch.setattr("glidecape.costs.LEAST_SHARE", 0.0)
    monkeypatch.setattr("glidecape.costs.PATIENCE_S", 0.0)
