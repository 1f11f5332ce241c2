"""Which requests belong together: those whose prompts begin alike are sent to one replica, whose cache has the beginning."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Of a completion's prompt. A shorter beginning is not reused anyway (`batch.prefixes`); a longer one would change from one
# request of a text that grows to the next.
CHARACTERS, IDS = 64, 16


def routing_key(headers: Mapping[str, str], body: bytes) -> str:
    """Equal for requests that can share a prefix; "" where the body does not say, such as one that is not JSON.

    A chat is told by its turns up to the first one of the user, and a text by its first characters. The API key and the salt
    count, too, because prefixes are not shared across them. `prompt_cache_key`, OpenAI's field for this, replaces the prompt.

    Args:
        headers: by their names in lower case.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(fields, dict):
        return ""
    begins = fields.get("prompt_cache_key") or _opening(fields.get("messages")) or _beginning(fields.get("prompt"))
    if not begins:
        return ""
    known = [headers.get("authorization", ""), fields.get("cache_salt"), begins]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _opening(turns: Any) -> Any:
    """A conversation up to the user's first turn."""
    if not isinstance(turns, list):
        return None
    first = (number for number, turn in enumerate(turns) if isinstance(turn, dict) and turn.get("role") == "user")
    return turns[: next(first, 0) + 1]


def _beginning(prompt: Any) -> Any:
    """The beginning of a prompt, or of the first one of several."""
    if isinstance(prompt, str):
        return prompt[:CHARACTERS]
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return _beginning(prompt[0])
    return prompt[:IDS] if isinstance(prompt, list) else None
