"""The ways in which ferkd says no. The command line turns them into one line of text and an exit status."""

from __future__ import annotations

import errno
from collections.abc import Sequence


class InputError(ValueError):
    """Wrong use or wrong input: what was found and what to do. Exit status 2."""


class StoreError(InputError):
    """A label store that is damaged, incomplete, of another format or of another dataset; names the file."""


class CheckFailed(Exception):
    """A check was carried out and said no (preflight, verify). Exit status 1."""


class Stopped(Exception):
    """Saved everything and stopped because it was asked to (SIGTERM, Ctrl-C): start the same command again. Exit status 75."""


ABOUT_THE_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENAMETOOLONG})
"""What reading a file answers when it is that file's own doing. Everything else may be gone tomorrow, or on another machine."""


class SourceLost(InputError):
    """A photograph cannot be had, and the photograph is not at fault: what holds it (`place`: a folder, a disk, a tar file) is gone, or,
    given `why`, the machine cannot read it (no right to, a disk's or a network's error, too many open files)."""

    def __init__(self, text: str, place: str, why: str = "") -> None:
        super().__init__(text)
        self.place, self.why = place, why

    def __reduce__(self) -> tuple[type[SourceLost], tuple[str, str, str]]:
        return SourceLost, (str(self), self.place, self.why)

    @property
    def stops(self) -> str:
        """What to say of work that stops here, because going on would record the photographs as broken for good."""
        if self.why:
            fault = f"{self.place}: cannot be read here ({self.why}), which is no fault of the photograph"
            return f"{fault}; mend that and start the same command again"
        return f"{self.place}: is no longer there as it was; bring it back and start the same command again"


def one_line(error: BaseException, most: int = 200) -> str:
    """What an error of another library says, on one line of at most `most` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


def few(items: Sequence[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (", ..." if len(items) > most else "")
