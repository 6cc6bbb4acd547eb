"""The command line. `python -m ferkd` and `ferkd` are the same; ferkd/commands/ has a function for each command.

Exit status: 0 done; 1 a check said no; 2 wrong use or input; 75 saved and stopped on SIGTERM (or Ctrl-C, for train): start the same
command again.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from ferkd import __version__
from ferkd.errors import CheckFailed, InputError, Stopped


class Command(NamedTuple):
    what: str
    home: str
    function: str


COMMANDS = {
    "label": Command("let a teacher label many crops of every photograph, once", "labels", "label"),
    "inspect": Command("show what a store's labels look like, and what thresholds would do", "labels", "inspect"),
    "train": Command("train a student on stored labels, or on hard labels without them", "training", "train"),
    "eval": Command("top-1 and top-5 of trained weights, or of a teacher", "training", "evaluate"),
    "verify": Command("show a store's teacher some of its crops again: does it say the same?", "labels", "verify"),
    "plan": Command("what labelling would cost: bytes, the teacher's passes, hours", "labels", "plan"),
    "convert": Command("turn label files of FKD or ml-dr into a store", "interop", "convert"),
    "export": Command("write a store as files that FKD's training script reads", "interop", "export"),
    "merge": Command("average stores over the same crops", "interop", "merge"),
    "report": Command("one HTML page of training runs, side by side", "training", "report"),
    "demo": Command("the whole way on a small dataset, with a table and pictures", "training", "demo"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # without a network it tells of every attempt; the last one's error is one line
    is_first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes the first tells, the others only warn
    logging.basicConfig(level=logging.INFO if is_first else logging.WARNING, format="%(message)s", stream=sys.stderr)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: ferkd COMMAND ...\n\nKnowledge distillation of image classifiers from stored teacher labels.\n")
        print("\n".join(f"  {name:<9} {command.what}" for name, command in COMMANDS.items()))
        print("\n`ferkd COMMAND --help` explains each and ends with an example.")
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(__version__)
        return
    if arguments[0] not in COMMANDS:
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        choose = f"did you mean {near[0]}? If not," if near else "choose"
        print(f"ferkd: {arguments[0]!r} is no command; {choose} one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    command = COMMANDS[arguments[0]]
    try:
        getattr(import_module(f"ferkd.commands.{command.home}"), command.function)(arguments[1:])
    except BrokenPipeError:  # `ferkd inspect STORE | head` has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, CheckFailed, Stopped, OSError, RuntimeError, KeyboardInterrupt) as error:
        from ferkd.distributed import first_to_say  # loads torch, which `ferkd --help` does not wait for

        # PyTorch tells of a killed loader process by a bare RuntimeError, from a signal handler: wherever the program happens to be.
        lost_worker = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
        out_of_memory = type(error).__name__ == "OutOfMemoryError"  # torch's, a RuntimeError
        if "--debug" in arguments or (isinstance(error, RuntimeError) and not (lost_worker or out_of_memory)):
            raise
        status = {CheckFailed: 1, Stopped: 75, KeyboardInterrupt: 130}.get(type(error), 2)
        text = " ".join(str(error).split())
        if isinstance(error, KeyboardInterrupt):
            text = "interrupted"
        elif isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        elif lost_worker:
            text = f"workers: {text} Did memory, or /dev/shm, run out? Use fewer --workers"
        elif out_of_memory:
            text = f"GPU out of memory ({str(error).splitlines()[0]}); lower --batch-size"
        if first_to_say(text):
            print(f"ferkd {arguments[0]}: {text}", file=sys.stderr)
        sys.exit(status)


if __name__ == "__main__":
    main()
