"""The promises of `chat.py`: conversations are extended to the token, and replies end where the model ended them."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rl_lora.policy import loading
from rl_lora.policy.chat import Chat
from rl_lora.policy.default_model import default_model_folder, is_complete
from rl_lora.system.model_names import EMBEDDED_MODEL
from tests.tiny import EOS, EOS_ID, PAD_ID, tiny_tokenizer


def reply_ids(chat: Chat, text: str, *, ended: bool) -> list[int]:
    end = [chat.tokenizer.eos_token_id] if ended else []
    return [*chat.tokenizer.encode(text, add_special_tokens=False), *end]


def test_the_first_prompt_is_the_template_rendered_with_the_system_message_first() -> None:
    chat = Chat(tiny_tokenizer(True))
    text = chat.tokenizer.decode(chat.start("2 + 2?", "Be brief."))
    assert text == "<|system|>\nBe brief.<eos>\n<|user|>\n2 + 2?<eos>\n<|assistant|>\n"
    assert chat.tokenizer.decode(chat.start("2 + 2?")) == "<|user|>\n2 + 2?<eos>\n<|assistant|>\n"


def test_without_a_template_the_prompt_is_the_plain_text() -> None:
    chat = Chat(tiny_tokenizer(False))
    assert not chat.has_template
    assert chat.tokenizer.decode(chat.start("2 + 2 =")) == "2 + 2 ="
    assert chat.tokenizer.decode(chat.start("2 + 2 =", "Sums.")) == "Sums.\n\n2 + 2 ="


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("ended", [True, False])
def test_a_conversation_is_only_ever_extended(template: bool, ended: bool) -> None:
    chat = Chat(tiny_tokenizer(template))
    prompt = chat.start("guess")
    for turn in range(3):
        completion = reply_ids(chat, f" {turn}  x\n", ended=ended)
        longer = chat.extend(prompt, completion, f"higher {turn}")
        assert longer[: len(prompt) + len(completion)] == prompt + completion
        assert f"higher {turn}" in chat.tokenizer.decode(longer[len(prompt) + len(completion) :])
        prompt = longer


@pytest.mark.parametrize("ended", [True, False])
def test_the_end_of_a_turn_is_written_once_whether_or_not_the_model_wrote_it(ended: bool) -> None:
    chat = Chat(tiny_tokenizer(True))
    prompt = chat.start("guess")
    text = chat.tokenizer.decode(chat.extend(prompt, reply_ids(chat, "5", ended=ended), "higher"))
    assert text == "<|user|>\nguess<eos>\n<|assistant|>\n5<eos>\n<|user|>\nhigher<eos>\n<|assistant|>\n"


def test_a_stop_token_that_the_model_wrote_is_not_doubled_in_plain_text_either() -> None:
    chat = Chat(tiny_tokenizer(False), stop_tokens=["\n"])
    newline = chat.tokenizer.encode("\n")
    conversation = chat.extend(chat.start("a ="), [*chat.tokenizer.encode("1"), *newline], "b =")
    assert chat.tokenizer.decode(conversation) == "a =1\nb =\n"


def test_an_empty_reply_extends_too() -> None:
    chat = Chat(tiny_tokenizer(True))
    assert chat.extend([1, 2], [], "again")[:3] == [1, 2, EOS_ID]


def test_replies_stop_at_the_tokenizers_the_models_and_the_users_stop_tokens() -> None:
    assert Chat(tiny_tokenizer(True)).stop_ids == {EOS_ID}
    assert Chat(tiny_tokenizer(True), GenerationConfig(eos_token_id=7)).stop_ids == {EOS_ID, 7}
    assert Chat(tiny_tokenizer(True), GenerationConfig(eos_token_id=[7, 9])).stop_ids == {EOS_ID, 7, 9}
    newline = tiny_tokenizer(True).encode("\n")[0]
    assert Chat(tiny_tokenizer(True), None, ["\n", "<pad>"]).stop_ids == {EOS_ID, newline, PAD_ID}


def test_a_model_without_an_end_token_has_only_the_users() -> None:
    tokenizer = tiny_tokenizer(False)
    tokenizer.eos_token = None
    assert Chat(tokenizer).stop_ids == set()
    assert Chat(tokenizer, None, ["."]).stop_ids == set(tokenizer.encode("."))


@pytest.mark.parametrize(("text", "n"), [("##", 2), ("", 0)])
def test_a_stop_token_must_be_a_single_token(text: str, n: int) -> None:
    with pytest.raises(ValueError, match=rf"stop token '{text}' is {n} tokens of this model .*must be one"):
        Chat(tiny_tokenizer(True), None, [text])


def test_decode_drops_the_stop_token_and_nothing_else() -> None:
    chat = Chat(tiny_tokenizer(True))
    assert chat.decode(reply_ids(chat, " 47 \n", ended=True)) == " 47 \n"
    assert chat.decode(reply_ids(chat, "47", ended=False)) == "47"
    assert chat.decode([]) == ""
    assert chat.decode([EOS_ID, EOS_ID]) == EOS  # only the one that ended the reply
    four, two = chat.tokenizer.encode("42")
    assert chat.decode([four, PAD_ID, two]) == "4<pad>2"  # not 42: a reward must see what was written


def test_every_token_that_contains_a_stop_text_ends_a_reply_and_keeps_what_stands_before_it() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate([*alphabet, "}Ċ", "ĊĊ"])}
    core = Tokenizer(BPE(vocab=vocab, merges=[("}", "Ċ"), ("Ċ", "Ċ")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([EOS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS)
    end, bracket, empty_line = tokenizer.eos_token_id, vocab["}Ċ"], vocab["ĊĊ"]
    (newline,) = tokenizer.encode("\n")
    chat = Chat(tokenizer, None, ["\n"])
    assert chat.stop_ids == {end, newline, bracket, empty_line}
    assert tokenizer.encode("{5}\n")[-1] == bracket
    assert chat.decode(tokenizer.encode("{5}\n")) == "{5}"
    assert chat.decode(tokenizer.encode("5\n\n")) == "5"
    assert chat.decode(tokenizer.encode("{5}\n6")) == "{5}\n6"  # only what ended the reply
    assert Chat(tokenizer, None, ["\n\n"]).stop_ids == {end, empty_line}
    assert chat.reply("5")[-1] == end
    assert Chat(tiny_tokenizer(True), None, [EOS]).stop_ids == {EOS_ID}


def test_the_chat_template_gets_its_arguments() -> None:
    tokenizer = tiny_tokenizer(True)
    template = f"{tokenizer.chat_template}{{% if not enable_thinking %}}<think></think>{{% endif %}}"
    tokenizer.chat_template = template
    plain, quick = (Chat(tokenizer, template_kwargs={"enable_thinking": on}).start("2?") for on in (True, False))
    assert str(tokenizer.decode(quick)) == f"{tokenizer.decode(plain)}<think></think>"


def test_a_template_that_refuses_a_role_says_so() -> None:
    tokenizer = tiny_tokenizer(True)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + str(tokenizer.chat_template)
    )
    chat = Chat(tokenizer)
    assert chat.start("hello")
    with pytest.raises(ValueError, match=r"refuses a conversation of system, user: System role not supported"):
        chat.start("hello", "Be brief.")


# What a chat template writes, and what it leaves out

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
START = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
MARKS = ("<|im_start|>", "<|im_end|>")
HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
HARMONY_MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")
PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}{{ part.text }}{% endfor %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer_with(template: Any, marks: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Marks are special tokens, from id 258 on."""
    tokenizer = tiny_tokenizer(False)
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    tokenizer.chat_template = template
    return tokenizer


