"""Peers: GGUF files against a reader of their own, llama.cpp's server played by a script (and the real one where it is
built), transformers' speculative modes on a tiny world."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import CompileConfig

from glidecape import compat
from glidecape.bench.peers.base import PeerSource, draft_lm
from glidecape.bench.peers.gguf import interleaved, write_gguf
from glidecape.bench.peers.llama_cpp import NGRAMS, LlamaCppPeer, LlamaServer, find_program
from glidecape.bench.peers.registry import make_peers
from glidecape.core.params import SamplingParams
from glidecape.drafting.drafter import NoDraft
from glidecape.errors import InputError
from glidecape.measure.runs import run
from glidecape.target.target import Target

GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True)


class Reader:
    """GGUF read back, written from the format's description."""

    def __init__(self, path: Path) -> None:
        self.raw, self.at = path.read_bytes(), 4
        assert self.raw[:4] == b"GGUF"
        version, tensors, facts = self.take("<I"), self.take("<Q"), self.take("<Q")
        assert version == 3
        self.facts = {self.text(): self.value(self.take("<I")) for _ in range(facts)}
        infos = []
        for _ in range(tensors):
            name, rank = self.text(), self.take("<I")
            shape = [self.take("<Q") for _ in range(rank)][::-1]
            infos.append((name, shape, self.take("<I"), self.take("<Q")))
        start = -(-self.at // 32) * 32
        kinds = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
        self.tensors = {}
        for name, shape, kind, offset in infos:
            assert offset % 32 == 0
            count = torch.Size(shape).numel()
            own = torch.frombuffer(bytearray(self.raw), dtype=kinds[kind], count=count, offset=start + offset)
            self.tensors[name] = own.view(shape)

    def take(self, form: str):
        (value,) = struct.unpack_from(form, self.raw, self.at)
        self.at += struct.calcsize(form)
        return value

    def text(self) -> str:
        length = self.take("<Q")
        self.at += length
        return self.raw[self.at - length : self.at].decode()

    def value(self, kind: int):
        if kind == 8:
            return self.text()
        if kind == 9:
            inner, count = self.take("<I"), self.take("<Q")
            return [self.value(inner) for _ in range(count)]
        return self.take({4: "<I", 5: "<i", 6: "<f", 7: "<?"}[kind])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Llama of two layers with grouped queries and a byte-level BPE of 300 tokens, random weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    made = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(
        ["def add(a, b):\n    return a + b\n" * 20, "for item in table: total += item\n" * 9], trainer
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(made)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=304,
        hidden_size=52,  # norms of 208 bytes: the next tensor begins after padding
        head_dim=16,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(made)
    return made


def test_a_gguf_file_holds_the_model(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        write_gguf(folder, tmp_path / "m.gguf", dtype)
        read = Reader(tmp_path / "m.gguf")
        facts = read.facts
        assert facts["general.architecture"] == "llama"
        assert (facts["llama.attention.head_count"], facts["llama.attention.head_count_kv"]) == (4, 2)
        assert (facts["llama.rope.dimension_count"], facts["llama.context_length"]) == (16, 256)
        assert facts["llama.rope.freq_base"] == 10000.0
        assert facts["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
        tokens, merges = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.merges"]
        own = json.loads((folder / "tokenizer.json").read_text())["model"]
        assert all(tokens[i] == token for token, i in own["vocab"].items())
        assert len(tokens) == 304 == len(facts["tokenizer.ggml.token_type"])
        assert facts["tokenizer.ggml.token_type"][0] == 3
        assert facts["tokenizer.ggml.token_type"][303] == 5
        assert len(merges) == len(own["merges"])
        assert len(read.tensors) == len(weights)
        assert torch.equal(read.tensors["token_embd.weight"], weights["model.embed_tokens.weight"].to(dtype))
        assert torch.equal(read.tensors["output.weight"], weights["lm_head.weight"].to(dtype))
        assert torch.equal(
            read.tensors["blk.1.ffn_down.weight"], weights["model.layers.1.mlp.down_proj.weight"].to(dtype)
        )
        norm = read.tensors["blk.0.ffn_norm.weight"]
        assert norm.dtype == torch.float32
        assert torch.equal(norm, weights["model.layers.0.post_attention_layernorm.weight"])


def test_interleaved_rows_rotate_alike() -> None:
    """Rotating halves and then reordering is reordering and then rotating neighbours."""
    heads, size, width = 2, 8, 5
    weight, x = torch.randn(heads * size, width, dtype=torch.float64), torch.randn(width, dtype=torch.float64)
    angle = torch.arange(1, size // 2 + 1, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    halves = (weight @ x).view(heads, 2, size // 2)
    rotated = torch.stack([halves[:, 0] * cos - halves[:, 1] * sin, halves[:, 1] * cos + halves[:, 0] * sin], 1)
    pairs = (interleaved(weight, heads) @ x).view(heads, size // 2, 2)
    neighbours = torch.stack([pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin], -1)
    assert torch.allclose(neighbours.transpose(1, 2), rotated)


def test_what_is_not_converted_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    scaled = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}
    for change, message in (
        ({"model_type": "gemma3"}, "architecture gemma3"),
        (scaled, "rotary scaling llama3"),
        ({"attention_bias": True}, "biases"),
        ({"hidden_act": "gelu"}, "activation gelu"),
    ):
        copy = tmp_path / message.replace(" ", "-")
        shutil.copytree(folder, copy)
        (copy / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=message):
            write_gguf(copy, tmp_path / "m.gguf")
    with pytest.raises(InputError, match=r"not torch\.int8"):
        write_gguf(folder, tmp_path / "m.gguf", torch.int8)
    with pytest.raises(InputError, match=r"config\.json is missing"):
        write_gguf(tmp_path, tmp_path / "m.gguf")


def test_without_the_gguf_package_a_sentence_says_how_to_get_it(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'glidecape\[peers\]'"):
        write_gguf(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_windowed_model_is_exact_up_to_its_first_window_only(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "windowed"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    windowed = {"model_type": "qwen3", "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}
    (copy / "config.json").write_text(json.dumps(config | windowed))
    write_gguf(copy, tmp_path / "m.gguf")
    read = Reader(tmp_path / "m.gguf")
    assert read.facts["qwen3.context_length"] == 32
    write_gguf(folder, tmp_path / "llama.gguf")
    ordered, plain = (r.tensors["blk.0.attn_q.weight"] for r in (Reader(tmp_path / "llama.gguf"), read))
    assert not torch.equal(ordered, plain), "only Llama's queries are reordered"


SERVER = '''#!{python}
"""Plays llama-server: one Unix socket, /health, /props and /completion."""
import http.server, json, pathlib, socketserver, sys, time

words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "broken" in words["--model"]:
    print("something about the model")
    sys.exit(3)

class Answer(http.server.BaseHTTPRequestHandler):
    def say(self, status, what):
        raw = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
    def do_GET(self):
        self.say(200, {{"build_info": "b7", "status": "ok"}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        pathlib.Path(words["--model"]).write_text(json.dumps(asked | {{"words": sys.argv}}))
        if len(asked["prompt"]) > 8:
            self.say(400, {{"error": {{"message": "too long"}}}})
        else:
            tokens = [t + 1 for t in asked["prompt"]][: asked["n_predict"]]
            self.say(200, {{"tokens": tokens, "timings": {{"predicted_ms": 250.0}}}})
    def address_string(self):
        return ""

class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

Server(words["--host"], Answer).serve_forever()
'''


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "llama-server"
    path.write_text(SERVER.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_server_is_asked_with_token_ids_and_ends_when_closed(program: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    server = LlamaServer(model, threads=3, context=64, draft=tmp_path / "draft", draft_length=4, program=program)
    assert server.build == "b7"
    params = SamplingParams(0.7, max_new_tokens=2, ignore_eos=True, seed=5)
    assert server.complete([4, 5, 6], params)["tokens"] == [5, 6]
    asked = json.loads(model.read_text())
    assert (asked["temperature"], asked["seed"], asked["ignore_eos"]) == (0.7, 5, True)
    assert (asked["samplers"], asked["cache_prompt"]) == (["temperature"], False)
    words = " ".join(asked["words"])
    assert "--threads 3" in words
    assert f"--spec-draft-model {tmp_path / 'draft'} --spec-draft-n-max 4" in words
    with pytest.raises(InputError, match="refused a prompt of 9 tokens: too long"):
        server.complete([1] * 9, params)
    server.close()
    assert server.process.returncode is not None
    assert not server.socket.parent.exists()
    with pytest.raises(InputError, match="ended with code"):
        server.complete([1], params)


def test_n_grams_are_asked_for_by_type(program: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    for ngrams, words in (
        ("lookup", "--spec-type ngram-simple --spec-ngram-simple-size-n 2 --spec-ngram-simple-size-m 10"),
        ("ngram-cache", "--spec-type ngram-cache"),
    ):
        server = LlamaServer(model, 1, 64, program=program, ngrams=ngrams)
        server.complete([4, 5], GREEDY)
        server.close()
        assert " ".join(json.loads(model.read_text())["words"]).endswith(words)


def test_a_server_that_cannot_start_says_why(program: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ended with code 3 before it was ready: something about the model"):
        LlamaServer(tmp_path / "broken", 1, 64, program=program)


def test_a_server_outlives_nobody(program: Path, tmp_path: Path) -> None:
    """Its owner is killed where it stands; the server's socket is answered no more."""
    code = (
        "import sys, time; from pathlib import Path; from glidecape.bench.peers.llama_cpp import LlamaServer;"
        f"s = LlamaServer(Path({str(tmp_path / 'model')!r}), 1, 64, program=Path({str(program)!r}));"
        "print(s.process.pid, s.socket, flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    keeper, _, socket = owner.stdout.readline().strip().partition(" ")
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    for _ in range(200):
        if not _alive(int(keeper)):
            break
        time.sleep(0.05)
    assert not _alive(int(keeper))
    shutil.rmtree(Path(socket).parent)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "Z (zombie)" not in status.read_text()


def test_programs_are_looked_for(monkeypatch, tmp_path: Path, program: Path) -> None:
    monkeypatch.setenv("GLIDECAPE_PEERS", str(tmp_path / "env"))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="run `make peers`"):
        find_program()
    (tmp_path / "env" / "bin").mkdir(parents=True)
    shutil.copy(program, tmp_path / "env" / "bin" / "llama-server")
    assert find_program() == tmp_path / "env" / "bin" / "llama-server"


@pytest.fixture(scope="module")
def target(folder: Path) -> Target:
    return Target.from_pretrained(folder, torch.float32)


def test_transformers_speculates_and_emits_the_same_tokens(folder: Path, target: Target) -> None:
    source = PeerSource(str(folder), target, {"glide": "nowhere", "vanilla": str(folder)})
    names = ["transformers", "transformers+lookup", "transformers+draft"]
    peers = make_peers(names, source)
    assert [p.name for p in peers] == names
    prompt = [5, 9, 13, 5, 9, 13, 5, 9]
    expected = run(target, NoDraft(), [prompt], GREEDY).tokens[0]
    for peer in peers:
        forwards = []
        hook = peer.model.register_forward_pre_hook(lambda *_, own=forwards: own.append(1))
        tokens, seconds = peer.run(prompt, GREEDY)
        hook.remove()
        assert tokens == expected
        assert seconds > 0
        if peer.name == "transformers+draft":  # its assistant is the target itself: rounds of many tokens
            assert len(forwards) < 20
    drawn, _ = peers[1].run(prompt, SamplingParams(1.0, max_new_tokens=24, ignore_eos=True))
    assert len(drawn) == 24


def compiled_by(monkeypatch, backend) -> None:
    """Dynamo traces as always; a backend that is quicker than Inductor takes the graphs."""
    monkeypatch.setattr(compat, "CompileConfig", partial(CompileConfig, backend=backend))


def test_transformers_compiles_outside_the_timing(folder: Path, target: Target, monkeypatch) -> None:
    """The same tokens; once there is room, prompts of any length run the graph that there is."""
    graphs = []

    def backend(graph, inputs, **_):
        graphs.append(graph)
        return graph.forward

    compiled_by(monkeypatch, backend)
    (peer,) = make_peers(["transformers+compile"], PeerSource(str(folder), target))
    assert graphs
    peer.run([1] * 120, SamplingParams(max_new_tokens=120, ignore_eos=True))
    before = len(graphs)
    for prompt in ([5, 9, 13, 5, 9, 13, 5, 9], [250, 1, 2, 3], [7] * 90):
        tokens, seconds = peer.run(prompt, GREEDY)
        assert tokens == run(target, NoDraft(), [prompt], GREEDY).tokens[0]
        assert seconds > 0
    assert len(graphs) == before
    drawn, _ = peer.run([5, 9, 13], SamplingParams(1.0, max_new_tokens=24, ignore_eos=True))
    assert len(drawn) == 24


def test_a_run_in_which_something_was_compiled_is_made_again(folder: Path, target: Target, monkeypatch) -> None:
    from glidecape.bench.peers import transformers as transformers_peers

    compiled_by(monkeypatch, "eager")
    (peer,) = make_peers(["transformers+compile"], PeerSource(str(folder), target))
    runs, counts = iter([([1], 9.0), ([1], 0.5)]), iter([1, 2, 2, 2])
    monkeypatch.setattr(transformers_peers.TransformersPeer, "run", lambda *_: next(runs))
    monkeypatch.setattr(transformers_peers, "graphs_compiled", lambda: next(counts))
    assert peer.run([5, 9], GREEDY) == ([1], 0.5)


def test_a_model_that_cannot_be_compiled_is_refused_with_the_reason(folder: Path, target: Target, monkeypatch) -> None:
    def backend(graph, inputs, **_):
        raise RuntimeError("no such operator\nand a long story")

    compiled_by(monkeypatch, backend)
    with pytest.raises(InputError, match=r"torch\.compile fails on this model: .*no such operator.*leave transformers"):
        make_peers(["transformers+compile"], PeerSource(str(folder), target))


@pytest.mark.slow
def test_transformers_compiled_by_inductor_emits_the_same_tokens(folder: Path, target: Target) -> None:
    (peer,) = make_peers(["transformers+compile"], PeerSource(str(folder), target))
    prompt = [5, 9, 13, 5, 9, 13, 5, 9]
    assert peer.run(prompt, GREEDY)[0] == run(target, NoDraft(), [prompt], GREEDY).tokens[0]


def test_the_time_of_the_first_round_is_not_counted(folder: Path, target: Target, monkeypatch) -> None:
    """The assistant is the target itself, so the first round emits several tokens: the others took 4 seconds here."""
    from glidecape.bench.peers import transformers as transformers_peers

    notes = []

    class Noted(transformers_peers._FirstRound):
        def __init__(self) -> None:
            super().__init__()
            notes.append(self)

    (peer,) = make_peers(["transformers+draft"], PeerSource(str(folder), target, {"vanilla": str(folder)}))
    clock = iter([10.0, 14.0])
    monkeypatch.setattr(transformers_peers, "_FirstRound", Noted)
    monkeypatch.setattr(transformers_peers.time, "perf_counter", lambda: next(clock))
    prompt = [5, 9, 13]
    tokens, seconds = peer.run(prompt, GREEDY)
    first = notes[0].length - len(prompt)
    assert first > 1
    assert seconds == pytest.approx(4.0 * (len(tokens) - 1) / (len(tokens) - first))


def test_a_peer_that_drafts_needs_a_draft_lm(tmp_path: Path, target: Target) -> None:
    from glidecape.drafts.checkpoint import WEIGHTS

    (tmp_path / WEIGHTS).write_bytes(b"")
    with pytest.raises(InputError, match="--draft vanilla=FOLDER"):
        draft_lm(PeerSource("x", target, {"glide": str(tmp_path)}))
    assert draft_lm(PeerSource("x", target, {"glide": str(tmp_path), "other": "folder"})) == "folder"
    with pytest.raises(InputError, match=r"choose from transformers, .*llama\.cpp\+draft"):
        make_peers(["vllm"], PeerSource("x", target))


def built(name: str) -> None:
    """Skip where `make peers` did not make this program."""
    try:
        find_program(name)
    except InputError as error:
        pytest.skip(str(error))


PROMPTS = ([5, 9, 13, 5, 9, 13, 5, 9], [250, 1, 2, 3])


@pytest.mark.parametrize("how", ["plain", "draft", *NGRAMS])
def test_llama_cpp_emits_the_targets_tokens(folder: Path, target: Target, how: str) -> None:
    built("llama-server")
    name = "llama.cpp" if how == "plain" else f"llama.cpp+{how}"
    (peer,) = make_peers([name], PeerSource(str(folder), target, {"vanilla": str(folder)}))
    assert peer.name == name
    for prompt in PROMPTS:
        tokens, seconds = peer.run(prompt, GREEDY)
        assert tokens == run(target, NoDraft(), [prompt], GREEDY).tokens[0]
        assert seconds > 0
    peer.server.close()


@pytest.mark.parametrize("ngrams", ["ngram-map-k", "ngram-mod", "ngram-cache"])
def test_llama_cpps_n_grams_know_nothing_of_earlier_runs(folder: Path, target: Target, ngrams: str) -> None:
    """The answer to a prompt seen before is drafted no better than at first."""
    built("llama-server")
    peer = LlamaCppPeer(PeerSource(str(folder), target), ngrams=ngrams)
    params = SamplingParams(max_new_tokens=120, ignore_eos=True)
    drafted = []
    complete = LlamaServer.complete
    for _ in range(2):
        found = complete(peer.server, PROMPTS[0], params)["timings"]
        drafted.append((found.get("draft_n", 0), found.get("draft_n_accepted", 0)))
        peer.run(PROMPTS[0], params)
    peer.server.close()
    assert drafted[0] == drafted[1]


def test_in_bfloat16_llama_cpp_gets_weights_in_bfloat16(folder: Path, program: Path, monkeypatch) -> None:
    bin = program.parent / "env" / "bin"
    bin.mkdir(parents=True)
    shutil.copy(program, bin / "llama-server")
    monkeypatch.setenv("GLIDECAPE_PEERS", str(program.parent / "env"))
    target = Target.from_pretrained(folder, torch.bfloat16)
    peer = LlamaCppPeer(PeerSource(str(folder), target), draft=str(folder))
    for name in ("target", "draft"):
        tensors = Reader(Path(peer.made.name) / f"{name}.gguf").tensors
        assert {one.dtype for one in tensors.values() if one.ndim == 2} == {torch.bfloat16}
    peer.server.close()


def test_llama_cpp_decodes_in_bfloat16(folder: Path) -> None:
    built("llama-server")
    target = Target.from_pretrained(folder, torch.bfloat16)
    peer = LlamaCppPeer(PeerSource(str(folder), target))
    tokens, _ = peer.run(PROMPTS[0], GREEDY)
    peer.server.close()
    right = run(target, NoDraft(), [PROMPTS[0]], GREEDY).tokens[0]
    assert len(tokens) == len(right)
    assert tokens[0] == right[0]  # later ones may fall to the other side of a rounding


CHILD = """#!{python}
import json, sys
started = json.loads(sys.argv[-1])
if "broken" in started["target"]:
    print("something about the model", file=sys.stderr)
    sys.exit(3)
print(json.dumps({{"version": "7"}}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if len(asked["prompt"]) > 8:
        print(json.dumps({{"error": "ValueError: too long"}}), flush=True)
        sys.exit(1)
    print(json.dumps({{"tokens": [asked["max_new_tokens"], *asked["eos"], started["threads"]], "seconds": 0.25}}), flush=True)
"""


def test_openvinos_process_is_spoken_to_in_json_lines(
    folder: Path, target: Target, tmp_path: Path, monkeypatch
) -> None:
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "openvino-python").write_text(CHILD.format(python=sys.executable))
    (bin / "openvino-python").chmod(0o700)
    monkeypatch.setenv("GLIDECAPE_PEERS", str(tmp_path))
    peers = make_peers(["openvino", "openvino+lookup", "openvino+draft"], PeerSource(str(folder), target, {"a": "lm"}))
    assert [peer.name for peer in peers] == ["openvino", "openvino+lookup", "openvino+draft"]
    for peer in peers:
        assert peer.version == "7"
        assert peer.run([4, 5], GREEDY) == ([24, 0, torch.get_num_threads()], 0.25)
    with pytest.raises(InputError, match=r"openvino\+lookup failed: ValueError: too long"):
        peers[1].run([1] * 9, GREEDY)
    with pytest.raises(InputError, match=r"openvino\+lookup failed: it ended with code 1"):
        peers[1].run([1], GREEDY)
    for peer in peers:
        peer.close()
    with pytest.raises(InputError, match="ended with code 3: something about the model"):
        make_peers(["openvino"], PeerSource("broken", target))
    monkeypatch.setenv("GLIDECAPE_PEERS", str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="openvino-python is not there: run `make peers`"):
        make_peers(["openvino"], PeerSource(str(folder), target))


def test_openvino_emits_the_targets_tokens(folder: Path, target: Target) -> None:
    built("openvino-python")
    source = PeerSource(str(folder), target, {"vanilla": str(folder)})
    for peer in make_peers(["openvino", "openvino+lookup", "openvino+draft"], source):
        for prompt in PROMPTS:
            tokens, seconds = peer.run(prompt, GREEDY)
            assert tokens == run(target, NoDraft(), [prompt], GREEDY).tokens[0], peer.name
            assert seconds > 0
        drawn, _ = peer.run(PROMPTS[0], SamplingParams(1.0, max_new_tokens=24, ignore_eos=True))
        assert len(drawn) == 24
        peer.close()


def test_openvino_decodes_in_bfloat16(folder: Path) -> None:
    built("openvino-python")
    target = Target.from_pretrained(folder, torch.bfloat16)
    (peer,) = make_peers(["openvino"], PeerSource(str(folder), target))
    tokens, _ = peer.run(PROMPTS[0], GREEDY)
    peer.close()
    right = run(target, NoDraft(), [PROMPTS[0]], GREEDY).tokens[0]
    assert (len(tokens), tokens[0]) == (len(right), right[0])  # later ones may fall to the other side of a rounding
