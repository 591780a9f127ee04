"""Observations of an environment, checked: a text, or messages with roles, which the chat template renders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rl_lora.system.messages import ROLES, Messages, shown_as_text

MAX_SHOWN = 200
"""Characters of a value that a message shows."""


def read_observation(value: Any) -> tuple[str, Messages | None]:
    """An observation as a text; and as messages, where it is given so.

    Raises:
        ValueError: it is neither a text nor messages.
    """
    if isinstance(value, str):
        check_unicode(value)
        return value, None
    if isinstance(value, list | tuple):
        check_messages(value, "the observation")
        return shown_as_text(value), value
    raise ValueError(
        f"gives {type(value).__name__} observations; a text environment gives str, or messages with roles, "
        f"got {shown(value)}"
    )


def check_messages(messages: Any, what: str) -> None:
    """Raises ValueError unless these are messages that a model can reply to: at least one, each with a known role and a
    text, the last one not the assistant's."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"{what} must be a list of {{'role': text, 'content': text}}, got {shown(messages)}")
    for i, message in enumerate(messages):
        where = f"{what}, message {i + 1} of {len(messages)}"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where}: it must be {{'role': text, 'content': text}}, got {shown(message)}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"{where}: its role must be one of {', '.join(ROLES)}, got {shown(role)}")
        if not isinstance(content, str):
            raise ValueError(f"{where}: its content must be a text, got {shown(content)}")
        check_unicode(content)
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{what} must not end with a message of the assistant, whose turn it is")


def check_unicode(text: str) -> None:
    """Raises ValueError for a text that cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        part = text[max(0, error.start - 20) : error.end + 20]
        raise ValueError(f"gives a text that is no Unicode: half of a character in {part!r}") from None


def shown(value: Any) -> str:
    """A value as a message shows it, shortened."""
    try:
        text = repr(value)
    except Exception as error:
        text = f"<{type(value).__name__}, whose repr() raises {type(error).__name__}>"
    return shortened(text, MAX_SHOWN)


def shortened(text: str, most: int) -> str:
    """A text of that many characters at most, and how many it has."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