def taught(chat: Chat, solution: str) -> str:
    return str(chat.tokenizer.decode([*chat.start("2?"), *chat.reply(solution)]))


def test_what_the_template_writes_behind_a_reply_ends_it_and_is_what_a_demonstration_ends_with() -> None:
    """A base model's tokenizer names another end."""
    chat = Chat(tokenizer_with(CHATML + START, MARKS), GenerationConfig(eos_token_id=EOS_ID))
    assert chat.stop_ids == {EOS_ID, 259}
    assert chat.reply("4") == [*chat.tokenizer.encode("4"), 259]
    assert chat.decode([*chat.tokenizer.encode("4"), 259]) == "4"


@pytest.mark.parametrize(
    ("end", "token", "written"),
    [
        (" <eos>", EOS, "4 <eos>"),  # as Llama 2 writes it
        ("</answer><eos>\n", EOS, "4</answer><eos>"),
        ("<|a|><|b|>", "<|a|>", "4<|a|>"),
        ("\n\n<|b|>", "<|b|>", "4\n\n<|b|>"),
        ("~", "~", "4~"),  # a token of the vocabulary, and no special one
        ("", EOS, "4<eos>"),
        ("\n", EOS, "4<eos>"),
    ],
)
def test_the_end_of_a_reply_is_found_in_what_the_template_writes(
    end: str, token: str, written: str, recwarn: pytest.WarningsRecorder
) -> None:
    chat = Chat(tokenizer_with(f"{{% for m in messages %}}{{{{ m.content }}}}{end}{{% endfor %}}", ("<|a|>", "<|b|>")))
    assert chat.stop_ids == {EOS_ID, *chat.tokenizer.encode(token)}
    assert chat.tokenizer.decode(chat.reply("4")) == written
    assert not [w for w in recwarn if "--model.stop_tokens" in str(w.message)]


