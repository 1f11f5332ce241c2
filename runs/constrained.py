"""Acceptance under constraints, with the draft masked and with the target alone masked.

    .venv/bin/python runs/constrained.py [--new 64] [--prompts 12]

Acceptance lengths on the shipped pair; no times. Prints the rows of the table in docs/structured-output.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from glidecape import Constraint, SamplingParams, Stats, Target, generate, load_draft, make_drafter
from glidecape.batch.laws import Laws

PAIR = Path("models/pysource")
DRAFTS = {"glide": "glide", "eagle": "eagle", "medusa": "medusa", "vanilla": "lm"}
METHODS = ("lookup", "vanilla", "glide", "glide+cape", "glide+svip", "glide+beam", "eagle", "medusa")
CONSTRAINTS = {
    "a call, by a regular expression": Constraint.regex(r"[a-z_]{3,12}\([a-z_]{1,8}(, [a-z_]{1,8}){3,6}\)"),
    "a JSON schema": Constraint.json_schema(
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 20},
                "size": {"type": "integer", "minimum": 0, "maximum": 9999},
                "tags": {"type": "array", "items": {"type": "string", "maxLength": 10}, "maxItems": 3},
            },
            "required": ["name", "size", "tags"],
            "additionalProperties": False,
        }
    ),
    "any JSON object": Constraint.json_object(),
}


def of_the_target(self: Laws, tree: Any, logits: Any, nodes: Any = None) -> Any:
    return MASKED(self, tree, logits) if nodes is None else logits


MASKED = Laws.masked


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=12)
    given = parser.parse_args()
    target = Target.from_pretrained(PAIR / "target", dtype=torch.float32)
    drafts = {base: load_draft(PAIR / folder, target) for base, folder in DRAFTS.items()}
    lines = Path("evaluation/prompts/python.jsonl").read_text().splitlines()[: given.prompts]
    prompts = [target.encode(json.loads(line)["prompt"])[:96] for line in lines]
    for name, constraint in CONSTRAINTS.items():
        for method in METHODS:
            drafter = make_drafter(method, drafts.get(method.split("+")[0]))
            cells = []
            for temperature in (0.0, 1.0):
                params = [
                    SamplingParams(temperature, seed=i, max_new_tokens=given.new, constraint=constraint)
                    for i in range(len(prompts))
                ]
                outputs = []
                for masked in (of_the_target, MASKED):
                    Laws.masked, stats = masked, Stats()
                    outputs.append([one.tokens for one in generate(target, prompts, drafter, params, stats)])
                    cells.append(f"{stats.acceptance_length:.2f}")
                assert outputs[0] == outputs[1]
            print(f"| {name} | {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
