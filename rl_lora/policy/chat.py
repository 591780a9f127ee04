"""Text to token ids and back: the chat template where the tokenizer has one, plain text where it has none.

A conversation is only ever extended: the prompt of turn 2 is the prompt of turn 1, the tokens that the model wrote, and
the new message. Nothing that was sampled is tokenized again, so keys, values and log-probabilities stay valid.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from rl_lora.policy.template import REPLY, ChatTemplate
from rl_lora.system.messages import Messages


class Chat:
    """The conversation format of one model.

    A reply ends at the tokens that tokenizer and model name, and at the text that the chat template writes behind a
    reply; a demonstration ends with that text. A warning says where that text is no token, and where the template has
    no generation prompt.

    Args:
        stop_tokens: further tokens that end a reply, each a single token of the vocabulary, e.g. a newline for a base
            model that never learned to end its turn. Unless it is a special token, every token that contains its text
            ends a reply too, "}\\n" as well as "\\n"; the text before it in the token belongs to the reply.
        template_kwargs: further arguments of the chat template, e.g. enable_thinking of Qwen3.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        generation_config: GenerationConfig | None = None,
        stop_tokens: Sequence[str] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ):
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self.has_template = tokenizer.chat_template is not None
        self._template = ChatTemplate(tokenizer, self.template_kwargs)
        stop_ids = {tokenizer.eos_token_id}
        ends = getattr(generation_config, "eos_token_id", None)
        stop_ids |= set(ends) if isinstance(ends, list) else {ends}
        self._exact_ids: set[int] = stop_ids - {None}
        self._before: dict[int, str] = {}
        self._units = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        """Special and added tokens: only their own text is tokenized into them."""
        for text in stop_tokens:
            ids = self._encode(text)
            if len(ids) != 1:
                raise ValueError(f"stop token {text!r} is {len(ids)} tokens of this model ({ids}); it must be one")
            self._stop_at(ids[0], text)
        self._end: list[int] = []
        """The tokens that a demonstration ends with; the last one ends a reply."""
        self._shows_replies = False
        if self.has_template:
            self._read_template(warn=not stop_tokens)
        self.stop_ids = frozenset(self._exact_ids | self._before.keys())

    def _stop_at(self, token: int, text: str) -> None:
        """End replies at a token; unless it is a special token, also at all tokens that contain its text."""
        self._exact_ids.add(token)
        if token not in self._units:
            pieces = [str(self.tokenizer.decode([i])) for i in range(len(self.tokenizer))]
            self._before |= {i: piece.partition(text)[0] for i, piece in enumerate(pieces) if text in piece}

    def _read_template(self, *, warn: bool) -> None:
        """Find the end and the beginning of a reply in conversations that the chat template renders."""
        try:
            end, beginning = self._template.end, self._template.without_prompt
        except ValueError:
            return  # it renders no replies; what it refuses of what is asked of it is said then
        self._shows_replies = True
        if beginning:
            warnings.warn(
                "the model's chat template has no generation prompt: rendered with and without one, a conversation is "
                f"the same text, and the model has to write {beginning!r} itself before it replies; give the tokenizer "
                "a template that ends with it where add_generation_prompt is set",
                stacklevel=1,  # here, so that the second `Chat` of a run does not warn again
            )
        ids, text = self._encode(end), end.strip()
        token = next((i for i in ids if i in self._units or i in self._exact_ids), None)
        if token is not None:
            self._end = ids[: ids.index(token) + 1]
            self._exact_ids.add(token)
        elif len(alone := self._encode(text)) == 1:
            self._end = alone
            self._stop_at(alone[0], text)
        elif text and warn:
            warnings.warn(
                f"the model's chat template ends a reply with {text!r}, which is {len(alone)} tokens of this model: "
                "replies do not stop there, and demonstrations do not end with it; name a single token that ends a "
                "reply in --model.stop_tokens",
                stacklevel=1,  # here, so that the second `Chat` of a run does not warn again
            )

    def start(self, observation: str, system_prompt: str | None = None, messages: Messages | None = None) -> list[int]:
        """The prompt of the first turn: the observation, or `messages` in its place, where a problem is a conversation.

        Raises:
            ValueError: the chat template refuses it, or leaves something out; there are two system prompts.
        """
        asked: Messages = messages if messages is not None else [{"role": "user", "content": observation}]
        if system_prompt and any(message["role"] == "system" for message in asked):
            raise ValueError(
                "the problem has a system message of its own, and rollout.system_prompt would be a second one: leave "
                f"the setting out, or the message, {next(m['content'] for m in asked if m['role'] == 'system')[:60]!r}"
            )
        messages = [*([{"role": "system", "content": system_prompt}] if system_prompt else []), *asked]
        if not self.has_template:
            return self.tokenizer.encode("\n\n".join(message["content"] for message in messages))
        return self._encode(self._template.render(messages))

    def extend(
        self, prompt_ids: Sequence[int], completion_ids: Sequence[int], observation: str | Messages
    ) -> list[int]:
        """The prompt of the next turn: everything so far, to the token, and the environment's next observation, a
        user's message or messages with roles.

        Raises:
            ValueError: the chat template refuses it, or leaves something out.
        """
        new = [{"role": "user", "content": observation}] if isinstance(observation, str) else observation
        if self.has_template:
            before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": REPLY}]
            behind = self._encode(self._template.render([*before, *new]).partition(REPLY)[2])
        else:
            text = "\n\n".join(message["content"] for message in new)
            behind = self._encode(f"\n{text}\n")
        if completion_ids and completion_ids[-1] in behind[: len(self._end) or 1]:
            behind = behind[behind.index(completion_ids[-1]) + 1 :]  # the model wrote the end of its turn itself
        return [*prompt_ids, *completion_ids, *behind]

    def reply(self, text: str) -> list[int]:
        """A reply that was written elsewhere, as the model would have written it: with the token that ends a turn.

        Where the prompt opens a thought, it is closed first; where a reply has a channel, it is named.

        Raises:
            ValueError: no token ends a reply, or the prompt opens what cannot be told how to end.
        """
        end = self._end or self._written_end()
        return [*self._encode(self._template.opening.before(text) if self._shows_replies else text), *end]

    def _written_end(self) -> list[int]:
        """The end of a demonstration where the chat template writes none: the beginning of the next turn, if the model
        names that as its end, else the tokenizer's end token."""
        if self._shows_replies:
            with suppress(ValueError):
                ends = [i for i in self._encode(self._template.next_turn) if i in self._units]
                if ends and ends[0] in self._exact_ids:
                    return ends[:1]
        end = self.tokenizer.eos_token_id
        if end is None and (end := min(self._exact_ids, default=None)) is None:
            raise ValueError("this tokenizer has no token that ends a reply; name one in model.stop_tokens")
        return [end]

    def decode(self, completion_ids: Sequence[int]) -> str:
        """The text of a reply, without its stop token."""
        ids = list(completion_ids)
        kept = self._before.get(ids.pop(), "") if ids and ids[-1] in self.stop_ids else ""
        return str(self.tokenizer.decode(ids)) + kept

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)
