"""python -m grow COMMAND …: growing language models, and training what has grown."""

import os
import sys
from collections.abc import Callable

from grow.arguments import checked
from grow.commands import checkpoints, runs, studies
from grow.errors import LEFT, Fault, Preempted, UserError, one_line

COMMANDS: dict[str, Callable[..., str]] = {
    command.__name__.replace("_", "-"): command
    for command in (
        checkpoints.plan, checkpoints.expand, checkpoints.verify, runs.fetch, runs.preview, runs.show, runs.train,
        checkpoints.consolidate, checkpoints.base, checkpoints.growth, checkpoints.attach, runs.eval, runs.report,
        studies.rank, studies.effective_rank, studies.dial, studies.layer_dial,
    )
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line. Returns the exit code: 0 done, 2 a user's mistake, 75 preempted, 1 a fault."""
    try:
        name, positional, flags = checked(sys.argv[1:] if arguments is None else arguments, COMMANDS)
        if "help" in flags:
            import fire

            # After "--" Fire itself takes it, else a command with **fields would take it for a field.
            fire.Fire(COMMANDS, command=[name, "--", "--help"] if name else ["--help"], name="grow")
        else:
            print(COMMANDS[name](*positional, **flags))
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and name == "train":
            raise  # elsewhere it is the disk, or the network before it; here it could be anything
        if os.environ.get("RANK", "0") == "0":  # every rank finds the same
            print(f"grow: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except Fault as error:
        print(f"grow: {one_line(error)}", file=sys.stderr)
        return 1
    except Preempted as left:
        if os.environ.get("RANK", "0") == "0":
            print(f"grow: {one_line(left)}", file=sys.stderr)
        return LEFT
    except SystemExit as leaving:  # Fire's help
        return int(leaving.code or 0)
    return 0
