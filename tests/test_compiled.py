"""Compiled programs: the tokens are eager decoding's, and the cache folder is trusted and damaged as little as possible."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import zoo
from glidecape import METHODS, SamplingParams, Target, generate, load_draft, make_drafter
from glidecape.certify import BUG, certify
from glidecape.cli import main
from glidecape.core.tree import TokenTree
from glidecape.drafts.causal_lm import StandaloneDraft
from glidecape.target import packages
from glidecape.target.graphs import flat_run
from glidecape.target.packages import FOLDER, Program, compiled
from glidecape.target.packed import PackedLinear, packs

COMPILER = pytest.mark.skipif(not packages.have_compiler(), reason="no C++ compiler on this machine")
PROMPTS = [[5, 9, 13, 40], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [3]]


@pytest.fixture(autouse=True)
def cache(programs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(programs))
    return programs


def doubler() -> Program:
    """2 x as a program whose weight is packed."""
    module = nn.Sequential(PackedLinear(2 * torch.eye(16)))

    def make():
        return module, (torch.ones(3, 16),), ({0: Dim("rows", min=1, max=64)},)

    return Program("a doubler", {"kind": "doubler"}, (module,), make)


@COMPILER
def test_a_program_is_compiled_once_and_serves_every_number_of_rows(cache: Path) -> None:
    said: list[str] = []
    assert compiled(doubler(), "kept", said.append) is None
    assert not said
    run = compiled(doubler(), "on", said.append)
    assert run is not None
    assert [text.split()[0] for text in said] == ["compiling", "compiled"]
    for rows in (1, 2, 33):
        assert torch.equal(run([torch.ones(rows, 16)])[0], torch.full((rows, 16), 2.0))
    program = doubler()
    again = compiled(program, "kept", said.append)
    assert again is not None
    assert len(said) == 2
    assert isinstance(program.modules[0][0], PackedLinear)  # packed again when it was made
    assert torch.equal(again([torch.ones(1, 16)])[0], torch.full((1, 16), 2.0))
    assert not list((cache / "packages").glob(f".*.{os.getpid()}.pt2"))


@COMPILER
@COMPILER
def test_what_the_compiler_makes_on_the_way_is_removed_and_so_are_packages_that_nobody_loads(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    old, recent = (tmp_path / "packages" / name for name in ("old.json", "recent.json"))
    old.parent.mkdir(mode=0o700)
    for note in (old, recent):
        note.write_text("{}")
        note.with_suffix(".pt2").write_text("a package")
    os.utime(old, (1e9, 1e9))
    before = {path.name for path in Path(tempfile.gettempdir()).glob("torchinductor*/*")}
    assert compiled(doubler(), "on", print)
    kinds = {path.name if path.name.startswith(".") else path.suffix for path in old.parent.iterdir()}
    own = f".{packages.WORKSPACE}.{os.getpid()}"
    assert kinds - {own} == {".json", ".pt2", ".so", ".lock"}
    assert {path.name for path in (old.parent / own / "inductor").glob("*")} <= {packages.HEADERS}
    assert {path.name for path in Path(tempfile.gettempdir()).glob("torchinductor*/*")} == before
    assert not old.exists()
    assert not old.with_suffix(".pt2").exists()
    assert recent.exists()
    assert recent.with_suffix(".pt2").exists()


@COMPILER
def test_no_package_holds_weights_and_programs_share_them(cache: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(PackedLinear(torch.randn(1024, 1024)) for _ in range(4)))

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = 2 * x
            return torch.stack([part(x) for part in self.parts]).sum(0)

    rows = ({0: Dim("rows", min=1, max=64)},)
    program = Program("a sum", {"kind": "sum"}, (module,), lambda: (Sum(), (torch.ones(3, 1024),), rows))
    first = compiled(program, "on", print)
    again = compiled(program, "kept", print)
    assert first is not None
    assert again is not None
    held = [{name: one.data_ptr() for name, one in run.weights.items() if one.numel()} for run in (first, again)]
    assert held[0] == held[1]
    assert [len(one) for one in held] == [1, 1]  # the four layers, one after another: not these and their joint
    (path,) = [one for one in (cache / "packages").glob("*.pt2") if "a sum" in one.with_suffix(".json").read_text()]
    assert path.stat().st_size < 4 * 1024**2 < sum(one.nbytes for one in first.weights.values()) / 3
    x = torch.randn(2, 1024)
    assert torch.equal(first([x])[0], again([x])[0])
    torch.testing.assert_close(first([x])[0], sum(part(2 * x) for part in module), atol=1e-3, rtol=1e-4)
    del first
    assert torch.equal(again([x[:1]])[0], again([x])[0][:1])


@COMPILER
def test_small_weights_lie_together_and_what_a_program_reads_is_not_moved() -> None:
    torch.manual_seed(0)
    first, second, third = (PackedLinear(torch.randn(512, 512)) for _ in range(3))

    def run_of(*layers: nn.Module) -> Any:
        module = nn.Sequential(*layers)
        rows = ({0: Dim("rows", min=1, max=64)},)
        run = compiled(
            Program("two layers", {"kind": "pair"}, (module,), lambda: (module, (torch.ones(3, 512),), rows)),
            "on",
            print,
        )
        assert run is not None
        return run

    x = torch.randn(2, 512)
    one = run_of(first, second)
    before, places = one([x])[0], {name: w.data_ptr() for name, w in one.weights.items() if w.numel()}
    assert max(places.values()) - min(places.values()) == 512 * 512 * 4
    other = run_of(first, third)
    shared = {w.data_ptr() for w in other.weights.values() if w.numel()} & set(places.values())
    assert len(shared) == 1
    assert {name: w.data_ptr() for name, w in one.weights.items() if w.numel()} == places
    assert torch.equal(one([x])[0], before)
    torch.testing.assert_close(before, second(first(x)), atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(other([x])[0], third(first(x)), atol=1e-2, rtol=1e-4)
    del one
    torch.testing.assert_close(other([x])[0], third(first(x)), atol=1e-2, rtol=1e-4)


def test_other_weights_are_another_program() -> None:
    said: list[str] = []
    program = doubler()
    program.modules[0][0] = PackedLinear(3 * torch.eye(16))
    assert compiled(program, "kept", said.append) is None


@COMPILER
def test_a_torn_package_is_made_anew(cache: Path) -> None:
    said: list[str] = []
    assert compiled(doubler(), "on", said.append) is not None
    (path,) = [one for one in (cache / "packages").glob("*.pt2") if "doubler" in one.with_suffix(".json").read_text()]
    path.write_bytes(path.read_bytes()[:1000])
    assert compiled(doubler(), "kept", said.append) is None
    run = compiled(doubler(), "on", said.append)
    assert run is not None
    assert torch.equal(run([torch.ones(2, 16)])[0], torch.full((2, 16), 2.0))
    path.with_suffix(".json").write_text("{")
    assert compiled(doubler(), "kept", said.append) is None


def test_a_folder_that_others_may_write_to_is_not_trusted(tmp_path: Path, monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setenv(FOLDER, str(tmp_path))
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages").chmod(0o777)
    assert compiled(doubler(), "on", said.append) is None
    assert "others may write to" in said[0]
    assert "chmod 700" in said[0]


def test_without_a_compiler_decoding_stays_eager(tmp_path: Path, monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setattr(packages, "have_compiler", lambda: False)
    assert compiled(doubler(), "on", said.append) is None
    assert said == ["a doubler is not compiled: there is no C++ compiler here (g++ or clang++)"]


def test_a_full_disk_and_a_program_that_cannot_be_exported_are_said(tmp_path: Path, cache: Path, monkeypatch) -> None:
    if (cache / "packages").is_dir():  # the kernels that are there need not be compiled again
        shutil.copytree(cache / "packages", tmp_path / "packages", ignore=shutil.ignore_patterns("*.pt2", ".*"))
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setattr(packages, "have_compiler", lambda: True)
    for error, message in (
        (OSError(28, "No space left on device"), "it cannot be kept in the cache folder (No space left on device)"),
        (ValueError("an odd model\nwith details"), "ValueError: an odd model"),
    ):
        said: list[str] = []

        def broken(path, *_, error=error):
            Path(path).write_bytes(b"half")
            raise error

        monkeypatch.setattr(packages, "compile_to", broken)
        assert compiled(doubler(), "on", said.append) is None
        assert said[-1] == f"a doubler is not compiled: {message}"
        assert not list((tmp_path / "packages").glob("*.pt2")) + list((tmp_path / "packages").glob(".*.pt2"))


def test_a_model_in_float16_stays_eager_and_says_so(world) -> None:
    target, said = Target.from_pretrained(world["target"], dtype=torch.float16), list[str]()
    assert not target.compile("on", said.append)
    assert said[0].endswith("its weights are float16, which programs do not compute in: --dtype float32 or bfloat16")
    assert not target.compile("kept", pytest.fail)


@pytest.mark.parametrize("factor", [1.2, float("nan")])
def test_a_program_whose_logits_are_wrong_is_not_used(world, monkeypatch, factor: float) -> None:
    target, said = Target.from_pretrained(world["target"], dtype=torch.float32), list[str]()

    def run(inputs):
        module, example, _ = target.program().make()
        logits, hidden = flat_run(module, example)(inputs)
        return [logits * right[0], hidden]

    monkeypatch.setattr("glidecape.target.target.compiled", lambda *_: run)
    right = [factor]
    assert not target.compile("on", said.append)
    assert said == ["the model is not compiled: its program's logits for 1 x 1 nodes are wrong"]
    right[0] = 1.0
    assert target.compile("on", pytest.fail)


@COMPILER
@pytest.mark.slow
def test_two_processes_compile_once(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_compiled import doubler, compiled
assert compiled(doubler(), "on", print) is not None
"""
    environment = os.environ | {FOLDER: str(tmp_path)}
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) for _ in "ab"
    ]
    told = [run.communicate(timeout=200)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sorted(text.count("compiled a doubler") for text in told) == [0, 1]


def compare(target: Target, drafts: dict[str, object], methods: list[str], residual: bool = True) -> None:
    """Tokens of compiled programs against those of eager ones, alone and in a ragged batch, greedy and with noise."""
    cases = [
        SamplingParams(max_new_tokens=24, ignore_eos=True),
        SamplingParams(1.0, seed=3, max_new_tokens=16, ignore_eos=True),
        SamplingParams(0.8, seed=5, max_new_tokens=12, ignore_eos=True, sampling="residual"),
    ]
    # Under the residual rule a draft that is the target uses up its chance or not as p / q rounds to 1 or below.
    cases = cases if residual else cases[:2]
    made = {m: make_drafter(m, drafts.get(m.split("+")[0]), length=3, bins=(2, 1, 1, 0), beams=3) for m in methods}
    before = [[generate(target, PROMPTS, one, params) for params in cases] for one in made.values()]
    said: list[str] = []
    assert target.compile("on", said.append), said
    for method, one in made.items():
        done = one.compile("on", said.append)
        assert done or method.split("+")[0] in ("plain", "lookup", "medusa"), said
    for (method, one), expected in zip(made.items(), before, strict=True):
        for params, outputs in zip(cases, expected, strict=True):
            together = generate(target, PROMPTS, one, params)
            assert [o.tokens for o in together] == [o.tokens for o in outputs], (method, params.temperature)
        alone = [generate(target, [prompt], one, cases[0])[0].tokens for prompt in PROMPTS]
        assert alone == [o.tokens for o in expected[0]], method
    chains = {key for draft in drafts.values() for key in getattr(draft, "chains", {})}
    # Those of chains and of CaPE, and of auto.
    expected_chains = {(2, 1), (3, 1), (3, 3), (4, 1), (4, 5)}
    assert chains == (expected_chains if {"glide", "glide+cape", "glide+auto"} <= set(methods) else set())


@COMPILER
def test_tokens_are_eager_decoding_s(world) -> None:
    """The target and the verdict; each program of a draft takes as long to compile, and is tested by `make test-all`."""
    compare(Target.from_pretrained(world["target"], dtype=torch.float32), {}, ["plain", "lookup"])


@COMPILER
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_tokens_are_eager_decoding_s_with_every_draft(world, monkeypatch) -> None:
    # Under the residual rule tokens depend on the draft's law, so both ways compute it in float32, from whole weights.
    monkeypatch.setattr("glidecape.target.packed.cpu_has_bfloat16", lambda: False)
    whole = lambda *facts, in_8_bits, **options: Program(*facts, **options)  # noqa: E731
    monkeypatch.setattr("glidecape.drafts.program.Program", whole)
    packs.cache_clear()
    target = Target.from_pretrained(world["target"], dtype=torch.float32)
    drafts = {name: load_draft(world[name], target) for name in ("glide", "eagle", "medusa")}
    drafts["vanilla"] = StandaloneDraft(Target.from_pretrained(world["lm"], dtype=torch.float32))
    compare(target, drafts, [m for m in METHODS if m.split("+")[0] in drafts])
    packs.cache_clear()


OTHERS = [
    "gpt2",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "smollm3",
    "cohere",
    "glm",
    "granite",
]


@COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_tokens_are_eager_decoding_s_for_other_families(kind: str) -> None:
    target = Target(zoo.build(kind))
    compare(target, {"vanilla": StandaloneDraft(Target(zoo.build(kind)))}, ["plain", "vanilla+cape"], residual=False)


@COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", *OTHERS])
def test_in_bfloat16_every_method_writes_what_plain_decoding_does(kind: str) -> None:
    """To the bit, so that no token differs by rounding: alone and in ragged batches, greedily and with noise. Rounding in
    another order explains where the tokens of transformers differ."""
    model = zoo.build(kind)
    with torch.no_grad():
        for one in model.parameters():  # another model than the target, but near enough to be accepted now and then
            one += 0.05 * torch.randn_like(one)
    target, draft = (Target(one.to(torch.bfloat16)) for one in (zoo.build(kind), model))
    reference, said = zoo.build(kind).to(torch.bfloat16), list[str]()
    assert target.compile("on", said.append), said
    methods = ("vanilla", "vanilla+cape", "vanilla+cape+svip", "lookup")
    drafters = {
        name: make_drafter(name, None if name == "lookup" else StandaloneDraft(draft), bins=(2, 1, 1, 0))
        for name in methods
    }
    for temperature in (0.0, 1.0):
        params = SamplingParams(max_new_tokens=64, temperature=temperature, seed=3, ignore_eos=True)
        prompts = [([7 + i, 8, 9], replace(params, seed=3 + i)) for i in range(8)]
        plain = [generate(target, [prompt], None, one)[0].tokens for prompt, one in prompts]
        for method, drafter in drafters.items():
            alone = [generate(target, [prompt], drafter, one)[0] for prompt, one in prompts]
            assert [one.tokens for one in alone] == plain, (method, temperature)
            if method != "lookup":  # accepted now and then, and rejected, too: a round brings one to six tokens
                assert 8 * 11 < sum(len(one.rounds) for one in alone) < 8 * 64
            together = generate(target, [prompt for prompt, _ in prompts], drafter, params)
            assert [one.tokens for one in together] == plain, (method, temperature)
        found = certify(
            target, reference, drafters, [[7, 8, 9], [8, 8, 9]], replace(params, max_new_tokens=32), batch=2
        )
        assert not [one for one in found if one.verdict == BUG or one.against == "plain"], temperature


@COMPILER
def test_the_command_compiles_when_it_is_told_to(world, monkeypatch, capfd) -> None:
    words = ["generate", "--target", world["target"], "--method", "lookup", "-p", "def load", "--max-new-tokens", 12]
    outputs = []
    for mode in ("off", "on"):
        monkeypatch.setattr(sys, "argv", ["glidecape", *map(str, words), "--compile", mode, "--dtype", "float32"])
        with pytest.raises(SystemExit, match="0"):
            main()
        outputs.append(capfd.readouterr())
    assert outputs[0].out == outputs[1].out
    assert "compil" not in outputs[0].err
    monkeypatch.setattr(sys, "argv", ["glidecape", *map(str, words), "--compile", "always"])
    with pytest.raises(SystemExit):
        main()
    assert "--compile takes auto, on or off" in capfd.readouterr().err


@COMPILER
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_a_node_has_the_same_bits_in_every_tree_and_batch(world, dtype: torch.dtype) -> None:
    target = Target.from_pretrained(world["target"], dtype=dtype)
    said: list[str] = []
    assert target.compile("on", said.append), said
    parents, past = [-1, 0, 0, 1, 1, 2, 3, 5, 7], 21
    torch.manual_seed(0)
    prompt, tokens = torch.randint(0, target.vocab_size, (1, past)), torch.randint(0, target.vocab_size, (1, 9))
    tree = TokenTree(tokens[:, 0], 9)
    for node in range(1, 9):
        tree.add(torch.tensor([[parents[node]]]), tokens[:, node : node + 1], torch.zeros(1, 1))

    def begun(rows: int, *lengths: int):
        cache = target.new_cache(rows, 64)
        with torch.no_grad():
            target.forward(prompt.expand(rows, -1), torch.arange(past).expand(rows, -1), cache, logits_to_keep=1)
        cache.commit(list(lengths))
        return cache

    with torch.no_grad():
        positions = tree.positions(torch.tensor([past]))
        whole = target.forward(tree.tokens, positions, begun(1, past), tree.ancestors).logits[0].clone()
        both = target.forward(
            tree.tokens.expand(2, -1),
            torch.cat([positions - 4, positions]),
            begun(2, past - 4, past),
            tree.ancestors.expand(2, -1, -1),
        ).logits[1]
        assert torch.equal(both, whole)
        for node in range(9):
            path = tree.ancestors[0, node].nonzero().flatten().tolist()
            cache = begun(1, past)
            for depth, one in enumerate(path):
                out = target.forward(tokens[:, one : one + 1], torch.tensor([[past + depth]]), cache).logits
                cache.commit([1])
            assert torch.equal(out[0, 0], whole[node]), node


@COMPILER
def test_a_forward_costs_the_same_however_large_the_cache_is(world) -> None:
    """A program that copied the keys and values of its cache would take a hundred times as long."""
    target = Target.from_pretrained(world["target"], dtype=torch.float32)
    assert target.compile("on", lambda _: None)

    def seconds(capacity: int) -> float:
        room, token = target.new_cache(1, capacity), torch.zeros(1, 1, dtype=torch.long)
        room.commit([8])
        times = []
        for _ in range(9):
            started = time.perf_counter()
            target.forward(token, token + 8, room)
            times.append(time.perf_counter() - started)
        return min(times)

    small, large = seconds(32), seconds(400_000)
    assert large < 8 * small, (small, large)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted as Linux shows them")
def test_a_thread_s_openmp_threads_end_when_they_are_freed_and_come_back() -> None:
    code = """
import os, torch
from glidecape.compat import free_threads
torch.set_num_threads(3)
count = lambda: len(os.listdir("/proc/self/task"))
x = torch.randn(600, 600)
first = (x @ x).sum()
torch.rand(1_000_000).exp()
busy = count()
free_threads()
print(busy - count(), bool(torch.equal((x @ x).sum(), first)), torch.get_num_threads())
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.split() == ["2", "True", "3"], ran.stdout + ran.stderr
