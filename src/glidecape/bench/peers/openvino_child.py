"""OpenVINO GenAI in a process of its own, in its own environment: it imports nothing of this package.

It is started with one JSON argument (see `main`) and speaks JSON lines. The first line that it writes is {"version": …}; each
line that it reads is a prompt (see `decode`) and is answered by one line. What goes wrong is a line {"error": …}. It ends when
its input ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

MODEL = "openvino_model.xml"


def export(folder: str, exports: str) -> str:
    """The model in `folder` as OpenVINO's, in float32, by optimum-intel, and its tokenizer; made once, below `exports`."""
    goal = Path(exports) / hashlib.sha256(folder.encode()).hexdigest()[:16]
    if not (goal / MODEL).is_file():
        import openvino
        from openvino_tokenizers import convert_tokenizer
        from optimum.intel import OVModelForCausalLM
        from transformers import AutoTokenizer

        # Without load_in_8bit=False large models would be quantized.
        model = OVModelForCausalLM.from_pretrained(
            folder, export=True, compile=False, load_in_8bit=False, dtype="float32"
        )
        goal.mkdir(parents=True)
        # Prompts are token ids; but a pipeline with a draft compares the two tokenizers.
        both = convert_tokenizer(AutoTokenizer.from_pretrained(folder), with_detokenizer=True)
        for name, made in zip(("openvino_tokenizer", "openvino_detokenizer"), both, strict=True):
            openvino.save_model(made, goal / f"{name}.xml")
        model.save_pretrained(goal)
    return str(goal)


def pipeline(started: dict[str, Any]) -> Any:
    """The pipeline that is asked for; products, keys and values have the precision that is asked for."""
    import openvino
    import openvino_genai

    kind = {"float32": openvino.Type.f32, "bfloat16": openvino.Type.bf16}[started["dtype"]]
    options = {
        "INFERENCE_PRECISION_HINT": kind,
        "KV_CACHE_PRECISION": kind,  # 8 bits by default
        "INFERENCE_NUM_THREADS": started["threads"],
    }
    more: dict[str, Any] = {}
    if started["draft"] is not None:
        draft = export(started["draft"], started["exports"])
        more["draft_model"] = openvino_genai.draft_model(draft, "CPU", **options)
    if started["lookup"]:
        more["prompt_lookup"] = True
    target = export(started["target"], started["exports"])
    return openvino_genai.LLMPipeline(target, "CPU", **options, **more)


def decode(pipe: Any, started: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """The new tokens of `prompt`, and the seconds from the first to the last.

    A first round may emit several tokens, so the rounds after it are scaled to all tokens but the first.
    """
    import numpy
    import openvino
    import openvino_genai

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos = asked["max_new_tokens"], asked["ignore_eos"]
    config.apply_chat_template = False
    if asked["eos"]:
        config.stop_token_ids = set(asked["eos"])
    if asked["temperature"] > 0:
        config.do_sample, config.temperature, config.rng_seed = True, asked["temperature"], asked["seed"]
        config.top_k, config.top_p = 2**31, 1.0
    if started["lookup"]:
        config.num_assistant_tokens, config.max_ngram_size = started["lookup"]
    elif started["draft"] is not None:
        config.num_assistant_tokens = started["draft_length"]
    out = pipe.generate(openvino.Tensor(numpy.array([asked["prompt"]], dtype=numpy.int64)), config)
    tokens = [int(token) for token in out.tokens[0]]
    raw = out.perf_metrics.raw_metrics
    times, sizes = list(raw.m_new_token_times), list(raw.m_batch_sizes)
    later = sum(sizes[1:])
    seconds = (times[-1] - times[0]) / 1000 * (len(tokens) - 1) / later if later else 0.0
    return {"tokens": tokens, "seconds": seconds}


def main() -> None:
    """The argument: target and draft (folders or null), exports (a folder for what is exported), dtype, threads, lookup (null,
    or the tokens proposed and the longest n-gram), draft_length."""
    # Libraries print; the lines go to a descriptor of their own.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=lines, flush=True)

    started = json.loads(sys.argv[1])
    try:
        pipe = pipeline(started)
        import openvino_genai

        say({"version": openvino_genai.get_version()})
        for line in sys.stdin:
            say(decode(pipe, started, json.loads(line)))
    except Exception as error:
        say({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
