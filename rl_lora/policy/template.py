"""A model's chat template: conversations rendered and checked, and the text that it writes around a reply.

Templates are programs of other people: they may leave a message out, read it in another form, or open a thought. Left
out: tokens (see `chat.py`).
"""

from __future__ import annotations

import functools
import html
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rl_lora.system.messages import Messages

QUESTION, REPLY, THOUGHT = "zqquestionzq", "zqreplyzq", "zqthoughtzq"
"""Placeholders for messages, while the text around them is rendered."""
TAG = re.compile(
    r"<(?!/)(?P<angle>[\w:.-]+)>|\[(?!/)(?P<square>[A-Z_]+)\]|◁(?!/)(?P<kimi>\w+)▷|<\|(?P<bar>[\w-]+)\|>|<\|(?P<half>[\w-]+)>"
)
"""Tags that may open a thought, as models write them: <think>, [THINK], ◁think▷, <|channel>. <|...|> has no closing
form."""
HEADER = re.compile("assistant|model|bot|answer|response|output|start|turn|eos|bos|sep")
"""Words in the names of tags that open a reply, and no thought."""
CLOSING = {"angle": "</{}>", "square": "[/{}]", "kimi": "◁/{}▷", "half": "<{}|>"}
ALTERNATIVES = "choose another model, or pass what its template takes for that with --model.template_kwargs"


@dataclass(frozen=True)
class Opening:
    """The text between the prompt that a template renders and a reply that was written elsewhere."""

    text: str = ""
    """Text that goes before the reply: the end of a thought that the prompt has opened, or a channel."""
    opened: str = ""
    """The tag of a thought that the prompt has opened, e.g. <think>."""
    close: str = ""
    """The tag that ends it. A reply that holds it brings a thought of its own."""

    def before(self, reply: str) -> str:
        """The reply, behind the text that has to stand before it."""
        if self.close and self.close in reply:
            return reply.lstrip().removeprefix(self.opened).lstrip("\n")
        first = TAG.match(self.text)
        if first is not None and reply.lstrip().startswith(first.group()):
            return reply
        return self.text + reply


