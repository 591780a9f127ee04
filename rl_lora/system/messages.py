"""Messages with roles: what environments, reward functions and chat templates mean by a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, Any]]
"""A conversation, or a part of one: mappings with a `role`, one of `ROLES`, and a text as `content`."""
ROLES = ("system", "developer", "user", "assistant", "tool")


def shown_as_text(messages: Messages) -> str:
    """A conversation as one text, to be read by people: of a single user message its content, else each message under
    its role."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return str(messages[0]["content"])
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)
