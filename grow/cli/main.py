"""grow COMMAND …: growing language models, and training what has grown."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable

import grow
from grow.cli import analysis, checkpoints, evaluation, runs
from grow.cli.arguments import checked
from grow.errors import LEFT, Fault, Preempted, UserError, one_line

COMMANDS: dict[str, Callable[..., str]] = {
    command.__name__.replace("_", "-"): command
    for command in (
        checkpoints.plan, checkpoints.expand, checkpoints.verify, runs.fetch, runs.preview, runs.show, runs.train,
        runs.fit_switch, checkpoints.consolidate, checkpoints.base, checkpoints.growth, checkpoints.attach,
        evaluation.eval, evaluation.chat, evaluation.report, evaluation.find_alpha, evaluation.learn_alphas,
        analysis.rank, analysis.effective_rank,
    )
}  # fmt: skip


RENAMED = {"dial": "find-alpha", "layer-dial": "learn-alphas"}
"""Commands by their old names."""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line. Returns the exit code: 0 done, 2 a user's mistake, 75 preempted, 1 a fault."""
    try:
        words = _by_new_name(sys.argv[1:] if arguments is None else arguments)
        name, positional, flags = checked(words, COMMANDS)
        if "help" in flags:
            _print_help(name)
        elif "version" in flags:
            print(grow.__version__)
        else:
            said = COMMANDS[name](*positional, **flags)
            if said:  # empty on ranks other than 0
                print(said)
    except BrokenPipeError:  # of `grow … | head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and name == "train":
            raise  # in other commands it means the disk or the network; here it could be anything
        _say_once(one_line(error))
        return 2 if isinstance(error, UserError) else 1
    except Fault as error:
        print(f"grow: {one_line(error)}", file=sys.stderr)
        return 1
    except Preempted as left:
        _say_once(one_line(left))
        return LEFT
    except KeyboardInterrupt:
        _say_once("interrupted; the same command again resumes from what is complete")
        return 130
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def _say_once(line: str) -> None:
    """Prints a line that every rank has, on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"grow: {line}", file=sys.stderr)


def _print_help(name: str) -> None:
    import fire  # slow to import, and of use here alone

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):  # Fire writes its help there
        # After "--" Fire itself takes it, else a command with **fields would take it for a field.
        fire.Fire(COMMANDS, command=[name, "--", "--help"] if name else ["--help"], name="grow")
    text = "\n".join(line for line in said.getvalue().splitlines() if not line.startswith("INFO: ")).strip()
    text = re.sub(r"^( +)-\w, --", r"\1--", text, flags=re.MULTILINE)  # flags have one name here
    print(re.sub(r"--(\w+)_=(\w+)_", r"--\1=\2", text))


def _by_new_name(words: list[str]) -> list[str]:
    if not words or words[0] not in RENAMED:
        return words
    print(f"grow: {words[0]} is called {RENAMED[words[0]]} now", file=sys.stderr)
    return [RENAMED[words[0]], *words[1:]]