class ChatTemplate:
    """The chat template of a tokenizer, called with `kwargs` besides the messages.

    A template that reads a message as a list of parts gets one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]):
        self.tokenizer, self.kwargs = tokenizer, dict(kwargs)
        self._forms: dict[tuple[str, ...], tuple[bool, ...]] = {}

    def render(self, messages: Messages, *, prompt: bool = True) -> str:
        """The text of a conversation, with the beginning of the next reply where `prompt` is set.

        Raises:
            ValueError: the template fails, or leaves a message out.
        """
        text = self._apply(messages, self._form(tuple(message["role"] for message in messages)), prompt)
        for message in messages:
            if not _holds(text, message["content"]):
                raise ValueError(
                    f"the model's chat template changes or cuts the {message['role']} message "
                    f"{message['content'][:60]!r}; {ALTERNATIVES}"
                )
        return text

    @functools.cached_property
    def end(self) -> str:
        """The text that the template writes behind the last reply of a conversation."""
        return self.render(_TURN, prompt=False).partition(REPLY)[2]

    @functools.cached_property
    def next_turn(self) -> str:
        """The text that the template writes between a reply and the message that answers it."""
        answered = self.render([*_TURN, {"role": "user", "content": THOUGHT}])
        return answered.partition(REPLY)[2].partition(THOUGHT)[0]

    @functools.cached_property
    def without_prompt(self) -> str:
        """The text that the model has to write before its reply, where the template renders the same with and without
        the beginning of a reply. Empty where it renders one, or where a reply stands right behind the question."""
        asked = self.render(_TURN[:1])
        if asked != self.render(_TURN[:1], prompt=False):
            return ""
        prompt, turn = asked.rpartition(QUESTION)[2], self._until_reply
        return turn[_common(prompt, turn) :].strip()

    @functools.cached_property
    def opening(self) -> Opening:
        """The text that a reply from elsewhere needs before it, found by comparing a prompt with a whole turn.

        Raises:
            ValueError: the prompt opens something that cannot be told how to end.
        """
        prompt, turn = self.render(_TURN[:1]).rpartition(QUESTION)[2], self._until_reply
        common = _common(prompt, turn)
        ours, theirs = prompt[common:], turn[common:]
        tag = _open_tag(ours or prompt)
        close = _closing(tag)
        opened = tag.group() if tag else ""
        if not ours:  # the whole turn goes on where the prompt ends
            return Opening(theirs, opened, close) if close and close in theirs else Opening(theirs)
        if between := self._end_of_thought(prompt):
            return Opening(between, opened, close)
        if close and not theirs.strip():
            return Opening(f"\n{close}\n\n", opened, close)
        if tag is None and not (ours.strip() and theirs.strip()):
            return Opening("" if ours.strip() else theirs)
        raise ValueError(
            f"the model's chat template begins a reply with {ours!r}, where a whole reply begins with {theirs!r}: a "
            "demonstration cannot be put behind it; set --model.template_kwargs so that the template opens no thought, "
            "e.g. --model.template_kwargs.enable_thinking false"
        )

    @property
    def _until_reply(self) -> str:
        """The text that the template writes between a question and its reply."""
        return self.render(_TURN, prompt=False).partition(REPLY)[0].rpartition(QUESTION)[2]

    def _end_of_thought(self, prompt: str) -> str:
        """The text that the template writes between a thought and the reply, where it opens one as `prompt` does."""
        for name in ("reasoning_content", "reasoning", "thinking"):
            thought = {**_TURN[1], name: THOUGHT}
            try:
                turn = self._apply([_TURN[0], thought], self._form(("user", "assistant")), False)
            except ValueError:
                continue
            before, _, behind = turn.rpartition(QUESTION)[2].partition(THOUGHT)
            if behind and before.rstrip() == prompt.rstrip():
                return behind.partition(REPLY)[0]
        return ""

    def _form(self, roles: tuple[str, ...]) -> tuple[bool, ...]:
        """Which of the messages the template takes as lists of parts, found out with placeholders."""
        if roles not in self._forms:
            probes = [{"role": role, "content": f"zq{role}{i}zq"} for i, role in enumerate(roles)]
            error, lost = None, list(roles)
            for form in _forms(roles):
                try:
                    text = self._apply(probes, form, True)
                except ValueError as failed:
                    error = error or failed
                    continue
                missing = [probe["role"] for probe in probes if not _shows(text, probe["content"])]
                if not missing:
                    self._forms[roles] = form
                    break
                lost = min(lost, missing, key=len)
            else:
                raise error if error and len(lost) == len(roles) else ValueError(_leaves_out(lost[0]))
        return self._forms[roles]

    def _apply(self, messages: Messages, form: Sequence[bool], prompt: bool) -> str:
        given: list[Any] = [
            {**message, "content": [{"type": "text", "text": message["content"]}] if parts else message["content"]}
            for message, parts in zip(messages, form, strict=True)
        ]
        try:
            rendered = self.tokenizer.apply_chat_template(
                given, tokenize=False, add_generation_prompt=prompt, **self.kwargs
            )
        except Exception as error:  # a template raises whatever its author thought of, or forgot
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"the model's chat template refuses a conversation of {roles}: {error}") from error
        return str(rendered)


_TURN = ({"role": "user", "content": QUESTION}, {"role": "assistant", "content": REPLY})


def _forms(roles: tuple[str, ...]) -> Iterator[tuple[bool, ...]]:
    """Texts first; then roles by roles as parts."""
    kinds = list(dict.fromkeys(roles))
    for chosen in sorted(itertools.product((False, True), repeat=len(kinds)), key=sum):
        parts = dict(zip(kinds, chosen, strict=True))
        yield tuple(parts[role] for role in roles)


def _shows(text: str, probe: str) -> bool:
    """Whether the text holds the probe as a message, and not a list of parts written out."""
    return probe in text and not re.search(rf"""['"]text['"]:\\?\s*['"]{probe}""", text)


def _holds(text: str, content: str) -> bool:
    """Whether a message is in a rendering, but for white space; a template may escape it."""
    squeezed = ["".join(form.split()) for form in (text, html.unescape(text))]
    forms = (content, json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1])
    return any("".join(form.split()) in rendered for form in forms for rendered in squeezed)


def _leaves_out(role: str) -> str:
    if role == "system":
        return (
            "the model's chat template leaves the system prompt out: put it into the questions instead, without "
            "rollout.system_prompt (system_prompt of an evaluation), or " + ALTERNATIVES
        )
    if role == "assistant":
        return "the model's chat template leaves replies out: it cannot hold a conversation of turns"
    if role not in ("user", "system"):
        return f"the model's chat template leaves {role} messages out: give their text as a user's, or {ALTERNATIVES}"
    return (
        "the model's chat template leaves the question out: it reads the user's message neither as a text nor as "
        f"a list of parts; {ALTERNATIVES}"
    )


def _open_tag(text: str) -> re.Match[str] | None:
    """The tag that opens a thought: the last one of a text, unless it is closed behind or begins a reply."""
    last = next(reversed(list(TAG.finditer(text))), None)
    if last is None or HEADER.search(last.group()):
        return None
    close = _closing(last)
    return None if close and close in text[last.end() :] else last


def _closing(tag: re.Match[str] | None) -> str:
    kind = (tag and tag.lastgroup) or ""
    return CLOSING[kind].format(tag[kind]) if tag and kind in CLOSING else ""


def _common(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginnings."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
