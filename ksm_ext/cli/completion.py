"""``ksm completion``: what shells need to complete commands, options and their choices.

The scripts are made of the arguments of :mod:`ksm_ext.cli.program`, and run nothing of Python when
a key is pressed. What is no command, option or choice is completed as the name of a file.
"""

from argparse import Action, ArgumentParser, _SubParsersAction
from collections.abc import Iterator

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
_ksm() {
  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" words=""
  if [[ $cur == = ]]; then cur=""
  elif [[ $prev == = ]]; then prev="${COMP_WORDS[COMP_CWORD-2]}"
  fi
  if (( COMP_CWORD == 1 )); then words="@COMMANDS@"
  elif [[ $cur == -* ]]; then
    case "${COMP_WORDS[1]}" in
@OPTIONS@
    esac
  else
    case "${COMP_WORDS[1]} $prev" in
@CHOICES@
    esac
  fi
  COMPREPLY=( $(compgen -W "$words" -- "$cur") )
}
complete -o default -o bashdefault -F _ksm ksm
"""
_ZSH = "autoload -Uz compinit bashcompinit && compinit -u && bashcompinit\n"


def script(parser: ArgumentParser, shell: str) -> str:
    """The completions of ``ksm`` for one of :data:`SHELLS`.

    Args:
        parser: The parser of ``ksm``, with its commands.
        shell: Which one.
    """
    return _fish(parser) if shell == "fish" else _ZSH * (shell == "zsh") + _bash(parser)


def _commands(parser: ArgumentParser) -> Iterator[tuple[str, str, ArgumentParser]]:
    """Name, help and parser of every command."""
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for each in action._choices_actions:
                yield each.dest, each.help or "", action.choices[each.dest]


def _choices(action: Action) -> str:
    return " ".join(map(str, action.choices or ()))


def _bash(parser: ArgumentParser) -> str:
    choices, options = [], []
    for name, _, command in _commands(parser):
        words = [option for action in command._actions for option in action.option_strings]
        options.append(f'    {name}) words="{" ".join(words)}" ;;')
        for action in command._actions:
            if action.choices:  # of a positional argument, after the command
                before = [f'"{name} {word}"' for word in action.option_strings or [name]]
                choices.append(f'    {"|".join(before)}) words="{_choices(action)}" ;;')
    commands = " ".join(name for name, _, _ in _commands(parser))
    script = _BASH.replace("@COMMANDS@", f"{commands} --help --version")
    return script.replace("@CHOICES@", "\n".join(choices)).replace("@OPTIONS@", "\n".join(options))


def _fish(parser: ArgumentParser) -> str:
    lines = []
    for name, about, command in _commands(parser):
        lines.append(f"complete -c ksm -n __fish_use_subcommand -f -a {name} -d {_quoted(about)}")
        for action in command._actions:
            words = ["complete -c ksm -n", _quoted(f"__fish_seen_subcommand_from {name}")]
            words += [
                f"-l {o[2:]}" if o[:2] == "--" else f"-s {o[1:]}" for o in action.option_strings
            ]
            if action.nargs != 0 and action.option_strings:
                words.append("-r")
            if action.choices:
                words.append(f"-f -a {_quoted(_choices(action))}")
            if action.option_strings or action.choices:
                lines.append(" ".join([*words, "-d", _quoted(action.help or "")]))
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Text between the single quotes of fish."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
