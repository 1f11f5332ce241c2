"""A wheel and an sdist are built, and what is installed from them works on its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "pyproject.toml").is_file():
    pytest.skip("the tests are not in a checkout", allow_module_level=True)


def run(*words: object, cwd: Path, seconds: float = 280) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [*map(str, words)], capture_output=True, text=True, cwd=cwd, env=environment, timeout=seconds
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "uv", "build", "--no-build-isolation", "--offline", "--out-dir", folder, ROOT, cwd=folder)
    return folder


def test_the_sdist_and_the_wheel_hold_the_package_and_no_weights(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    (sdist,) = built.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"glidecape/py.typed", "glidecape/__main__.py", "glidecape/demo_prompts.json"} <= set(names)
    assert not [name for name in names if name.endswith((".safetensors", ".bin"))]
    assert wheel.stat().st_size < 2**20
    with tarfile.open(sdist) as file:
        inside = {name.split("/", 1)[-1] for name in file.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "tests/test_wheel.py"} <= inside


def test_the_wheel_decodes_in_an_environment_of_its_own(built: Path, world, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    words = ["-m", "uv", "pip", "install", "--offline", "--no-deps", "--python", python, wheel]
    run(sys.executable, *words, cwd=tmp_path)
    # The libraries are those of this environment: they come after what was installed, so the package is the wheel's.
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    decodes(tmp_path / "env", world, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_installs_from_the_package_index_into_an_empty_environment(
    built: Path, world, tmp_path: Path
) -> None:
    """As a user's pip does it, with PyTorch's version that is here: the newest would bring another few gigabytes."""
    venv.create(tmp_path / "env", with_pip=True)
    (wheel,) = built.glob("*.whl")
    torch = f"torch=={metadata.version('torch').split('+')[0]}"
    install = [tmp_path / "env" / "bin" / "python", "-m", "pip", "install", "--quiet", torch, wheel]
    run(*install, cwd=tmp_path, seconds=1500)
    decodes(tmp_path / "env", world, tmp_path)
    listed = json.loads(run(*install[:3], "list", "--format", "json", cwd=tmp_path))
    names = {one["name"].lower() for one in listed}
    assert not names & {"pytest", "matplotlib", "fastapi", "llguidance", "datasets"}  # nothing of the extras
    run(*install[:3], "check", cwd=tmp_path)


def decodes(environment: Path, world, tmp_path: Path) -> None:
    """The command and the package of an environment are there and write ten tokens."""
    home = run(environment / "bin" / "python", "-c", "import glidecape; print(glidecape.__file__)", cwd=tmp_path)
    assert Path(home.strip()).is_relative_to(environment)
    command = environment / "bin" / "glidecape"
    assert "certify" in run(command, "--help", cwd=tmp_path)
    options = ["--draft", world["glide"], "-p", "def load(", "--max-tokens", 10, "--ignore-eos", "--json"]
    found = json.loads(run(command, "generate", world["target"], *options, cwd=tmp_path))
    assert len(found["tokens"]) == 10
