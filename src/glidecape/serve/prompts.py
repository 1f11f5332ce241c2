"""From a request's messages or prompt to token ids. Templates come from the model alone, and run in transformers' sandbox."""

from __future__ import annotations

from collections.abc import Sequence

from ..batch.text import Prompt
from ..target.target import Target

ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}


def plain_chat(turns: Sequence[dict[str, str]]) -> str:
    """A conversation as text, for models whose tokenizer has no chat template.

    >>> plain_chat([{"role": "user", "content": "Hello"}])
    'User: Hello\\n\\nAssistant:'
    """
    return "".join(f"{ROLES[turn['role']]}: {turn['content']}\n\n" for turn in turns) + "Assistant:"


def chat_ids(target: Target, turns: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a conversation, up to where the assistant's answer begins.

    Raises:
        InputError: the template refuses the conversation, or there is no text.
    """
    if not getattr(target.tokenizer, "chat_template", None):
        return target.encode(plain_chat(turns))
    return Prompt("", tuple(turns)).ids(target, chat=True)


def completion_ids(target: Target, prompt: str | list[int]) -> list[int]:
    """Token ids of a prompt, given as text or as ids.

    Raises:
        InputError: the prompt is empty.
    """
    return target.encode(prompt) if isinstance(prompt, str) else prompt
