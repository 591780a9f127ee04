"""The command `rl-lora`: its subcommands, their help, their tab completion, and the scripts that start them too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rl_lora
from rl_lora.scripts.cli import COMMANDS
from rl_lora.scripts.schema import schema_of
from rl_lora.trainer.taken import lock_run_dir
from tests import ROOT

HEAVY = ("torch", "transformers", "accelerate", "numpy", "gymnasium", "huggingface_hub", "matplotlib")
PROGRAM = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(ROOT)!r})
from rl_lora.scripts.cli import main
main()
"""
SAYS_WHAT_IT_IMPORTED = """
import atexit, sys
atexit.register(lambda: print(*(name for name in {heavy} if name in sys.modules), file=sys.stderr))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the command as pip installs it, and a run."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "rl-lora").write_text(PROGRAM, encoding="utf-8")
    (folder / "rl-lora").chmod(0o755)
    (folder / "heavy").mkdir()
    (folder / "heavy" / "rl-lora").write_text(
        PROGRAM.replace("import sys\n", SAYS_WHAT_IT_IMPORTED.format(heavy=HEAVY), 1), encoding="utf-8"
    )
    (folder / "heavy" / "rl-lora").chmod(0o755)
    (folder / "runs" / "first").mkdir(parents=True)
    (folder / "runs" / "mine").mkdir()
    (folder / "runs" / "taken" / "checkpoints" / "step-000001").mkdir(parents=True)
    (folder / "runs" / "mine" / "config.yaml").write_text("steps: 3\n", encoding="utf-8")
    return folder


def call(place: Path, *args: str, program: str = "rl-lora") -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PATH": f"{place}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "100"}
    return subprocess.run([program, *args], cwd=place, env=environ, capture_output=True, text=True)


def test_the_command_lists_its_subcommands_with_an_example_and_tells_its_version(place: Path) -> None:
    found = call(place, "--help")
    assert found.returncode == 0
    for name, command in COMMANDS.items():
        assert f"  {name:<12}{command.summary}\n" in found.stdout
    assert "rl-lora train --run_dir runs/first" in found.stdout
    assert call(place, "--version").stdout == f"rl_lora {rl_lora.__version__}\n"
    alone = call(place)
    assert (alone.returncode, alone.stdout) == (2, found.stdout)


@pytest.mark.parametrize(
    "args, line",
    [
        ("trian", "there is no command trian; trian may be meant for train; rl-lora --help lists the commands"),
        ("xyz", "there is no command xyz; rl-lora --help lists the commands"),
        (
            "--steps 3",
            "--steps stands before a command: name one first, as in rl-lora train; ",
        ),
        ("completion bsh", "there is no completion for bsh; bsh may be meant for bash; there is for bash, zsh, fish"),
        (
            "train --learning_rat 1",
            "there is no option --learning_rat; --learning_rat may be meant for --learner.learning_rat",
        ),
        ("sft --stepz 1", "there is no option --stepz; --stepz may be meant for --steps; --help all shows all options"),
        ("evaluate runs/first --limt 1", "there is no option --limt; --limt may be meant for --limit; "),
        ("report runs/first --otu x", "there is no option --otu; --otu may be meant for --out; "),
        ("plot runs/first --outt x", "there is no option --outt; --outt may be meant for --out; "),
        ("benchmark --round 1", "there is no option --round; --round may be meant for --rounds; "),
        ("train --help lerner", "no option has 'lerner' in its name; lerner may be meant for learner; "),
        ("train --adapter.rank 0", "adapter.rank must be >= 1, got 0"),
        ("train --run_dir runs/taken", "runs/taken already holds a run; continue it with --resume true, or choose"),
    ],
)
def test_misuse_is_one_line_that_names_the_nearest_before_any_library_is_imported(
    args: str, line: str, place: Path
) -> None:
    found = call(place, *args.split(), program="heavy/rl-lora")
    *said, imported = found.stderr.splitlines()
    assert (found.returncode, found.stdout, imported) == (2, "", "")
    assert len(said) == 1
    assert said[0].startswith(f"error: {line}")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_options_that_matter_and_an_example_and_imports_no_library(name: str, place: Path) -> None:
    command = COMMANDS[name]
    found = call(place, name, "--help", program="heavy/rl-lora")
    assert (found.returncode, found.stderr) == (0, "\n")
    options = [line.split()[0] for line in found.stdout.splitlines() if line.startswith("  --")]
    own = {"--config", "--print_config", "--version"}
    all_options = schema_of(command.config()).options
    assert set(options) - own == {f"--{option}" for option in command.usage.first or all_options}
    assert len(options) <= 15
    for example in command.usage.examples:
        assert f" {name} {example}".rstrip() in found.stdout.replace(" \\\n      ", " ")
    if command.usage.first:
        whole = call(place, name, "--help", "all").stdout
        assert "--help all` shows all" in found.stdout
        for option in all_options:
            assert f"  --{option} " in whole


def test_help_shows_a_group_or_the_options_that_have_a_word_in_their_names(place: Path) -> None:
    for topic, present, absent in (
        ("learner", ["--learner.objective", "--learner.betas"], ["--rollout.temperature", "--steps"]),
        ("temperature", ["--rollout.temperature", "--eval.temperature"], ["--learner.objective"]),
        ("learner.betas", ["--learner.betas"], ["--learner.objective"]),
    ):
        found = call(place, "train", "--help", topic).stdout
        assert all(f"  {name} " in found for name in present)
        assert not any(name in found for name in absent)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_of_the_help_can_be_typed(name: str, place: Path) -> None:
    for example in COMMANDS[name].usage.examples:
        found = call(place, "-c", f"rl-lora {name} {example} --print_config", program="bash")
        assert found.returncode == 0, found.stderr


def test_folders_are_typed_without_an_option(place: Path) -> None:
    for name, option in (("evaluate", "adapters"), ("report", "folders"), ("plot", "runs")):
        for args in (["a", "b"], [f"--{option}", "a", "b"]):
            found = call(place, name, *args, "--out", "x", "--print_config")
            assert f"{option}:\n- a\n- b\n" in found.stdout, found.stderr
        both = call(place, name, "a", f"--{option}", "b")
        assert f"error: --{option} names folders twice" in both.stderr
        assert both.returncode == 2


def test_pages_and_pictures_of_runs_need_no_torch(place: Path) -> None:
    run = place / "runs" / "drawn"
    run.mkdir()
    accuracy = {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "reward": 0.5}
    records = [{"kind": "train", "step": 1, "reward": 0.5}, {"kind": "eval", "step": 1, **accuracy}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    config = "steps: 1\nenv: {id: Task-v0}\nmodel: {name: tiny}\nadapter: {init_from: null}\n"
    (run / "config.yaml").write_text(config, encoding="utf-8")
    for args, file in (
        (["report", "runs/drawn"], run / "report.html"),
        (["plot", "runs/drawn", "--out", "x.svg"], place / "x.svg"),
    ):
        found = call(place, *args, program="heavy/rl-lora")
        assert found.returncode == 0, found.stderr
        assert file.exists()
        assert not {"torch", "transformers", "accelerate", "gymnasium"} & set(found.stderr.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_script_is_a_thin_entry_to_its_subcommand(name: str, place: Path) -> None:
    script = ROOT / "scripts" / f"{name}.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 12
    ours = call(place, name, "--print_config")
    theirs = call(place, str(script), "--print_config", program=sys.executable)
    module = call(ROOT, "-m", "rl_lora", name, "--print_config", program=sys.executable)
    assert (ours.returncode, theirs.returncode, module.returncode) == (0, 0, 0)
    assert ours.stdout == theirs.stdout == module.stdout


COMPLETE = """
eval "$(rl-lora completion bash)"
COMP_LINE="$1"; COMP_POINT=${#1}; COMP_TYPE=9
_python_argcomplete rl-lora
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    "typed, some, others",
    [
        ("rl-lora ", ["train", "evaluate", "sft", "report", "plot", "benchmark", "completion"], ["--steps"]),
        ("rl-lora tr", ["train"], ["report"]),
        ("rl-lora train --learner.", ["--learner.objective", "--learner.betas"], ["--steps", "--adapter.rank"]),
        ("rl-lora train --learner.objective ", ["reinforce", "grpo"], ["runs/", "--steps"]),
        ("rl-lora train --learner.objective=g", ["grpo"], ["reinforce"]),
        ("rl-lora train --resume ", ["true", "false"], ["runs/"]),
        ("rl-lora train --env.kwargs.digits 3 --run_dir r", ["runs/"], ["--rank"]),
        ("rl-lora train --env.id rl_lora/A", ["rl_lora/Arithmetic-v0"], ["rl_lora/Math-v0"]),
        ("rl-lora train --help le", ["learner"], ["--learner.objective"]),
        ("rl-lora evaluate runs/", ["runs/first/"], []),
        ("rl-lora plot runs/first --o", ["--out"], ["--runs"]),
        ("rl-lora benchmark --random ", ["llama-1b", "null"], ["runs/"]),
        ("rl-lora completion ", ["bash", "zsh", "fish"], ["train"]),
    ],
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_subcommands_options_choices_and_paths(
    typed: str, some: list[str], others: list[str], place: Path
) -> None:
    found = call(place, "-c", COMPLETE, "bash", typed, program="bash")
    offered = {line.strip() for line in found.stdout.splitlines()}
    assert set(some) <= offered, found.stderr
    assert not set(others) & offered


@pytest.mark.parametrize("shell, word", [("zsh", "compdef"), ("fish", "complete --command rl-lora")])
def test_zsh_and_fish_get_a_script_of_their_own(shell: str, word: str, place: Path) -> None:
    script = call(place, "completion", shell).stdout
    assert word in script
    if shutil.which(shell):
        assert call(place, "-n", "-c", script, program=shell).returncode == 0


def test_the_places_of_the_completion_stand_in_a_column(place: Path) -> None:
    lines = call(place, "completion").stdout.splitlines()[2:]
    assert len({line.index("in ~") for line in lines}) == 1


def test_a_run_that_goes_on_is_said_before_its_folder_is_taken(place: Path) -> None:
    with lock_run_dir(place / "runs" / "taken"):
        found = call(place, "train", "--run_dir", "runs/taken", program="heavy/rl-lora")
    assert found.stderr.startswith("error: another run is writing to runs/taken; wait until it has ended")
    assert found.stderr.splitlines()[1:] == [""]


def test_setup_declares_the_one_command() -> None:
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert "console_scripts =\n    rl-lora = rl_lora.scripts.cli:main\n\n" in setup
