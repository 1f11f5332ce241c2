"""A dozen model families beyond those of test_against_transformers.py; runs/models.py tries every one there is."""

import pytest

import zoo

PASSING = (
    "biogpt",
    "cohere",
    "gemma4_text",  # its last layers read the keys of earlier ones
    "gpt2",
    "gpt_neox",
    "granite",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "smollm3",
    "stablelm",
    "whisper",  # its configuration counts the heads of its encoder
)


@pytest.mark.parametrize("kind", PASSING)
def test_tokens_equal_transformers(kind):
    # Past a window twice, after prompts of 5 and 17 tokens.
    assert zoo.check(kind, new=32) == zoo.Verdict(kind, "passes")


@pytest.mark.parametrize(("kind", "reason"), [("bloom", "ALiBi"), ("bert", "tree"), ("mamba", "recurrent")])
def test_what_cannot_hold_a_tree_is_refused_with_the_reason(kind, reason):
    verdict = zoo.check(kind)
    assert verdict.verdict == "refused"
    assert reason in verdict.reason


def test_a_draft_of_a_composite_model_rotates_as_its_text_part_does():
    """Its pictures rotate, too, and come first among its modules."""
    from glidecape.drafts.network import TargetRotary
    from glidecape.target.target import Target

    target = Target(zoo.build("gemma4"), probe=False)
    rotary = TargetRotary(target, len(target.shapes) - 1).rotary
    assert rotary is target.model.get_decoder().rotary_emb
