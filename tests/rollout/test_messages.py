"""Observations are texts, or messages with roles, at the beginning of an episode and in every turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from rl_lora.config import RolloutConfig
from rl_lora.envs import TextEnv
from rl_lora.policy.chat import Chat
from rl_lora.policy.policy import Policy
from rl_lora.rollout.contract import TaskError, reset_env, step_env
from rl_lora.rollout.problems import check_problems
from rl_lora.rollout.worker import RolloutWorker
from rl_lora.sampler.native import NativeSampler
from tests.policy.test_chat import CHATML, HARMONY, HARMONY_MARKS, MARKS, PARTS, START, tokenizer_with
from tests.tiny import tiny_model, tiny_tokenizer

ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[model]{% endif %}"
)
TOOLS = (
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>{{ m.name }}: {{ m.content }}"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
TOOL = {"role": "tool", "content": "4", "name": "sum"}
GO_ON = {"role": "user", "content": "Go on."}


class Calculator(TextEnv):
    """Answers with the result of a tool, three times."""

    opening: Any = ({"role": "system", "content": "Use the tool."}, {"role": "user", "content": "2 + 2?"})
    answer: Any = (TOOL, GO_ON)
    n = 0

    def start(self, seed: int) -> tuple[Any, dict[str, Any]]:
        self.n = 0
        return self.opening, {}

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n += 1
        return self.answer, 1.0, self.n == 3, False, {}


def env_of(opening: Any = Calculator.opening, answer: Any = Calculator.answer) -> Calculator:
    env = Calculator()
    env.opening, env.answer = opening, answer
    return env


@pytest.mark.parametrize(
    ("template", "marks", "written"),
    [
        (CHATML + START, MARKS, "<|im_start|>tool\n4<|im_end|>\n<|im_start|>user\nGo on.<|im_end|>\n"),
        (TOOLS + START, MARKS, "<|im_start|>user\n<tool_response>sum: 4</tool_response><|im_end|>\n"),
        (HARMONY, HARMONY_MARKS, "<|start|>tool<|message|>4<|end|><|start|>user<|message|>Go on.<|end|>"),
        (PARTS, (), "<|tool|>4<eos><|user|>Go on.<eos><|assistant|>"),
    ],
    ids=["chatml", "tools", "harmony", "parts"],
)
@pytest.mark.parametrize("ended", [True, False])
def test_a_turns_tokens_extend_the_earlier_ones_by_what_the_template_makes_of_messages(
    template: str, marks: tuple[str, ...], written: str, ended: bool
) -> None:
    chat = Chat(tokenizer_with(template, marks))
    prompt = chat.start("", None, [{"role": "system", "content": "Use the tool."}, {"role": "user", "content": "2+2?"}])
    for turn in range(3):
        reply = chat.tokenizer.encode(f" sum({turn}) \n", add_special_tokens=False)
        reply += chat.reply("")[-1:] if ended else []
        longer = chat.extend(prompt, reply, [TOOL, GO_ON])
        assert longer[: len(prompt) + len(reply)] == prompt + reply
        assert written in chat.tokenizer.decode(longer[len(prompt) + len(reply) :])
        prompt = longer


def test_a_text_is_a_users_message() -> None:
    for template in (CHATML + START, TOOLS + START):
        chat = Chat(tokenizer_with(template, MARKS))
        assert chat.extend([1], [2], "Go on.") == chat.extend([1], [2], [GO_ON])


def test_a_model_without_a_template_reads_the_contents() -> None:
    chat = Chat(tiny_tokenizer(False))
    assert chat.tokenizer.decode(chat.extend(chat.tokenizer.encode("a"), [], [TOOL, GO_ON])) == "a\n4\n\nGo on.\n"
    assert chat.extend([1], [2], "Go on.") == chat.extend([1], [2], [GO_ON])


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(tiny_model("llama"), tiny_tokenizer(True))


def worker(policy: Policy, env: Calculator, **options: Any) -> RolloutWorker:
    config = RolloutConfig(max_tokens=3, max_turns=5, **options)
    return RolloutWorker(lambda: env, NativeSampler(policy), policy.chat, config)


def text(policy: Policy, ids: Sequence[int]) -> str:
    return str(policy.chat.tokenizer.decode(list(ids)))


def test_an_environment_of_messages_is_played(policy: Policy) -> None:
    (group,) = worker(policy, env_of()).collect([0], adapters=[None], n=1)
    (episode,) = group.episodes
    first = "<|system|>\nUse the tool.<eos>\n<|user|>\n2 + 2?<eos>\n<|assistant|>\n"
    assert text(policy, episode.turns[0].prompt_ids) == first
    assert len(episode.turns) == 3
    for turn, after in zip(episode.turns, episode.turns[1:], strict=False):
        so_far = turn.prompt_ids + turn.completion_ids
        assert after.prompt_ids[: len(so_far)] == so_far
        new = text(policy, after.prompt_ids[len(so_far) :])
        assert new.endswith("<|tool|>\n4<eos>\n<|user|>\nGo on.<eos>\n<|assistant|>\n")
    assert episode.observations == (
        "[system]\nUse the tool.\n\n[user]\n2 + 2?",
        *["[tool]\n4\n\n[user]\nGo on."] * 2,
    )


WRONG = [
    ([], "must be a list of {'role': text, 'content': text}, got []"),
    (["4"], "message 1 of 1: it must be {'role': text, 'content': text}, got '4'"),
    (
        [GO_ON, {"role": "function", "content": "4"}],
        "message 2 of 2: its role must be one of system, developer, user, assistant, tool, got 'function'",
    ),
    ([{"role": "tool"}], "message 1 of 1: its content must be a text, got None"),
    ([{"role": "tool", "content": 4}], "message 1 of 1: its content must be a text, got 4"),
    ([GO_ON, {"role": "assistant", "content": "4"}], "must not end with a message of the assistant, whose turn it is"),
    ([{"role": "tool", "content": "\ud800"}], "a text that is no Unicode"),
]


@pytest.mark.parametrize(("messages", "said"), WRONG)
def test_what_is_wrong_with_a_message_is_said_with_the_name_of_the_environment(messages: Any, said: str) -> None:
    for play in (lambda: reset_env(env_of(messages), 3), lambda: step_env(env_of(answer=messages), 3, "sum(2)")):
        with pytest.raises(TaskError) as caught:
            play()
        assert "Calculator" in str(caught.value)
        assert said in str(caught.value)
        assert "seed 3" in str(caught.value) or "Unicode" in str(caught.value)


def test_messages_are_checked_before_a_model_is_loaded() -> None:
    chat, config = Chat(tokenizer_with(ALTERNATING)), RolloutConfig()
    with pytest.raises(ValueError, match=r"Calculator, seed 0: .*its role must be one of"):
        check_problems(lambda: env_of([{"role": "robot", "content": "2?"}]), [0], chat, config, 512)
    with pytest.raises(ValueError, match=r"Calculator, seed 0: .*refuses a conversation of user, user"):
        check_problems(lambda: env_of([GO_ON, GO_ON]), [0], chat, config, 512)


def test_messages_that_the_template_refuses_in_a_later_turn_cost_the_episode() -> None:
    policy = Policy(tiny_model("llama"), tokenizer_with(ALTERNATING))
    env = env_of("2 + 2?", [TOOL])
    played = worker(policy, env, max_failed=0.5)
    with pytest.raises(TaskError, match=r"Calculator, seed 0: .*refuses a conversation of user, assistant, tool"):
        played.collect([0], adapters=[None], n=1)
