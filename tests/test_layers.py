"""Structure: layers, doctests, docstrings, file sizes."""

import ast
import doctest
import importlib
import importlib.util
import pkgutil
import sys
import tomllib
from pathlib import Path

import pytest

import glidecape

SOURCE = Path(glidecape.__file__).parent
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
CONTRACT = PROJECT["tool"]["importlinter"]["contracts"][0]
LAYERS = [
    {name.strip().removeprefix("glidecape.") for name in line.split(":")} for line in reversed(CONTRACT["layers"])
]
MODULES = [m.name for m in pkgutil.walk_packages(glidecape.__path__, "glidecape.")]
# These extend classes of Ray, which `make test-ray` has in an environment of its own.
NEED_RAY = {f"glidecape.serve.replicas.{name}" for name in ("deploy", "front", "router")}


def level(part):
    return next(i for i, names in enumerate(LAYERS) if part in names)


def test_a_module_imports_only_from_the_layers_above_it():
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        if parts in (("__init__",), ("__main__",)):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                package = parts[: len(parts) - node.level]
                target = (*package, *(node.module or "").split("."))
                if target[0] and target[0] != parts[0]:
                    assert level(target[0]) < level(parts[0]), f"{path.name} imports {target[0]}"


@pytest.fixture
def examples(world, tmp_path, monkeypatch):
    """A folder in which the paths of the examples in docstrings lead to a tiny model and its draft."""
    (tmp_path / "path" / "to").mkdir(parents=True)
    for name, made in (("model", "target"), ("draft", "glide")):
        (tmp_path / "path" / "to" / name).symlink_to(world[made])
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["glidecape", *MODULES])
def test_modules_say_what_they_are_and_their_examples_run(name, examples):
    if name in NEED_RAY and importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed here")
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip(), f"{name} has no docstring"
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    "name", sorted({*glidecape.__all__} - {"__version__", "METHODS"})
)  # no docstrings of their own
def test_every_exported_name_has_an_example_that_runs(name):
    found = doctest.DocTestFinder(recurse=False).find(getattr(glidecape, name), name)
    lines = [example for test in found for example in test.examples]
    assert lines, f"{name} has no example"
    assert not any(doctest.SKIP in example.options for example in lines), f"{name} has an example that is skipped"


def test_one_idea_a_file():
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 450, path


def test_a_function_has_sixty_lines_at_most():
    """With its decorators and its signature."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min(line.lineno for line in (node, *node.decorator_list))
                assert node.end_lineno - first < 60, f"{path.name}: {node.name}"


def test_protocols_say_what_each_method_does():
    """Whoever writes a plug-in reads them."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in node.bases):
                for method in node.body:
                    assert not isinstance(method, ast.FunctionDef) or ast.get_docstring(method), (
                        f"{node.name}: {method.name}"
                    )


def test_private_names_of_libraries_are_read_in_one_module():
    """A release may rename them: compat.py alone reads attributes with a leading underscore that are not this package's own."""
    ours, read = {"_replace", "_make"}, set()  # a named tuple's, which are public
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                ours.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                ours.add(node.attr)
            elif path.name == "compat.py":
                continue
            elif isinstance(node, ast.Attribute):
                read.add((path.name, node.attr))
            elif isinstance(node, ast.ImportFrom) and not node.level:
                read |= {(path.name, part) for part in (node.module or "").split(".")}
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
                read.add((path.name, str(getattr(node.args[1], "value", ""))))
    assert not {(file, name) for file, name in read if name[:1] == "_" and name[:2] != "__" and name not in ours}


def test_a_greedy_round_is_short_enough_to_be_read(world) -> None:
    """docs/design.md, "A token's way": the lines of this package that a round of the longest method runs."""
    from glidecape import SamplingParams, Target, load_draft, make_drafter
    from glidecape.engine.decode import start
    from glidecape.engine.round import run_round

    target = Target.from_pretrained(world["target"])
    drafter = make_drafter("glide+cape+svip", load_draft(world["glide"], target), length=4)
    batch = start(target, drafter, [[1, 2, 3, 4]], SamplingParams(max_new_tokens=40, ignore_eos=True))
    run_round(target, drafter, batch)
    lines = set()

    def trace(frame, event, _):
        if not frame.f_code.co_filename.startswith(str(SOURCE)):
            return None
        if event == "line":
            lines.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run_round(target, drafter, batch)
    finally:
        sys.settrace(before)
    assert 200 < len(lines) < 500
