"""Loading models, tokenizers and configurations by name: a local folder, a hub id, or the default.

`default_choice.py` says which model the default is. Left out: quantised loading, several devices, and adapters.
"""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.peft_utils import find_adapter_config_file

from rl_lora.policy.default_choice import hub_folder, settled
from rl_lora.policy.default_model import prepare_default_model, without_progress_bars
from rl_lora.system.model_names import DEFAULT_MODEL, EMBEDDED_MODEL, HUB_MODEL
from rl_lora.system.plurals import counted

LOAD_ERRORS = (OSError, ValueError, ImportError, RuntimeError, SafetensorError)
ADAPTER = "adapter_config.json"
TOKENIZERS = ("*token*", "vocab*", "merges*", "*.model", "*.spm", "*bpe*", "*.vocab")
"""Files that a tokenizer is read from, one of them at least."""
SAVE_TOKENIZER = "; put the files of its base model's there (tokenizer.json), or save it with tokenizer.save_pretrained"
WIDE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types of weights that may hold NaN and infinity."""
CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def resolve_model(name: str) -> str:
    """The local folder or hub id that `name` stands for; fetches and converts the embedded model the first time.

    Raises ValueError for a path that does not exist or holds no model, and for what cannot be a hub id.
    """
    name = settled(name)
    if name == EMBEDDED_MODEL:
        return str(prepare_default_model())
    if name == HUB_MODEL and (folder := hub_folder()) is not None:
        return str(folder)
    path = Path(os.path.expanduser(name or "~/no name"))  # an empty path would be the current folder
    if path.is_dir():
        if not (path / "config.json").is_file():
            kind = "an adapter, not a base model" if (path / ADAPTER).is_file() else "no config.json"
            raise ValueError(f"model folder {name!r} holds {kind}; give the folder of a saved Hugging Face causal LM")
        return str(path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        problem = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"model path {name!r} {problem}; give the folder of a saved Hugging Face causal LM")
    if difflib.get_close_matches(name, [DEFAULT_MODEL, EMBEDDED_MODEL], cutoff=0.85):
        raise ValueError(f"there is no model {name!r}: did you mean {DEFAULT_MODEL!r} or {EMBEDDED_MODEL!r}?")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"{name!r} is no model: give {DEFAULT_MODEL!r}, a local folder, or a hub id such as 'gpt2' or 'owner/name'"
        ) from error
    return name


def check_model(name: str, trust_remote_code: bool = False) -> None:
    """Raises ValueError if a name leads to no causal language model, as far as its configuration alone can tell.

    The default and the embedded model pass without being fetched.
    """
    if name in (DEFAULT_MODEL, EMBEDDED_MODEL):
        return
    config = load_config(name, trust_remote_code)
    refuse_adapter(name)
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if remote or _is_causal_lm(config):
        return
    made_for = ", ".join(config.architectures or []) or "unknown"
    raise ValueError(
        f"model {name!r} is no causal LM (model type {config.model_type!r}, architecture {made_for}); choose a "
        f"decoder-only language model such as {DEFAULT_MODEL!r}"
    )


def refuse_adapter(name: str) -> None:
    """Raises ValueError if a model comes with an adapter, where that can be known: on machines that have `peft`,
    `transformers` puts it into the base without a word."""
    folder_or_id = resolve_model(name)
    with _explained(name, "configuration"):
        found = _adapter_in(folder_or_id)
    if found:
        raise ValueError(
            f"model {name!r} holds an adapter ({ADAPTER}), and whether that would be part of the base depends on "
            f"whether peft is installed. Either make it part: merge it (merge_and_unload of peft), save the result "
            f"elsewhere, and name that. Or keep it apart: name the base as model.name and the adapter as "
            f"adapter.init_from, each in a folder of its own"
        )


def _adapter_in(folder_or_id: str) -> bool:
    if os.path.isdir(folder_or_id):
        return os.path.isfile(os.path.join(folder_or_id, ADAPTER))
    return _adapter_on_hub(folder_or_id)


@functools.cache
def _adapter_on_hub(name: str) -> bool:
    """Asked once in a process: where the hub does not answer, it takes long to give up."""
    return find_adapter_config_file(name) is not None


def load_config(name: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's configuration; no weights are read. Raises ValueError."""
    folder_or_id = resolve_model(name)
    with _explained(name, "configuration"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder_or_id, trust_remote_code=trust_remote_code)
    return config


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with its chat template if it has one. Raises ValueError."""
    folder_or_id = resolve_model(name)
    folder = Path(folder_or_id)
    if folder.is_dir() and not trust_remote_code and not any(file for p in TOKENIZERS for file in folder.glob(p)):
        raise ValueError(f"model folder {name!r} holds no tokenizer{SAVE_TOKENIZER}")
    with _explained(name, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder_or_id, trust_remote_code=trust_remote_code
        )
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):  # what becomes of missing files
        raise ValueError(f"the tokenizer of model {name!r} has no vocabulary{SAVE_TOKENIZER}")
    return tokenizer


def load_causal_lm(
    name: str,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The model in evaluation mode on one device; `dtype="auto"` keeps the stored one.

    Raises ValueError if it cannot be loaded, or if weights are missing (they would be random).
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {str(device)!r} cannot be used here: {_first_line(error)}; 'cpu' always can"
        ) from error
    refuse_adapter(name)
    extra: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    folder_or_id = resolve_model(name)
    with _explained(name, "weights"):
        loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(  # type: ignore[assignment]
            folder_or_id, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True, **extra
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"model {name!r} lacks {counted(len(missing), 'weight')} of its causal LM, among them {missing[:3]}"
        )
    model.to(device)  # type: ignore[arg-type]
    return model.eval()


def context_length(config: PreTrainedConfig) -> int:
    """Tokens that a model's positions reach; practically unlimited where its config names no limit."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def check_finite(model: PreTrainedModel) -> None:
    """Raises ValueError if there are weights that are NaN or infinite, and names them."""
    wrong = []
    for name, weight in model.named_parameters():
        if weight.dtype in WIDE and weight.numel() and not torch.stack(weight.detach().aminmax()).isfinite().all():
            n = int(weight.isfinite().logical_not().sum())
            wrong.append(f"{name} ({n:,} of {weight.numel():,})")
    if wrong:
        raise ValueError(
            f"weights of {model.config._name_or_path or type(model).__name__} are NaN or infinite: "
            f"{', '.join(wrong[:5])}{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}; the file is damaged, or "
            "the training that wrote it diverged: get it anew"
        )


