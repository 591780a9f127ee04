"""The promises of `chat.py`: conversations are extended to the token, and replies end where the model ended them."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rl_lora import models
from rl_lora.chat import Chat
from rl_lora.default_model import DEFAULT_MODEL, default_model_folder, is_complete
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


@pytest.fixture(scope="module")
def default_tokenizer() -> PreTrainedTokenizerBase:
    if not is_complete(default_model_folder()):
        pytest.skip(f"{DEFAULT_MODEL} is not in the cache: `make demo` fetches it")
    return models.load_tokenizer(DEFAULT_MODEL)


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
