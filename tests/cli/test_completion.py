"""What Tab offers, asked of the shells themselves."""

import os
import shlex
import shutil
import subprocess

import pytest

from ksm_ext.cli import main
from ksm_ext.cli.program import _parser

BASH = """
source {script}
COMP_WORDS=({words}) COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_ksm
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
ZSH = """
source {script}
COMP_WORDS=({words}) COMP_CWORD=$(( ${{#COMP_WORDS}} - 1 ))
setopt ksh_arrays sh_word_split
_ksm
print -l -- ${{COMPREPLY[@]}}
"""
FISH = "source {script}\ncomplete -C {line}\n"


def completions(folder, shell, line):
    """The words that a shell offers at the end of a line."""
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell} is installed")
    words = line.split(" ")
    text = {"bash": BASH, "zsh": ZSH, "fish": FISH}[shell].format(
        script=folder / shell,
        words=" ".join(part for word in words for part in parts_of(word)),
        line=shlex.quote(line),
    )
    flags = {"bash": ["--norc"], "zsh": ["-f"], "fish": []}[shell]
    environment = os.environ | {"HOME": str(folder), "TERM": "dumb"}
    ran = subprocess.run(
        [program, *flags, "-c", text], capture_output=True, text=True, env=environment, cwd=folder
    )
    assert ran.returncode == 0 and not ran.stderr, ran.stderr
    found = {found.split("\t")[0] for found in ran.stdout.splitlines()} - {""}
    if shell == "zsh":  # which itself drops what does not begin as the last word does
        found = {word for word in found if word.startswith(words[-1])}
    return found


def parts_of(word):
    """A word as bash splits it: at the sign of equality."""
    name, equals, value = word.partition("=")
    return [shlex.quote(name), *(["=", *([shlex.quote(value)] if value else [])] if equals else [])]


@pytest.fixture
def ask(tmp_path, capsys):
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        (tmp_path / shell).write_text(capsys.readouterr().out)
    (tmp_path / "scores.csv").write_text("")
    return lambda shell, line: completions(tmp_path, shell, line)


every_shell = pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
COMMANDS = next(action.choices for action in _parser()._actions if action.dest == "command")


@every_shell
def test_commands(ask, shell):
    assert set(COMMANDS) <= ask(shell, "ksm ") <= {*COMMANDS, "--help", "--version"}
    assert ask(shell, "ksm att") == {"attribute"}
    assert ask(shell, "ksm completion ") == {"bash", "zsh", "fish"}


@every_shell
@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command(ask, shell, command):
    own = {o for action in COMMANDS[command]._actions for o in action.option_strings}
    long = {option for option in own if option.startswith("--")}
    assert ask(shell, f"ksm {command} --") == long
    assert not ask(shell, f"ksm {command} --zzz")


@every_shell
def test_choices_of_every_option(ask, shell):
    for command, option in [("fit", "--criterion"), ("attribute", "--readout"), ("next", "--for")]:
        (action,) = (a for a in COMMANDS[command]._actions if option in a.option_strings)
        assert ask(shell, f"ksm {command} s {option} ") == set(action.choices)
    assert ask(shell, "ksm attribute s --readout sh") == {"shapley"}
    if shell != "zsh":
        (found,) = ask(shell, "ksm attribute --readout=sh")
        assert found.removeprefix("--readout=") == "shapley"


@every_shell
def test_the_rest_are_files(ask, shell):
    """bash and zsh complete names of files where nothing else is offered (``-o default``)."""
    offered = ask(shell, "ksm fit sc")
    assert offered == ({"scores.csv"} if shell == "fish" else set())
    assert ask(shell, "ksm fit --masks sc") == offered