def test_a_template_end_that_is_no_token_is_named_in_a_warning() -> None:
    tokenizer = tokenizer_with(CHATML + START)
    with pytest.warns(UserWarning, match=r"'<\|im_end\|>', which is 10 tokens .* --model\.stop_tokens"):
        chat = Chat(tokenizer)
    assert chat.stop_ids == {EOS_ID}
    assert chat.tokenizer.decode(chat.reply("4")) == "4<eos>"


def test_an_ordinary_end_of_the_template_ends_replies_inside_other_tokens_too() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate([*alphabet, "4~"])}
    core = Tokenizer(BPE(vocab=vocab, merges=[("4", "~")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(False, use_regex=False), decoders.ByteLevel()
    template = "{% for m in messages %}{{ m.content }}~\n{% endfor %}"
    chat = Chat(PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template))
    assert chat.stop_ids == {vocab["~"], vocab["4~"]}
    assert chat.decode(chat.tokenizer.encode("34~")) == "34"


def test_where_the_template_writes_nothing_behind_a_reply_the_models_own_end_stays() -> None:
    """As GLM's does: there the model's end is what the next turn begins with."""
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    tokenizer = tokenizer_with(template + "{% if add_generation_prompt %}<|assistant|>{% endif %}", ("<|user|>",))
    assert Chat(tokenizer).stop_ids == {EOS_ID}
    assert Chat(tokenizer).reply("4")[-1] == EOS_ID
    chat = Chat(tokenizer, GenerationConfig(eos_token_id=[EOS_ID, 258]))
    assert chat.reply("4")[-1] == 258


def test_a_template_that_reads_parts_gets_parts() -> None:
    chat = Chat(tokenizer_with(PARTS))
    assert (
        chat.tokenizer.decode(chat.start("2?", "Be brief.")) == "<|system|>Be brief.<eos><|user|>2?<eos><|assistant|>"
    )
    assert taught(chat, "4") == "<|user|>2?<eos><|assistant|>4<eos>"
    behind = chat.extend([1], [2, EOS_ID], "more")[3:]
    assert chat.tokenizer.decode(behind) == "<|user|>more<eos><|assistant|>"
    only_users = CHATML.replace("{{ m.content }}", "{{ m.content[0].text if m.role == 'user' else m.content }}")
    mixed = Chat(tokenizer_with(only_users + START, MARKS))
    assert str(mixed.tokenizer.decode(mixed.start("2?", "Be brief."))).count("2?<|im_end|>") == 1
    assert taught(mixed, "4").endswith("assistant\n4<|im_end|>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves the question out"),
        ("{% for m in messages %}{{ m.content[:30] }}{% endfor %}", "changes or cuts the user message 'How many"),
        ("{% for m in messages %}{{ m.text }}{% endfor %}", "leaves the question out"),
    ],
)
def test_a_template_that_loses_the_question_is_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Chat(tokenizer_with(template)).start("How many are two and two, and how many three?")


