"""Every command and snippet of the README, CONTRIBUTING.md and docs/ runs, on tiny models where it names some.

Blocks of a page run one after the other in one folder; Python blocks of a page share their names. Marks of a page:

<!-- slow -->                       the next block takes long: it runs in the slow suite
<!-- run by tests/test_serve.py --> that test runs it, since it needs a server
<!-- not run: reason -->            it needs something that no test has
"""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import pytest
import torch
import typer

from glidecape import cli

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "docs").is_dir():
    pytest.skip("the documentation is not in this checkout", allow_module_level=True)
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"))]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"(?:^<!-- ([^\n]*?) -->\n)?^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
LANGUAGES = {"bash", "python", "yaml", "json", "text"}

# These take a second or more even on tiny models: their options are checked, and the slow suite runs them.
LONG = {"bench", "measure", "study", "train", "train-target", "data", "regenerate", "plan", "report", "doctor"}
LONG |= {"tune"}
TRAINS = ROOT / "docs" / "tutorials" / "train.md"  # the page whose trainings run always
ELSEWHERE = {"serve"}  # does not end: tests/test_serve.py runs it, and tests/test_chat.py what has a --url
# Budgets that suit a tiny model; all else is run as it is written.
FEWER = {
    "--tokens": "1024",
    "--max-new-tokens": "8",
    "--prompt-tokens": "24",
    "--limit": "1",
    "--looping": "1",
    "--repeats": "1",
    "--watch": "0",
    "--threads": "1",
    "--length": "48",
    "--rows": "2",
    "--prompts": "2",
    "--max-bytes": "2e5",
    "--max-row-tokens": "64",
}
SHORT, NARROW = ["--max-new-tokens", "8"], ["--length", "48", "--rows", "2"]
FEW = [*SHORT, "--prompt-tokens", "24", "--limit", "1"]
USUAL = {
    "generate": SHORT,
    "certify": SHORT,
    "train": NARROW,
    "study": [*NARROW, "--new-tokens", "16"],
    "plan": NARROW,
    "measure": FEW,
    "measure batch": [*FEW, "--sizes", "1,2"],
    "measure context": [*SHORT, "--limit", "1", "--lengths", "16,32"],
    "measure long": ["--max-new-tokens", "16", "--prompt-tokens", "24"],
    "regenerate": ["--max-new-tokens", "24", "--prompt-tokens", "24"],
}
USUAL["bench"] = [*FEW, "--looping", "1", "--repeats", "1", "--watch", "0", "--peers", ""]
LESS_OF = {"measure svip --lengths": "1-2", "measure context --lengths": "16,32", "measure long --max-new-tokens": "16"}
LESS_OF |= {"measure batch --sizes": "1,2", "regenerate --limit": "240"}


@dataclass
class Block:
    page: Path
    line: int
    mark: str
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = BLOCK.finditer(text)
    return [Block(page, text.count("\n", 0, one.start(3)), one[1] or "", one[2], one[3]) for one in found]


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command; variables that a block sets are put in, and environment variables left out."""
    known: dict[str, str] = {}
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(Template(line).safe_substitute(known), comments=True)
        while words and (found := re.fullmatch(r"([A-Za-z_]+)=(.*)", words[0], re.S)):
            known[found[1]] = found[2]
            words.pop(0)
        if words:
            yield words


def command_of(words: list[str]) -> tuple[Any, list[str], list[str]]:
    """The typer command of `glidecape …`, its name and the words after the name."""
    command, rest, name = typer.main.get_command(cli.app), words[1:], []
    while rest and not rest[0].startswith("-") and hasattr(command, "commands"):
        name.append(rest.pop(0))
        command = command.commands[name[-1]]
    return command, name, rest


def checked(words: list[str]) -> tuple[list[str], list[str]]:
    """The command's name and the words after it, once every option is one that the command has."""
    command, name, rest = command_of(words)
    known = {option for one in command.params for option in one.opts} | {"--help", "-h"}
    assert {word for word in rest if re.match("--?[a-z]", word)} <= known, words
    return name, rest


