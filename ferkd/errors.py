"""The ways in which ferkd says no. The command line turns them into one line of text and an exit status."""

from __future__ import annotations

from collections.abc import Sequence


class InputError(ValueError):
    """Wrong use or wrong input: what was found and what to do. Exit status 2."""


class StoreError(InputError):
    """A label store that is damaged, incomplete, of another format or of another dataset; names the file."""


class CheckFailed(Exception):
    """A check was carried out and said no (preflight, verify). Exit status 1."""


class Stopped(Exception):
    """Saved everything and stopped because it was asked to (SIGTERM, Ctrl-C): start the same command again. Exit status 75."""


class SourceLost(InputError):
    """Photographs that were there are no longer: not one of them, but what holds them (`place`: a folder, a disk, a tar file)."""

    def __init__(self, text: str, place: str) -> None:
        super().__init__(text)
        self.place = place

    def __reduce__(self) -> tuple[type[SourceLost], tuple[str, str]]:
        return SourceLost, (str(self), self.place)


def one_line(error: BaseException, most: int = 200) -> str:
    """What an error of another library says, on one line of at most `most` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


def few(items: Sequence[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (", ..." if len(items) > most else "")
