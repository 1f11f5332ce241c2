"""`glidecape.load` and what it gives: one line to use it, with the output of plain decoding."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MaxLengthCriteria, MaxTimeCriteria, NoRepeatNGramLogitsProcessor

import glidecape
from glidecape import MethodOptions, SamplingParams, Target, generate
from glidecape.core.cache import KVCache
from glidecape.errors import CheckpointError, InputError, UnsupportedError
from glidecape.interface.language_model import DECODING
from glidecape.interface.options import SamplingOptions
from glidecape.tables import millions

MODELS = Path(__file__).resolve().parents[1] / "models" / "pysource"

PROMPT = "def load_table("
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def lm(world) -> glidecape.LanguageModel:
    return glidecape.load(world["target"], draft=world["glide"], dtype="float32", compile="off")


@pytest.fixture(scope="module")
def target(world) -> Target:
    return Target.from_pretrained(world["target"], dtype=torch.float32)


def test_a_call_a_stream_and_a_batch_are_plain_decoding(lm, target) -> None:
    for options in ({}, {"temperature": 1.0, "seed": 7}):
        (plain,) = generate(target, PROMPT, params=SamplingParams(max_new_tokens=24, **options))
        assert lm(PROMPT, max_tokens=24, **options).tokens == plain.tokens
        assert "".join(lm.stream(PROMPT, max_tokens=24, **options)) == plain.text
        assert lm(target.encode(PROMPT), max_new_tokens=24, **options).tokens == plain.tokens
    assert lm.method == "glide"


def test_row_i_of_a_batch_has_the_seed_plus_i_and_one_prompt_needs_no_list(lm) -> None:
    sampled = {"temperature": 1.0, "max_tokens": 10, "ignore_eos": True}
    prompts = [PROMPT, "for item in", "    return"]
    found = lm.batch(prompts, n=2, rows=2, seed=3, **sampled)
    each = [lm(prompts[i // 2], seed=3 + i, **sampled) for i in range(6)]
    assert [one.tokens for one in found] == [one.tokens for one in each]
    assert len(lm.batch(PROMPT, n=2, **sampled)) == 2
    assert len(lm.batch(lm.ids(PROMPT), max_tokens=2)) == 1


def test_messages_go_through_the_chat_template(lm) -> None:
    talk = [{"role": "user", "content": "one"}]
    with pytest.raises(InputError, match="no chat template: give the prompt as text"):
        lm(talk)
    lm.target.tokenizer.chat_template = TEMPLATE
    try:
        assert lm.target.tokenizer.decode(lm.ids(talk)) == "<user>one"
        assert lm.batch(talk, max_tokens=4)[0].tokens == lm("<user>one", max_tokens=4).tokens
        with pytest.raises(InputError, match="end with the one to be answered"):
            lm([*talk, {"role": "assistant", "content": "two"}])
        with pytest.raises(InputError, match="needs a role and a content"):
            lm([{"role": "user", "content": None}])
    finally:
        lm.target.tokenizer.chat_template = None


def test_logits_processors_and_stopping_criteria_of_transformers_do_what_they_do_there(lm, world) -> None:
    model = AutoModelForCausalLM.from_pretrained(world["target"], dtype=torch.float32)
    ids = torch.tensor([lm.ids(PROMPT)])
    theirs = model.generate(ids, no_repeat_ngram_size=2, max_new_tokens=30, do_sample=False, pad_token_id=0)
    processor = NoRepeatNGramLogitsProcessor(2)
    ours = lm(PROMPT, logits_processor=[processor], max_tokens=30)
    assert ours.tokens == theirs[0, ids.shape[1] :].tolist()
    assert ours.tokens != lm(PROMPT, max_tokens=30).tokens
    stops = lm(PROMPT, stopping_criteria=MaxLengthCriteria(ids.shape[1] + 5), max_tokens=30, ignore_eos=True)
    assert (len(stops.tokens), stops.finish) == (5, "stop")
    with pytest.raises(UnsupportedError, match="give max_new_tokens"):
        lm(PROMPT, stopping_criteria=[MaxTimeCriteria(1.0)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1}, "did you mean temperature?"),
        ({"do_sample": True}, "temperature=0 decodes greedily"),
        ({"num_beams": 4}, "beam search"),
        ({"num_return_sequences": 2}, "lm.batch"),
        ({"max_length": 20}, "max_new_tokens counts the output"),
        ({"max_tokens": 2, "max_new_tokens": 3}, "are one option"),
        ({"temperature": "hot"}, "wrong type"),
        ({"logits_processor": ["x"]}, "transformers' objects"),
    ],
)
def test_what_is_no_option_is_refused_with_what_to_use(lm, options, message) -> None:
    with pytest.raises(InputError, match=message):
        lm(PROMPT, **options)


@pytest.mark.parametrize(
    ("prompt", "message"), [("", "empty"), ([], "empty"), (5, "a prompt is text"), ({"role": 1}, "text")]
)
def test_what_is_no_prompt_is_refused(lm, prompt, message) -> None:
    with pytest.raises(InputError, match=message):
        lm(prompt)


def test_the_options_of_a_call_are_those_of_sampling_params() -> None:
    extra = {"max_tokens", "logits_processor", "stopping_criteria"}
    # Log-probabilities are for the server, which has a place to tell them.
    assert set(SamplingOptions.__annotations__) - extra == set(SamplingParams.__dataclass_fields__) - {"logprobs"}


def test_streams_and_threads_take_turns_and_change_nothing(lm) -> None:
    alone = {seed: lm(PROMPT, temperature=1.0, seed=seed, max_tokens=24).text for seed in range(4)}
    streams = {seed: lm.stream(PROMPT, temperature=1.0, seed=seed, max_tokens=24) for seed in (0, 1)}
    found = {2: "", 3: ""}

    def call(seed: int) -> None:
        found[seed] = lm(PROMPT, temperature=1.0, seed=seed, max_tokens=24).text

    threads = [threading.Thread(target=call, args=(seed,)) for seed in (2, 3)]
    for one in threads:
        one.start()
    texts = dict.fromkeys(streams, "")
    while streams:
        for seed, stream in list(streams.items()):
            piece = next(stream, None)
            if piece is None:
                del streams[seed]
            else:
                texts[seed] += piece
    for one in threads:
        one.join()
    assert texts | found == alone


def test_coroutines_get_the_same_text_and_a_cancelled_one_frees_its_row(lm) -> None:
    def caches() -> int:
        DECODING.submit(int).result()  # its only thread lets go of a round's engine after the round's result is known
        gc.collect()
        return sum(type(one) is KVCache for one in gc.get_objects())

    async def both() -> tuple[str, str]:
        pieces = [piece async for piece in lm.astream(PROMPT, max_tokens=16)]
        return "".join(pieces), (await lm.agenerate(PROMPT, max_tokens=16)).text

    async def cancelled() -> None:
        task = asyncio.ensure_future(lm.agenerate(PROMPT, max_tokens=150, ignore_eos=True))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async for _ in lm.astream(PROMPT, max_tokens=150, ignore_eos=True):
            break

    before, text = caches(), lm(PROMPT, max_tokens=16).text
    assert asyncio.run(both()) == (text, text)
    asyncio.run(cancelled())
    assert caches() == before


def test_a_draft_is_saved_and_loaded_with_or_without_its_model(lm, world, tmp_path: Path) -> None:
    lm.draft.save_pretrained(tmp_path / "out")
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert (tmp_path / "out" / card["target"]).resolve() == world["target"].resolve()
    alone = glidecape.load(tmp_path / "out", dtype="float32", compile="off")
    assert alone(PROMPT, max_tokens=12).tokens == lm(PROMPT, max_tokens=12).tokens
    assert repr(alone).startswith("LanguageModel(")
    counted = millions(card["figures"]["parameters"])  # though the weights that decode are packed, and no parameters
    assert f"GlideDraft({counted} parameters" in repr(alone.draft)
    lm.draft.save_pretrained(tmp_path / "other", target="./nowhere")
    with pytest.raises(CheckpointError, match="which is not there: name the model"):
        glidecape.load(tmp_path / "other")
    with pytest.raises(InputError, match="name another folder"):
        lm.draft.save_pretrained(world["glide"])
    vanilla = glidecape.load(world["lm"], dtype="float32", compile="off")  # an LM that was trained as a draft
    assert vanilla.target.name == str(world["target"].resolve())
    vanilla.draft.save_pretrained(tmp_path / "lm")
    again = glidecape.load(tmp_path / "lm", dtype="float32", compile="off")
    assert (again.method, again.target.name) == ("vanilla", vanilla.target.name)


@pytest.mark.parametrize("name", ["glide", "glide-last", "glide-no-cross", "eagle", "medusa", "lm"])
def test_a_shipped_draft_alone_brings_its_target(name: str) -> None:
    lm = glidecape.load(MODELS / name, compile="off")
    assert lm.target.name == str(MODELS / "target")
    assert lm.draft.kind == name.split("-")[0]
    assert len(lm("def load(", max_tokens=4, ignore_eos=True).tokens) == 4


def test_a_draft_without_its_models_name_and_a_hub_out_of_reach_are_one_sentence(lm, world, tmp_path) -> None:
    shutil.copytree(world["glide"], tmp_path / "old")
    draft = glidecape.load_draft(tmp_path / "old", lm.target)
    draft.target_name = None
    draft.save_pretrained(tmp_path / "nameless")
    with pytest.raises(CheckpointError, match="does not name its target: name the model, too"):
        glidecape.load(tmp_path / "nameless")
    script = (
        "import sys, glidecape\n"
        f"draft = glidecape.load({str(world['target'])!r}, {str(world['glide'])!r}).draft\n"
        "try:\n    draft.push_to_hub('me/model-glide', 'me/model')\n"
        "except glidecape.GlideCapeError as error:\n    print(error)\n"
    )
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=nowhere, timeout=100)
    assert found.stdout.startswith("cannot upload the draft to me/model-glide: "), found.stderr


def test_methods_are_chosen_by_the_draft_or_given(world) -> None:
    assert glidecape.load(world["target"], compile="off").method == "lookup"
    assert glidecape.load(world["target"], draft=world["eagle"], compile="off").method == "eagle"
    given = glidecape.load(world["target"], world["glide"], "glide+svip", MethodOptions(cap=3), compile="off")
    assert given.drafter.cap == 3
    with pytest.raises(InputError, match="and this is a GliDe draft"):
        glidecape.load(world["target"], world["glide"], "eagle", compile="off")
    wrongs = [
        ({"dtype": "float12"}, "unknown dtype"),
        ({"compile": "yes"}, "compile takes"),
        ({"method": "x"}, "unknown"),
    ]
    for wrong, message in wrongs:
        with pytest.raises(InputError, match=message):
            glidecape.load(world["target"], **wrong)


USER = """
import asyncio
from collections.abc import Iterator

