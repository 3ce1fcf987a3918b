"""Turn conversations into text with a template like Hugging Face's chat templates (Jinja).

bos_token and eos_token are empty in the template: its text is tokenized as text, and the ids that
begin and end a document are added afterwards.  A template is a program that a stranger may have
written.  Jinja's sandbox restricts everything except time and memory, which are limited here for
each conversation.
"""

from __future__ import annotations

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_slm.corpus.reading.documents import BadRecord, Render
from megatron_slm.corpus.reading.lines import LONGEST_LINE
from megatron_slm.errors import UserError
from megatron_slm.files import read_bounded

# ShareGPT's names of roles (as in OpenHermes), and those that templates use.
CHAT_ROLES = {"human": "user", "gpt": "assistant"}
LONGEST_TEMPLATE = 1 << 20  # bytes
SECONDS = 5.0  # of CPU time per conversation, where microseconds are usual
MEMORY = 1 << 30  # bytes, in addition to what the process uses
ENDLESS = 3  # conversations beyond these limits until the template is blamed


class _TooMuch(BaseException):
    """A template has used up its time.  Nothing in a template can catch this."""


def chat_renderer(template: str) -> Render:
    """Return a function that renders a list of messages, each with role and content, or from and
    value.

    Args:
        template: path of the template.

    Raises:
        UserError: there is no such file, or it is not a template.
    """
    compiled = _compile(template)
    beyond = 0

    def render(conversation: Any) -> str:
        nonlocal beyond
        messages = [_message(part) for part in _list(conversation)]
        try:
            with bounded():
                text = compiled.render(
                    messages=messages, bos_token="", eos_token="", add_generation_prompt=False
                )
        except BadRecord:
            raise
        except (_TooMuch, MemoryError) as error:
            beyond += 1
            bounds = f"{SECONDS:g} seconds or {MEMORY >> 20} MiB"
            if beyond == ENDLESS:
                raise UserError(
                    f"--chat-template {template} takes more than {bounds} for each of {beyond} "
                    "conversations: has it a loop without an end?"
                ) from error
            raise BadRecord(f"the chat template takes more than {bounds} for it") from error
        except Exception as error:  # a template can raise what Python's operators do
            what = f"{type(error).__name__}: {error}"
            raise BadRecord(f"the chat template cannot render it: {what}") from error
        if len(text) > LONGEST_LINE:
            raise BadRecord(f"the chat template makes more than {LONGEST_LINE} characters of it")
        return text

    return render


def _compile(template: str) -> Template:
    def refuse(message: str) -> NoReturn:
        raise BadRecord(f"the chat template refuses it: {message}")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.globals["raise_exception"] = refuse
    content = read_bounded(Path(template), LONGEST_TEMPLATE)
    try:
        with bounded():  # Jinja computes constants here
            return environment.from_string(content.decode())
    except (_TooMuch, MemoryError, RecursionError) as error:
        what = "it is nested too deeply, or its constants take too much time or memory"
        raise UserError(f"--chat-template {template} cannot be read: {what}") from error
    except Exception as error:  # Jinja's, Python's compiler's, or that of a constant
        what = " ".join(str(error).split())
        raise UserError(f"--chat-template {template} cannot be read: {what}") from error


@contextmanager
def bounded() -> Iterator[None]:
    """Raise _TooMuch or MemoryError if the block exceeds SECONDS or MEMORY."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise _TooMuch

    if (
        threading.current_thread() is not threading.main_thread()
    ):  # only the main thread gets signals
        with _limited_memory():
            yield
        return
    before = signal.signal(signal.SIGPROF, stop)
    hook, sys.unraisablehook = (
        sys.unraisablehook,
        lambda _: None,
    )  # silences generators that are cut off
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        with _limited_memory():
            yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        sys.unraisablehook = hook


@contextmanager
def _limited_memory() -> Iterator[None]:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + MEMORY
    limits = [most, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _list(conversation: Any) -> list[Any]:
    if not isinstance(conversation, list):
        raise BadRecord(f"not a conversation but a {type(conversation).__name__}")
    if not conversation:
        raise BadRecord("a conversation without messages")
    return conversation


def _message(part: Any) -> dict[str, str]:
    if not isinstance(part, dict):
        raise BadRecord(f"a message that is not an object but a {type(part).__name__}")
    role, content = part.get("role", part.get("from")), part.get("content", part.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadRecord("a message without role and content, or from and value")
    return {"role": CHAT_ROLES.get(role, role), "content": content}