def test_a_template_that_only_dresses_messages_is_fine() -> None:
    for dress in ("m.content | trim", "m.content | tojson", "m.content | e", "m.content | replace('\n', ' ')"):
        chat = Chat(tokenizer_with(f"{{% for m in messages %}}{{{{ {dress} }}}}<eos>{{% endfor %}}"))
        assert chat.start(' Is "2 < 3"\n true? ', "Yes & no, à propos.\n")


def test_a_system_prompt_that_the_template_ignores_is_refused() -> None:
    template = "{% for m in messages if m.role != 'system' %}{{ m.content }}<eos>{% endfor %}"
    for reads in (template, template.replace("m.content", "m.content[0].text")):
        chat = Chat(tokenizer_with(reads))
        assert chat.tokenizer.decode(chat.start("2?")) == "2?<eos>"
        with pytest.raises(ValueError, match=r"leaves the system prompt out: .*rollout\.system_prompt"):
            chat.start("2?", "Be brief.")


def test_a_thought_that_the_prompt_opens_is_closed_before_a_solution() -> None:
    opens = CHATML + START.replace("\n{% endif", "\n<think>\n{% endif")
    chat = Chat(tokenizer_with(opens, MARKS))
    turn = "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert chat.tokenizer.decode(chat.start("2?")) == turn  # what is sampled is not touched
    assert taught(chat, "4") == f"{turn}\n</think>\n\n4<|im_end|>"
    assert taught(chat, "<think>\nTwo.\n</think>\n\n4") == f"{turn}Two.\n</think>\n\n4<|im_end|>"
    square = Chat(tokenizer_with(opens.replace("<think>", "[THINK]"), MARKS))
    assert taught(square, "4").endswith("[THINK]\n\n[/THINK]\n\n4<|im_end|>")


def test_a_thought_is_closed_as_the_template_itself_closes_it() -> None:
    body = CHATML.replace(
        "{{ m.content }}", "{% if m.reasoning_content %}<t>{{ m.reasoning_content }}</t>!{% endif %}{{ m.content }}"
    )
    chat = Chat(tokenizer_with(body + START.replace("\n{% endif", "\n<t>{% endif"), MARKS))
    assert taught(chat, "4").endswith("assistant\n<t></t>!4<|im_end|>")


def test_a_thought_in_a_channel_of_half_open_tags_is_closed_and_a_closed_one_left_alone() -> None:
    body = "{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content }}<turn|>\n{% endfor %}"
    begins = "{% if add_generation_prompt %}<|turn>assistant\n<|channel>thought\n{% endif %}"
    marks = ("<|turn>", "<turn|>", "<|channel>", "<channel|>")
    opened = Chat(tokenizer_with(body + begins, marks))
    assert taught(opened, "4").endswith("<|channel>thought\n\n<channel|>\n\n4<turn|>")
    closed = Chat(tokenizer_with(body + begins.replace("thought\n", "thought\n<channel|>"), marks))
    assert taught(closed, "4").endswith("<|channel>thought\n<channel|>4<turn|>")


def test_an_empty_thought_that_a_whole_turn_begins_with_is_taught_too() -> None:
    thought = "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    chat = Chat(tokenizer_with(CHATML.replace("{{ m.content }}", thought) + START, MARKS))
    assert taught(chat, "4").endswith("assistant\n<think>\n\n</think>\n\n4<|im_end|>")
    assert taught(chat, "<think>\nTwo.\n</think>\n\n4").endswith("assistant\n<think>\nTwo.\n</think>\n\n4<|im_end|>")
    empty = START.replace("\n{% endif", "\n<think>\n\n</think>\n\n{% endif")
    closed = Chat(tokenizer_with(CHATML + empty, MARKS))
    assert taught(closed, "4").endswith("assistant\n<think>\n\n</think>\n\n4<|im_end|>")


