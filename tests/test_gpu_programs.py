"""What compiled programs do otherwise on a GPU, as far as a CPU can show it: attention by slots, weights that stay where they
lie, and packages that are loaded in a process of their own first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from glidecape.target import packages, streamed
from glidecape.target.operators import path_attention, slot_attention
from glidecape.target.packages import FOLDER, CompileError, Program, compiled
from test_kernels import ATTENTION, attention_case

COMPILER = pytest.mark.skipif(not packages.have_compiler(), reason="no C++ compiler on this machine")


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_by_slots_is_attention_by_position(name: str) -> None:
    dtype, *_, cap = ATTENTION[name]
    _, inputs, _ = attention_case(name, *ATTENTION[name])
    by_slot, by_position = slot_attention(*inputs, 0.2, cap), path_attention(*inputs, 0.2, cap)
    torch.testing.assert_close(by_slot, by_position, atol=1e-5 if dtype == "float32" else 4e-2, rtol=1e-5)


def test_attention_by_slots_reads_committed_slots_alone_where_no_scratch_is_on_a_path() -> None:
    """As a draft reads its target's keys."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
    lengths, nowhere = torch.tensor([17, 5]), torch.zeros(2, 3, 1, dtype=torch.bool)
    found = slot_attention(q, k, v, lengths, lengths[:, None], nowhere, torch.zeros(0, 0, 0, 0).bool(), 0.3, 0.0)
    for row, length in enumerate(lengths.tolist()):
        keys, values = (x[row : row + 1, :, :length] for x in (k, v))
        one = nn.functional.scaled_dot_product_attention(q[row : row + 1], keys, values, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(found[row], one[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


class Scaled(nn.Module):
    """A product with a weight, and a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 100)
        self.register_buffer("scale", torch.rand(100), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs are compiled as for a GPU, into a folder of their own."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setattr(Program, "on_cpu", property(lambda self: False))
    monkeypatch.setattr(packages, "_gpu_facts", lambda program: {"gpu": "none"})
    monkeypatch.setattr(streamed, "streamable", lambda layer: False)
    return tmp_path / "packages"


def program_of(module: nn.Module) -> Program:
    rows = {0: torch.export.Dim("rows", min=1, max=64)}
    return Program("a product", {"kind": "product"}, (module,), lambda: (module, (torch.ones(2, 6),), (rows,)))


@COMPILER
def test_a_program_reads_the_weights_of_the_model_itself(elsewhere: Path, monkeypatch) -> None:
    monkeypatch.setattr(packages, "_try_loading", lambda package, path: None)
    module, x, said = Scaled().requires_grad_(False), torch.randn(3, 6), list[str]()
    run = compiled(program_of(module), "on", said.append)
    assert run is not None, said
    torch.testing.assert_close(run([x])[0], module(x))
    module.linear.weight.mul_(3.0)
    torch.testing.assert_close(run([x])[0], module(x))
    # Another model of these shapes is served by the same package, with its own weights.
    other = Scaled().requires_grad_(False)
    again = compiled(program_of(other), "kept", said.append)
    assert again is not None
    torch.testing.assert_close(again([x])[0], other(x))
    assert len(list(elsewhere.glob("*.pt2"))) == 1
    # Values that the compiler writes into its code make another program.
    other.scale.fill_(0.5)
    assert packages.shapes_digest(module) != packages.shapes_digest(other)
    assert compiled(program_of(other), "kept", said.append) is None


@pytest.mark.parametrize(
    ("script", "reason"), [("kill -SEGV $$", "signal 11"), ("echo no driver >&2; exit 3", "no driver")]
)
def test_a_package_that_ends_a_process_is_never_loaded_in_this_one(
    elsewhere: Path, tmp_path: Path, monkeypatch, script: str, reason: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    made: list[str] = []

    def compile_to(path: str, *_: object, **__: object) -> None:
        made.append(path)
        Path(path).write_bytes(b"machine code")

    monkeypatch.setattr(packages.sys, "executable", str(python))
    monkeypatch.setattr(packages, "have_compiler", lambda: True)
    monkeypatch.setattr(packages, "compile_to", compile_to)
    monkeypatch.setattr(packages, "load_package", lambda *_: pytest.fail("it was loaded"))
    for _ in range(2):
        said: list[str] = []
        assert compiled(program_of(Scaled()), "on", said.append) is None
        assert said[-1].endswith(f"cannot load what it compiles for this GPU ({reason})")
    assert len(made) == 1, "it was compiled again"


def test_a_device_without_programs_and_weights_on_two_devices_are_refused() -> None:
    module = Scaled()
    for device, reason in (("meta", "not for devices of type meta"), ("cuda", "several devices")):
        program = Program("a product", {}, (module,), lambda: (), device=torch.device(device))
        with pytest.raises(CompileError, match=reason):
            packages._gpu_facts(program)


def test_weights_of_another_library_are_refused() -> None:
    class Foreign(Tensor):
        pass

    module = Scaled()
    module.scale = torch.ones(100).as_subclass(Foreign)
    with pytest.raises(TypeError, match="scale is a Foreign"):
        packages.shapes_digest(module)
