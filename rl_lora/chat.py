"""Text to token ids and back: the chat template where the tokenizer has one, plain text where it has none.

A conversation is only ever extended: the prompt of turn 2 is the prompt of turn 1, the tokens that the model wrote, and
the new message. Nothing that was sampled is tokenized again, so keys, values and log-probabilities stay valid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

REPLY = "\x02reply\x03"
"""Stands for the model's reply while the template around it is rendered."""


class Chat:
    """How one model's conversations are written.

    Args:
        stop_tokens: further tokens that end a reply, each a single token of the vocabulary, e.g. a newline for a base
            model that never learned to end its turn. Unless it is a special token, every token that contains its text
            ends a reply too, "}\\n" as well as "\\n"; what stands before it in the token belongs to the reply.
        template_kwargs: what the chat template is called with besides, e.g. enable_thinking of Qwen3.
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
        stop_ids = {tokenizer.eos_token_id}
        ends = getattr(generation_config, "eos_token_id", None)
        stop_ids |= set(ends) if isinstance(ends, list) else {ends}
        before: dict[int, str] = {}
        pieces: list[str] = []
        for text in stop_tokens:
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) != 1:
                raise ValueError(f"stop token {text!r} is {len(ids)} tokens of this model ({ids}); it must be one")
            stop_ids.add(ids[0])
            if ids[0] not in tokenizer.all_special_ids:
                pieces = pieces or [str(tokenizer.decode([i])) for i in range(len(tokenizer))]
                before |= {i: piece.partition(text)[0] for i, piece in enumerate(pieces) if text in piece}
        self._exact_ids = stop_ids - {None}
        self._before = before
        self.stop_ids = frozenset(self._exact_ids | before.keys())

    def start(self, observation: str, system_prompt: str | None = None) -> list[int]:
        """The prompt of the first turn."""
        messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
        messages.append({"role": "user", "content": observation})
        if not self.has_template:
            return self.tokenizer.encode("\n\n".join(message["content"] for message in messages))
        return self._encode(self._render(messages))

    def extend(self, prompt_ids: Sequence[int], completion_ids: Sequence[int], observation: str) -> list[int]:
        """The prompt of the next turn: everything so far, to the token, and the environment's next observation."""
        if self.has_template:
            messages = [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": REPLY},
                {"role": "user", "content": observation},
            ]
            _, found, end = self._render(messages).partition(REPLY)
            if not found:
                raise ValueError("the model's chat template leaves replies out: it cannot hold a conversation of turns")
            behind = self._encode(end)
        else:
            behind = self._encode(f"\n{observation}\n")
        if completion_ids and behind and completion_ids[-1] == behind[0]:
            behind = behind[1:]  # the model wrote the end of its turn itself
        return [*prompt_ids, *completion_ids, *behind]

    def reply(self, text: str) -> list[int]:
        """A reply that was written elsewhere, as the model would have written it: with the token that ends a turn."""
        end = self.tokenizer.eos_token_id
        if self.has_template:
            messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": REPLY}]
            behind = self._encode(self._render(messages, prompt=False).partition(REPLY)[2])
            end = behind[0] if behind else end
        if end not in self._exact_ids:
            end = min(self._exact_ids, default=None)
        if end is None:
            raise ValueError("this tokenizer has no token that ends a reply; name one in model.stop_tokens")
        return [*self._encode(text), end]

    def decode(self, completion_ids: Sequence[int]) -> str:
        """The text of a reply, its stop token apart."""
        ids = list(completion_ids)
        kept = self._before.get(ids.pop(), "") if ids and ids[-1] in self.stop_ids else ""
        return str(self.tokenizer.decode(ids)) + kept

    def _render(self, messages: list[dict[str, str]], *, prompt: bool = True) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt, **self.template_kwargs
                )
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"the model's chat template refuses a conversation of {roles}: {error}") from error

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)
