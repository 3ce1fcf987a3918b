"""Score passages on a server with an OpenAI-compatible /v1/completions, by its prompt's losses.

The prompt is echoed with its log-probabilities, and one token is generated, which is dropped: that
works with vLLM, SGLang and llama-cpp-python's server.  Token ids are sent where the server takes
them (vLLM, SGLang), so that it scores exactly the tokens asked about; otherwise text, which it must
tokenize as --model-tokenizer does.  Before the first document, the server has to give a token that
it generates the same log-probability when that token comes back in a prompt.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException, IncompleteRead, InvalidURL
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from megatron_slm.corpus.tokenizers.alignment import Floats
from megatron_slm.errors import UserError
from megatron_slm.files import decode_json
from megatron_slm.jobs.outside.passages import ModelTokenizer, Passage

ATTEMPTS, FIRST_PAUSE, LONGEST_PAUSE = 8, 1.0, 60.0  # pauses in seconds
BUSY = (408, 409, 425, 429, 502, 503, 504)  # HTTP codes after which to try again
FAILED = 500  # llama-cpp-python says so of a request that it cannot read, too
LARGEST_ANSWER = 1 << 28  # bytes
AGREE = 0.05  # nats between a token generated and the same token in a prompt
TRIALS = (
    "The quick brown fox jumps over the",
    "One, two, three, four,",
    "import numpy as",
    "a b c",
)
KEEPS = "what was scored before is kept, and the same command goes on"


class LogProbabilities(msgspec.Struct):
    """Those of a prompt's tokens, and of what was generated after it."""

    tokens: list[str]
    token_logprobs: list[float | None]


class Answer(msgspec.Struct):
    """An answer."""

    text: str = ""
    logprobs: LogProbabilities | None = None


class Usage(msgspec.Struct):
    """Numbers of tokens."""

    completion_tokens: Annotated[int, Meta(ge=0)] = 0


class Completion(msgspec.Struct):
    """The part of a server's answer that is read."""

    choices: Annotated[list[Answer], Meta(min_length=1)]
    usage: Usage


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Rejected(Exception):
    """The server does not take such a request; the message says why."""


