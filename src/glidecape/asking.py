"""Requests to a server that speaks OpenAI's interface, such as `glidecape serve` or vLLM."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from .errors import InputError

TIMEOUT = 600  # seconds without a word from the server


class _Stay(HTTPRedirectHandler):
    """Follows no redirect: the key is for this server alone."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Server:
    """A server at `url`, such as http://127.0.0.1:8000/v1.

    Args:
        key: sent as bearer token; None: none.
        option: that named it.

    Raises:
        InputError: it is no such address.
    """

    def __init__(self, url: str, key: str | None, option: str) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise InputError(f"{option} is an address such as http://127.0.0.1:8000/v1, not '{url}'")
        self.url, self.key = url.rstrip("/"), key
        self._opener = build_opener(_Stay)

    def open(self, path: str, body: Any = None) -> http.client.HTTPResponse:
        """The answer to a request: `body` as JSON to post; None: get.

        Raises:
            urllib.error.HTTPError: a status that is no success.
            OSError, http.client.HTTPException, ValueError: no answer.
        """
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        return self._opener.open(Request(self.url + path, data, headers), timeout=TIMEOUT)

    @property
    def advice(self) -> str:
        """What to try where nothing is found; "" where the address looks right."""
        return "" if self.url.endswith("/v1") else f": is it {self.url}/v1?"


def model_in(listing: Any, url: str) -> str:
    """The first model's name in what `/models` answers.

    Raises:
        InputError: there is none.
    """
    try:
        return str(listing["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise InputError(f"{url}/models names no model: check the address, or name the model") from None


def told(body: bytes, otherwise: str) -> str:
    """What an error's body says."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return otherwise