def smaller(name: list[str], rest: list[str]) -> list[str]:
    """The words with budgets for a tiny model, and without compiling or other libraries."""
    made: list[str] = []
    words = iter(rest)
    for word in words:
        special = LESS_OF.get(" ".join([*name, word]))
        if word == "--minutes":
            next(words)
            made += ["--tokens", FEWER["--tokens"]]
        elif word == "--peers":
            next(words)
            made += ["--peers", ""]
        elif word == "--compile":
            if not name[0].startswith(("train", "study")):
                next(words)
        elif special or word in FEWER:
            value = next(words)
            path = word in ("--prompts", "--rows") and not value.isdigit()
            made += [word, value if path else special or FEWER[word]]
        else:
            made.append(word)
    return made


@pytest.fixture(scope="module")
def chatty(world, tmp_path_factory) -> Path:
    """The tiny target with a chat template, which conversations need."""
    made = tmp_path_factory.mktemp("chatty") / "target"
    shutil.copytree(world["target"], made)
    described = json.loads((made / "tokenizer_config.json").read_text())
    described["chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (made / "tokenizer_config.json").write_text(json.dumps(described))
    return made


@pytest.fixture
def folder(world, chatty, tmp_path, monkeypatch) -> Path:
    """A folder in which every path of the documentation leads to something tiny."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "dumb")
    places = {
        "path/to/model": "target",
        "path/to/draft": "glide",
        "path/to/small-model": "lm",
        "draft": "glide",
        "target": "target",
    }
    places |= {name: name for name in ("corpus", "eagle", "medusa")}
    for place in ("models/pysource", "runs/out/pysource", "runs/out/general"):
        places |= {f"{place}/{name}": name for name in ("target", "glide", "lm", "eagle", "medusa")}
        places |= {f"{place}/glide-last": "glide", f"{place}/glide-no-cross": "glide"}
    for place, made in places.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).symlink_to(chatty if made == "target" else world[made])
    lines = "".join(f'{{"prompt": "def load_{noun}("}}\n' for noun in ("table", "record", "index", "page"))
    for name in ("prompts.jsonl", "more-prompts.jsonl"):
        (tmp_path / name).write_text(lines.replace("load", "save") if name.startswith("more") else lines)
    text = "def load_table(table, size=3):\\n    for item in table:\\n        size += item\\n    return size\\n"
    (tmp_path / "texts.jsonl").write_text(f'{{"text": "{text * 6}"}}\n' * 240)
    chat = '{"messages": [{"role": "user", "content": "What is %d?"}, {"role": "assistant", "content": "A number."}]}\n'
    (tmp_path / "chats.jsonl").write_text("".join(chat % number for number in range(400)))
    (tmp_path / "notes.txt").write_text("A comet is a ball of ice. It has a tail.\n" * 200)
    (tmp_path / "schema.json").write_text('{"type": "integer"}')
    own = '{"prompt": "def load_table(", "completion": "table, size=3):\\n    for item in table:\\n        size += item\\n"}\n'
    (tmp_path / "own.jsonl").write_text(own * 200)
    return tmp_path


class Runner:
    """Runs the blocks of a page in a folder."""

    def __init__(self, folder: Path, monkeypatch: Any, slow: bool) -> None:
        self.folder, self.monkeypatch, self.slow, self.long = folder, monkeypatch, slow, LONG
        self.names: dict[str, Any] = {"__name__": "page"}

    def run(self, block: Block) -> None:
        if block.language == "python":
            exec(compile("\n" * block.line + block.code, str(block.page), "exec"), self.names)
        elif block.language == "yaml":
            (self.folder / "options.yaml").write_text(block.code)
            self.glidecape(["glidecape", "generate", "--config", "options.yaml", "-p", "def load("])
        elif block.language == "bash":
            for words in commands(block.code):
                self.command(words)

    def command(self, words: list[str]) -> None:
        program = words[0]
        if program.endswith("glidecape"):
            self.glidecape(words)
        elif program == "make":
            subprocess.run([*words, "-n"], cwd=ROOT, check=True, capture_output=True)
        elif program.startswith("runs/") or (
            program.endswith("python") and words[1].startswith(("runs/", "examples/"))
        ):
            script = ROOT / (program if program.startswith("runs/") else words[1])
            assert script.is_file(), script
            if script.suffix == ".sh":
                subprocess.run(["bash", "-n", script], check=True)
        elif program == "printf" and words[-2] == ">":
            lines = words[2:-2]
            (self.folder / words[-1]).unlink(missing_ok=True)
            (self.folder / words[-1]).write_text("".join(f"{line}\n" for line in lines))
        elif program == "pip":
            extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
            asked = {one for word in words for one in re.findall(r"\[(.*)\]", word)}
            assert {one for names in asked for one in names.split(",")} <= extras, words
        else:
            assert words in KNOWN, f"nothing runs this: {words}"

    def glidecape(self, words: list[str]) -> None:
        name, rest = checked(words)
        if not name or name[0] in ELSEWHERE or "--url" in rest or (name[0] in self.long and not self.slow):
            return
        chosen = smaller(name, rest)
        if "--output" in chosen:  # what a page makes itself is not there before
            made = self.folder / chosen[chosen.index("--output") + 1]
            if made.is_symlink() or made.is_file():
                made.unlink()
        chosen = [*USUAL.get(" ".join(name), USUAL.get(name[0], [])), *chosen]
        self.monkeypatch.setattr(sys, "argv", ["glidecape", *name, *chosen])
        self.monkeypatch.setattr(sys, "stdin", io.StringIO("def load(\n"))
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        assert not code, f"exit code {code}: {chosen}"


KNOWN = [[".", ".venv/bin/activate"], ["python3", "-m", "venv", ".venv"]]


def marked_slow(block: Block) -> bool:
    return block.mark == "slow" or (block.language == "bash" and any(name in LONG for name in commands_named(block)))


def commands_named(block: Block) -> set[str]:
    named = (command_of(words)[1] for words in commands(block.code) if words[0].endswith("glidecape"))
    return {name[0] for name in named if name}


def here(block: Block) -> bool:
    """Does this file run the block?"""
    return not block.mark.startswith(("run by", "not run"))


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_page(page: Path, folder: Path, monkeypatch: Any, slow: bool) -> None:
    runner = Runner(folder, monkeypatch, slow)
    if page == TRAINS:
        runner.long = LONG - {"train"}
    threads = torch.get_num_threads()
    for block in blocks(page):
        if here(block) and (slow or block.mark != "slow"):
            runner.run(block)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(here, blocks(page)))], ids=title)
def test_what_a_page_shows_runs(page, folder, monkeypatch) -> None:
    run_page(page, folder, monkeypatch, slow=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(map(marked_slow, filter(here, blocks(page))))], ids=title
)
def test_what_takes_long_runs_too(page, folder, monkeypatch) -> None:
    run_page(page, folder, monkeypatch, slow=True)


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_every_block_says_what_it_is_and_who_runs_it(page) -> None:
    assert page.read_text().count("```") == 2 * len(blocks(page)), "a block that this file does not see"
    for block in blocks(page):
        assert block.language in LANGUAGES, f"'{block.language}' is none of {LANGUAGES}"
        if found := re.fullmatch(r"run by (tests/\w+\.py)", block.mark):
            assert page.name in (ROOT / found[1]).read_text()
        else:
            assert block.mark in ("", "slow") or block.mark.startswith("not run: ")
        if block.language == "bash" and not here(block):
            for words in commands(block.code):
                if words[0].endswith("glidecape"):
                    checked(words)


def test_links_between_files_lead_somewhere() -> None:
    """What mkdocs does not see: the pages outside docs/."""
    for page in PAGES[:4]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