class CompletionsServer:
    """A server that scores prompts.

    Args:
        url: where its /completions is, ending in /v1.
        model: the model's name; None for the first that the server lists.
        tokenizer: the model's tokenizer.
        concurrency: requests at a time.
        timeout: seconds to wait for an answer.

    Raises:
        UserError: it does not answer, or gives no log-probabilities of prompts.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        tokenizer: ModelTokenizer,
        concurrency: int,
        timeout: float,
    ) -> None:
        self.url, self.tokenizer, self.timeout = url.rstrip("/"), tokenizer, timeout
        self.passing: tuple[int, ...] = BUSY
        self.pool = ThreadPoolExecutor(concurrency)
        self.model = self._first_model() if model is None else model
        self.takes_text = False
        try:
            self._log_probabilities(self._passage(TRIALS[0]))
        except _Rejected:
            self.takes_text = True
        try:
            self._check()
        except _Rejected as error:
            raise UserError(f"{self.url} takes neither token ids nor text: {error}") from error
        self.passing = (*BUSY, FAILED)

    def losses(self, passages: Sequence[Passage]) -> list[Floats]:
        """Return the losses of each passage's tokens [n] in nats; NaN where there is none."""
        waiting = [self.pool.submit(self._losses, passage) for passage in passages]
        try:
            return [each.result() for each in waiting]
        except BaseException:
            for each in waiting:
                each.cancel()
            raise

    def _losses(self, passage: Passage) -> Floats:
        try:
            losses = -self._log_probabilities(passage)
        except _Rejected as error:
            raise UserError(f"{self.url}: {error}; {KEEPS}") from error
        passage.check(losses, self.url)
        return losses

    def _log_probabilities(self, passage: Passage) -> Floats:
        count = len(passage.ids)
        if not count:
            return np.zeros(0)
        answer = self._complete(self._prompt(passage), echo=True)
        found = answer.choices[0].logprobs
        if found is None:
            raise UserError(
                f"{self.url} gives no log-probabilities: the server must be one that echoes "
                "prompts with them (llama.cpp: --logits_all true)"
            )
        if len(found.tokens) != len(found.token_logprobs):
            raise UserError(
                f"{self.url} lists {len(found.tokens)} tokens, but {len(found.token_logprobs)} "
                "log-probabilities"
            )
        own = len(found.token_logprobs) - answer.usage.completion_tokens
        # A server may put its token for the beginning of a text before a text, and list it.
        most = count + (1 if self.takes_text or passage.before is not None else 0)
        if not count <= own <= most:
            raise UserError(
                f"{self.url} has {own} tokens where --model-tokenizer has {count}, in "
                f"{(passage.text or '')[:40]!r}: is it the model's tokenizer?"
            )
        listed = found.token_logprobs[own - count : own]
        self._compare(found.tokens[own - count : own], passage)
        return np.array([np.nan if each is None else each for each in listed])

    def _compare(self, words: list[str], passage: Passage) -> None:
        """Check that the server's tokens are the passage's, where both say what they are."""
        for word, number in zip(words, passage.ids.tolist(), strict=True):
            own = self.tokenizer.fast.decode([number], skip_special_tokens=False).strip()
            theirs = word.strip()
            if own and theirs and own != theirs and "\ufffd" not in own + theirs:
                if theirs.startswith(("token_id:", "bytes:", "<")):
                    continue
                raise UserError(
                    f"{self.url} has a token {word!r} where --model-tokenizer has {own!r}: is it "
                    "the model's tokenizer?"
                )

    def _prompt(self, passage: Passage) -> str | list[int]:
        tokens: list[int] = passage.tokens.tolist()
        return (passage.text or "") if self.takes_text else tokens

    def _passage(self, text: str) -> Passage:
        ids, _ = self.tokenizer.encode(text)
        return Passage(ids, self.tokenizer.beginning, text)

    def _check(self) -> None:
        """Compare a generated token's log-probability with its own in a prompt.

        Raises:
            UserError: they differ, or no trial can be compared.
        """
        for text in TRIALS:
            passage = self._passage(text)
            answer = self._complete(self._prompt(passage), echo=False).choices[0]
            if answer.logprobs is None or not answer.logprobs.token_logprobs or not answer.text:
                continue
            longer = self._passage(text + answer.text)
            grown = np.array_equal(longer.ids[:-1], passage.ids)
            generated = answer.logprobs.token_logprobs[0]
            if not grown or generated is None:
                continue
            again = float(self._log_probabilities(longer)[-1])
            if not abs(again - generated) <= AGREE:
                raise UserError(
                    f"{self.url} gives {answer.text!r} after {text!r} a log-probability of "
                    f"{generated:.3f} when it generates it, and {again:.3f} in a prompt: its "
                    "losses of prompts cannot be used"
                )
            return
        raise UserError(f"{self.url} generates nothing that its losses of prompts can be tested by")

    def _complete(self, prompt: str | list[int], echo: bool) -> Completion:
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": 1,
            "echo": echo,
        }
        return decode_json(self._ask("/completions", body), Completion, self.url)

    def _first_model(self) -> str:
        try:
            models = decode_json(self._ask("/models", None), _Models, f"{self.url}/models").data
        except _Rejected as error:
            raise UserError(
                f"{self.url}/models: {error}; name the model: --server-model"
            ) from error
        if not models:
            raise UserError(f"{self.url} lists no model; name one: --server-model")
        return models[0].id

    def _ask(self, path: str, body: dict[str, Any] | None) -> bytes:
        """Send a request until it is answered or has failed too often.

        Raises:
            _Rejected: the server says that the request itself is wrong.
            UserError: the server cannot be reached, or fails again and again.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.getenv("OPENAI_API_KEY"):
            if not (key.isascii() and key.isprintable()):  # an error of urllib's would show it
                raise UserError("OPENAI_API_KEY in the environment has characters that no key has")
            headers["Authorization"] = f"Bearer {key}"
        content = None if body is None else json.dumps(body).encode()
        said = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1)))
            try:
                request = urllib.request.Request(self.url + path, content, headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    whole: bytes = answer.read(LARGEST_ANSWER)
                    if len(whole) == LARGEST_ANSWER:
                        raise UserError(f"{self.url} answers with {LARGEST_ANSWER} bytes or more")
                    if answer.length:  # read() of so many bytes takes fewer for all there are
                        raise IncompleteRead(whole, answer.length)
                    return whole
            except urllib.error.HTTPError as error:
                said = f"{error.code} {_begin(error)}"
                if error.code not in self.passing:
                    raise _Rejected(said) from error
            except (ValueError, InvalidURL) as error:
                raise UserError(f"--server {self.url}: {error}") from error
            except (OSError, HTTPException) as error:
                said = str(getattr(error, "reason", error)) or type(error).__name__
        raise UserError(f"{self.url} does not answer after {ATTEMPTS} attempts: {said}; {KEEPS}")


def _begin(error: urllib.error.HTTPError) -> str:
    """Return the beginning of what a server says of an error, in one line; "" if it breaks off."""
    with suppress(OSError, HTTPException):
        return " ".join(error.read(300).decode(errors="replace").split())
    return ""
