"""Options stand once: the command line, the benchmark and Python read one class."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import dataclass, field, fields
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from glidecape.commands.bench import bench
from glidecape.commands.flatten import flattened
from glidecape.commands.generate import generate
from glidecape.core.params import SamplingParams
from glidecape.drafting.methods import make_drafter
from glidecape.drafting.options import MethodOptions, bins_from, bins_text
from glidecape.errors import InputError
from glidecape.options import option, option_of, tokens_from


@dataclass(frozen=True)
class Inner:
    bins: tuple[int, ...] = option((7, 1), "Bins.", flag="cape-bins", type=str, read=bins_from, write=bins_text)
    inside: object = None  # no option


@dataclass(frozen=True)
class Outer:
    count: int = option(3, "A count.", least=1)
    loud: bool = option(False, "Loud.")
    ended: bool | None = option(None, "Ended.")
    words: tuple[str, ...] = option((), "Words.", type=list[str] | None, read=tokens_from, write=list)
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.count > 100:
            raise InputError("too many")


def call(*words: str):
    seen = []
    app = typer.Typer()

    @app.command()
    @flattened
    def command(name: Annotated[str, typer.Argument()], outer: Outer = Outer(count=4), twice: bool = False) -> None:
        """Help."""
        seen.append((name, outer, twice))

    result = CliRunner().invoke(app, [*words])
    return result, seen[0] if seen else None


def test_the_fields_of_a_class_are_options_of_the_command() -> None:
    assert call("x")[1] == ("x", Outer(count=4), False)
    words = [
        "x",
        "--count",
        "5",
        "--loud",
        "--no-ended",
        "--words",
        "a",
        "--words",
        "b",
        "--cape-bins",
        "small",
        "--twice",
    ]
    assert call(*words)[1] == ("x", Outer(5, True, False, ("a", "b"), Inner(bins_from("small"))), True)
    text = call("--help")[0].output
    assert "--no-loud" not in text
    assert "--inside" not in text
    assert "7,1" in text


def test_bad_values_are_refused_by_the_class_or_the_option() -> None:
    assert isinstance(call("x", "--count", "101")[0].exception, InputError)
    assert call("x", "--count", "0")[0].exit_code == 2
    assert isinstance(call("x", "--cape-bins", "few")[0].exception, InputError)


@pytest.mark.parametrize("kind", [MethodOptions, SamplingParams])
def test_generate_offers_every_option(kind) -> None:
    start = next(one.default for one in inspect.signature(generate).parameters.values() if type(one.default) is kind)
    offered = inspect.signature(flattened(generate)).parameters
    for one in fields(kind):
        how = option_of(one)
        if how is not None:
            assert offered[how.parameter(one.name)].default == how.write(getattr(start, one.name)), one.name
    alone = {one.name for one in fields(kind) if option_of(one) is None}
    assert alone == ({"processor", "ends", "constraint", "logprobs"} if kind is SamplingParams else set())


def test_the_benchmark_offers_every_option_of_a_method() -> None:
    offered = inspect.signature(flattened(bench)).parameters
    assert {option_of(one).parameter(one.name) for one in fields(MethodOptions)} <= set(offered)


def test_a_drafter_takes_a_class_or_single_options() -> None:
    assert make_drafter("lookup", None, MethodOptions(length=7, ngram=2)).length == 7
    drafter = make_drafter("lookup", None, MethodOptions(length=7, ngram=2), length=4)
    assert (drafter.length, drafter.ngram) == (4, 2)
    with pytest.raises(InputError, match="unknown option 'lenght': did you mean length"):
        make_drafter("lookup", lenght=4)


def test_bins_are_read_as_they_are_written() -> None:
    for bins in (bins_from("paper"), bins_from("small"), (5,), (3, 2, 0)):
        assert bins_from(bins_text(bins)) == bins
    assert bins_from("7/5/3") == (7, 5, 3)


def test_help_needs_no_torch() -> None:
    code = "import sys, glidecape.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
