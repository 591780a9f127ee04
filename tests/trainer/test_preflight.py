"""A run that cannot be is refused before its model is loaded, and a warning is printed once."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from rl_lora import Policy
from rl_lora.config import ModelConfig
from rl_lora.policy.inspection import inspect_model
from rl_lora.trainer.preflight import check_trackers, problems_to_check
from tests.tiny import tiny_folder, tiny_tokenizer


def test_a_warning_about_the_template_is_given_once_before_and_after_the_model_is_loaded(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama")
    tokenizer = tiny_tokenizer(True)
    tokenizer.chat_template = (
        "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}[END]\n{% endfor %}<|assistant|>\n"
    )
    tokenizer.save_pretrained(folder)
    config = ModelConfig(str(folder), compile=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        inspect_model(config)
        Policy.from_config(config, "cpu")
    (text,) = (str(warning.message) for warning in said)
    assert "ends a reply with '[END]" in text


def test_targets_that_the_model_lacks_are_known_without_its_weights(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama")
    (folder / "model.safetensors").write_bytes(b"")
    chat, context = inspect_model(ModelConfig(str(folder)), ["q_proj"])
    assert (chat.has_template, context) == (True, 512)
    with pytest.raises(ValueError, match="q_prog"):
        inspect_model(ModelConfig(str(folder)), ["q_prog"])


def test_a_tracker_that_accelerate_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown tracker 'wandbb'"):
        check_trackers(["wandbb"])


@pytest.mark.parametrize(("n", "expected"), [(None, [3, 4]), (3, [0, 1, 2])])
def test_all_problems_of_a_finite_list_are_checked(n: int | None, expected: list[int]) -> None:
    class Env:
        n_problems = n

        @property
        def unwrapped(self) -> Any:
            return self

        def close(self) -> None:
            pass

    assert list(problems_to_check(Env, iter([3, 4]))) == expected  # type: ignore[arg-type]
