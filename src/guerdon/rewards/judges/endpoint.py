"""One request to an OpenAI-compatible endpoint, and what can go wrong with it. Standard library only.

The key is read from an environment variable for each request: it is not stored, and errors never show it.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from guerdon.errors import RecipeError, ScoreError

_LARGEST = 2**22  # bytes of a reply
_PASSING = {408, 409, 425, 429}  # beside 5xx: worth another try
_OF_THIS_REQUEST = {400, 413, 422}  # such as a prompt that is too long: no other try, but no reason to stop
_LONGEST_WAIT = 60.0  # seconds that a server can ask for


class PassingError(Exception):
    """The request failed in a way that may pass; `wait` is what the server asked for, in seconds."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


class RefusedError(Exception):
    """The server does not take this request, and would not take it a second time."""


class UnreadableError(Exception):
    """The server answered with something that is no chat completion."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: following one would send the samples, and perhaps the key, somewhere else."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Endpoint:
    """Where a model is reached.

    Args:
        base_url: such as http://127.0.0.1:8000/v1; `path` is added.
        api_key_env: name of the environment variable that holds the key; None = no key is sent.
        timeout: seconds for one request, from connecting to its last byte.
        where: opens the errors.
        path: what is asked for.

    Raises:
        RecipeError: the address is no http or https address or holds a password, or the variable is not set.
    """

    def __init__(
        self, base_url: str, api_key_env: str | None, timeout: float, where: str, path: str = "/chat/completions"
    ) -> None:
        parts = urlsplit(base_url)
        if "@" in parts.netloc:
            raise RecipeError(f"{where}.base_url: it holds a user name or password. Give a key by api_key_env.")
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise RecipeError(f"{where}.base_url: must be an address like http://127.0.0.1:8000/v1; got {base_url!r}.")
        if not timeout > 0:
            raise RecipeError(f"{where}.timeout: must be above 0 seconds; got {timeout}.")
        # what is no name may be the key itself, so it is not shown
        if api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", api_key_env):
            raise RecipeError(
                f"{where}.api_key_env: must be the name of an environment variable, never the key itself."
            )
        self.address = base_url.rstrip("/") + path
        self.api_key_env, self.timeout, self.where = api_key_env, timeout, where
        self._key()
        self._opener = urllib.request.build_opener(_NoRedirects)

    def _key(self) -> str:
        if self.api_key_env is None:
            return ""
        key = os.environ.get(self.api_key_env, "").strip()
        if not key or not (key.isascii() and key.isprintable()):
            state = "is not set" if not key else "holds something that is no key"
            raise RecipeError(f"{self.where}: the environment variable {self.api_key_env} {state}.")
        return key

    def ask(self, body: Mapping[str, Any]) -> str:
        """Send a request; the text of the first choice.

        Raises:
            UnreadableError: the reply is no chat completion.
            And whatever `post` raises.
        """
        return _text(self.post(body))

    def post(self, body: Mapping[str, Any]) -> bytes:
        """Send a request; the reply as it came.

        Raises:
            PassingError: try again later.
            RefusedError: this request is not taken.
            UnreadableError: the reply is too long to be one.
            ScoreError: no request of this form can succeed: the key, the address or the model is wrong.
        """
        key = self._key()
        request = urllib.request.Request(self.address, json.dumps(body).encode(), method="POST")
        request.add_header("Content-Type", "application/json")
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return self._read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._complaint(error, key) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise ScoreError(f"{self.where}: {self.address} has no valid certificate: {reason}.") from None
            raise PassingError(f"{type(reason).__name__}: {reason}") from None

    def patiently(self, ask: Callable[[], Any], tries: int) -> Any:
        """Call until a reply can be read, with a pause that doubles after a fault that may pass.

        Args:
            ask: sends one request and reads its reply.
            tries: how often.

        Raises:
            ScoreError: there is none after so many tries, or the request is refused.
        """
        why = ""
        for attempt in range(tries):
            try:
                return ask()
            except PassingError as error:
                why = str(error)
                if attempt + 1 < tries:
                    time.sleep(max(error.wait, min(0.5 * 2.0**attempt, 30.0)))
            except UnreadableError as error:
                why = str(error)
            except RefusedError as error:
                why = str(error)
                break
        raise ScoreError(f"{self.where}: {self.address} gave no reply that can be used: {why}.")

    def _read(self, response: http.client.HTTPResponse, deadline: float) -> bytes:
        """All of a reply: a server that trickles is not waited for longer than one that is silent."""
        parts: list[bytes] = []
        size = 0
        while part := response.read1(65536):
            parts.append(part)
            size += len(part)
            if size > _LARGEST:
                raise UnreadableError(f"a reply of more than {_LARGEST} bytes")
            if time.monotonic() > deadline:
                raise PassingError(f"TimeoutError: the reply took longer than {self.timeout:g} s")
        return b"".join(parts)

    def _complaint(self, error: urllib.error.HTTPError, key: str) -> Exception:
        try:
            said = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            said = ""
        if key:
            said = said.replace(key, "***")
        said = f"HTTP {error.code}: {' '.join(said.split())[:300] or error.reason}"
        if error.code >= 500 or error.code in _PASSING:
            return PassingError(said, _seconds(error.headers.get("Retry-After")))
        if error.code in _OF_THIS_REQUEST:
            return RefusedError(said)
        hint = {
            401: f" Look at the key in {self.api_key_env}." if self.api_key_env else " Give a key by api_key_env.",
            404: " Look at base_url and model.",
        }.get(error.code, "")
        if 300 <= error.code < 400:
            hint = " It redirects, which is not followed: give the final address as base_url."
        return ScoreError(f"{self.where}: {self.address} answered {said}.{hint}")


def _seconds(header: str | None) -> float:
    """What a Retry-After header in seconds asks for; the form with a date is let be."""
    try:
        wait = float(header or 0.0)
    except ValueError:
        return 0.0
    return min(max(wait, 0.0), _LONGEST_WAIT) if math.isfinite(wait) else 0.0


def _text(content: bytes) -> str:
    try:
        text = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise UnreadableError(f"no chat completion: {content[:120]!r}") from None
    if not isinstance(text, str):
        raise UnreadableError(f"no text in the chat completion: {text!r:.120}")
    return text