def _is_causal_lm(config: PreTrainedConfig) -> bool:
    """Whether the library has a causal LM for this type, and the checkpoint was saved from one."""
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or getattr(config, "is_encoder_decoder", False):
        return False
    return not config.architectures or any(saved.endswith(CAUSAL_SUFFIXES) for saved in config.architectures)


@contextmanager
def _explained(name: str, part: str) -> Iterator[None]:
    """Without progress bars, and with whatever transformers raises turned into one ValueError that says what to do."""
    try:
        with without_progress_bars():
            yield
    except LOAD_ERRORS as error:
        raise ValueError(_explain(name, part, error)) from error


def _explain(name: str, part: str, error: BaseException) -> str:
    causes = [error]
    while nearer := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(nearer)

    def caused_by(kind: type[BaseException]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    if "trust_remote_code" in str(error):
        return f"model {name!r} brings code of its own, run only with trust_remote_code=true: read it first"
    if caused_by(GatedRepoError):  # a kind of RepositoryNotFoundError
        return f"model {name!r} is gated: accept its terms on the hub, then log in (`hf auth login`) or set HF_TOKEN"
    if caused_by(RepositoryNotFoundError):
        return f"the hub has no model {name!r}: check the spelling; if it is private, `hf auth login` or set HF_TOKEN"
    if caused_by(LocalEntryNotFoundError):
        close = difflib.get_close_matches(name, [DEFAULT_MODEL, EMBEDDED_MODEL], n=1)
        meant = f"did you mean {close[0]!r}? Else " if close else ""
        if name in (DEFAULT_MODEL, HUB_MODEL):
            meant = f"{EMBEDDED_MODEL!r} needs no hub (it is the same model, from a 4-bit file). Else "
        return (
            f"model {name!r} is no local folder, not in the hub's local cache, and the hub cannot be reached: "
            f"{meant}check the network and HF_HUB_OFFLINE, or give a local folder"
        )
    return f"cannot load the {part} of model {name!r}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