def test_a_demonstration_stands_in_the_channel_of_replies() -> None:
    chat = Chat(tokenizer_with(HARMONY, HARMONY_MARKS))
    assert taught(chat, "4") == (
        "<|start|>user<|message|>2?<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
    )
    assert chat.stop_ids == {EOS_ID, 262}  # <|end|> ends every message, a thought too


@pytest.mark.parametrize(
    ("template", "marks"),
    [
        (CHATML + START.replace("\n{% endif", "\n<|begin_of_thought|>{% endif"), MARKS),
        (HARMONY.replace("assistant{% endif", "assistant<|channel|>analysis<|message|>{% endif"), HARMONY_MARKS),
    ],
)
def test_a_demonstration_is_refused_behind_a_thought_whose_end_is_unknown(
    template: str, marks: tuple[str, ...]
) -> None:
    chat = Chat(tokenizer_with(template, marks))
    assert chat.start("2?")
    with pytest.raises(ValueError, match=r"begins a reply with .* set --model\.template_kwargs"):
        chat.reply("4")


def test_a_template_without_a_generation_prompt_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"no generation prompt.*has to write '<\|im_start\|>assistant' itself"):
        chat = Chat(tokenizer_with(CHATML, MARKS))
    assert taught(chat, "4").endswith("<|im_start|>assistant\n4<|im_end|>")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}<eos>{% endif %}{% endfor %}",
        CHATML + "<|im_start|>assistant\n",
        CHATML + START,
    ],
)
def test_a_template_whose_replies_begin_right_behind_the_prompt_is_not(
    template: str, recwarn: pytest.WarningsRecorder
) -> None:
    Chat(tokenizer_with(template, MARKS))
    assert not list(recwarn)


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ({"tool_use": CHATML, "rag": CHATML}, "multiple chat templates"),
        ("{% if tools|length %}{% endif %}" + CHATML, "has no len"),
        ("{{ date_string.year }}" + CHATML, "undefined"),
        ("{{ strftime_now(7) }}" + CHATML, ""),
        ("{{ 1 // 0 }}", "zero"),
        ("{% endfor %}", "endfor"),
    ],
)
def test_whatever_a_template_raises_is_said_as_its_refusal(template: Any, error: str) -> None:
    chat = Chat(tokenizer_with(template))
    with pytest.raises(ValueError, match=rf"the model's chat template refuses a conversation of user: .*{error}"):
        chat.start("hello")


def test_a_variant_of_the_template_can_be_named() -> None:
    chat = Chat(tokenizer_with({"rag": CHATML + START}, MARKS), template_kwargs={"chat_template": "rag"})
    assert taught(chat, "4").endswith("assistant\n4<|im_end|>")


@pytest.fixture(scope="module")
def default_tokenizer() -> PreTrainedTokenizerBase:
    if not is_complete(default_model_folder()):
        pytest.skip(f"{EMBEDDED_MODEL} is not in the cache: `make demo` fetches it")
    return loading.load_tokenizer(EMBEDDED_MODEL)


@pytest.mark.parametrize("system_prompt", [None, "You do sums."])
@pytest.mark.parametrize("ended", [True, False])
def test_the_default_models_conversation_has_the_ids_of_its_own_rendering(
    default_tokenizer: PreTrainedTokenizerBase, system_prompt: str | None, ended: bool
) -> None:
    chat = Chat(default_tokenizer)
    questions = ["What is 47 + 38?\n\n4 digits?", " no, lower\n", "12"]
    replies = ["85", "It is\n\n84.", " 83 "]
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": questions[0]})
    prompt = chat.start(questions[0], system_prompt)
    for i in range(3):
        whole = default_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert prompt == default_tokenizer.encode(str(whole), add_special_tokens=False)
        messages.append({"role": "assistant", "content": replies[i]})
        messages.append({"role": "user", "content": questions[(i + 1) % 3]})
        prompt = chat.extend(prompt, reply_ids(chat, replies[i], ended=ended), questions[(i + 1) % 3])