import glidecape

lm = glidecape.load("model", draft="draft", options=glidecape.MethodOptions(length=4))
text: str = lm("Once upon a time", temperature=0.8, seed=7, max_tokens=20).text
pieces: Iterator[str] = lm.stream([{"role": "user", "content": "hello"}], stop="END")
texts: list[str] = [answer.text for answer in lm.batch(["one", "two"], n=2)]
version: str = glidecape.__version__
if lm.draft is not None:
    lm.draft.save_pretrained("out")


async def answer() -> str:
    async for piece in lm.astream("Once"):
        print(piece)
    return (await lm.agenerate("Once")).text


asyncio.run(answer())
"""


def test_a_strict_type_checker_accepts_a_users_program_and_finds_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "wrong.py").write_text('import glidecape\n\nglidecape.load("model")("Once", temprature=1.0)\n')
    # Libraries are left out, as reading torch takes half a minute.
    libraries = "\n".join(f"[mypy-{name}.*]\nfollow_imports = skip" for name in ("torch", "transformers", "numpy"))
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = True\nfollow_imports = silent\n{libraries}\n")
    words = [sys.executable, "-m", "mypy", "user.py", "wrong.py"]
    found = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=280)
    errors = [line for line in found.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, found.stdout
    assert errors[0].startswith("wrong.py:3")
    assert "temprature" in errors[0]
