"""Conversations to text, by a template in the language of Hugging Face's chat templates (Jinja).

bos_token and eos_token are empty in it: text is tokenized as text, and the ids that begin and end
a document are put there afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_slm.data.documents import BadRecord, Render
from megatron_slm.errors import UserError

# ShareGPT's names (OpenHermes) to those of templates.
ROLES = {"human": "user", "gpt": "assistant"}


def chat_renderer(template: str) -> Render:
    """A function that renders a list of messages, each with role and content, or from and value.

    Args:
        template: a file.

    Raises:
        UserError: no such file, or not a template.
    """

    def refuse(message: str) -> None:
        raise BadRecord(f"the chat template refuses it: {message}")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.globals["raise_exception"] = refuse
    try:
        compiled = environment.from_string(Path(template).read_text(encoding="utf-8"))
    except (OSError, TemplateError) as error:
        raise UserError(f"--chat-template {template}: {error}") from error

    def render(conversation: Any) -> str:
        messages = [_message(part) for part in _list(conversation)]
        try:
            return compiled.render(
                messages=messages, bos_token="", eos_token="", add_generation_prompt=False
            )
        except BadRecord:
            raise
        except Exception as error:  # a template can raise what Python's operators do
            what = f"{type(error).__name__}: {error}"
            raise BadRecord(f"the chat template cannot render it: {what}") from error

    return render


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
    return {"role": ROLES.get(role, role), "content": content}
