"""Exceptions with a message for the user: one sentence that names the fix.

The command line prints the message without a traceback. The exit code is 2 for a user's mistake
(`UserError` and its subclasses) and 1 for everything else. `reason` and `without_password` prepare
what a message quotes.
"""

from __future__ import annotations

import re

ERROR = "glua-bench: error: "  # how the line on stderr begins


class UserError(Exception):
    """Invalid input from the user.

    Args:
        message: one sentence that names the file or option and the fix.
    """

    exit_code = 2


class DataError(UserError):
    """A file or directory of images or labels cannot be used."""


class ConfigError(UserError):
    """An option or a configuration value is unknown or invalid."""


class PluginError(UserError):
    """A plugin cannot be found, imported or used."""


class RunFailure(Exception):
    """A run failed although its input is valid, e.g. a non-finite loss or a full disk."""

    exit_code = 1


def reason(error: BaseException) -> str:
    """What an error says, to be quoted inside a sentence: one line without a full stop.

    Example:
        >>> reason(ValueError("bad magic.\\nSee the manual."))
        'bad magic; See the manual'
        >>> reason(ValueError())
        'ValueError'
    """
    return _quoted(str(error)) or type(error).__name__


def first_line(error: BaseException) -> str:
    """As `reason`, of errors whose further lines help nobody."""
    return _quoted(str(error).strip().partition("\n")[0]) or type(error).__name__


def _quoted(text: str) -> str:
    return shortened(" ".join(text.split()).rstrip(".").replace(". ", "; "), 200)


def shortened(text: str, most: int) -> str:
    """A text of at most `most` characters; "…" stands for what is cut off."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def complaint(output: str, otherwise: str = "no reason") -> str:
    """The error that a `glua-bench` process reported last, from what it wrote.

    Args:
        output: of the process; without an error in it, the last line is taken.
        otherwise: where nothing was written.
    """
    lines = output.strip().splitlines() or [otherwise]
    told = [line for line in lines if line.startswith(ERROR)] or lines
    return told[-1].removeprefix(ERROR)


def without_password(url: str) -> str:
    """A URL as it may be printed or stored: without password and without tokens.

    Everything between user and the last "@" is taken for the password, since some programs accept
    one with "/", ":" and "@" in it. Over HTTP the user is removed as well, since it may be a token.

    Example:
        >>> without_password("postgresql://me:se/c:r@t@host/base?password=secret&x=1")
        'postgresql://me:…@host/base?password=…&x=1'
        >>> without_password("https://token@host:5000")
        'https://host:5000'
    """
    url = re.sub(r"(?i)^(https?://).*@", r"\1", url)
    url = re.sub(r"^([\w+.-]+://[^/:@?#]*):.*@", r"\1:…@", url)
    return re.sub(r"(?i)([?&][^=&]*(?:passw|token|secret|key)[^=&]*=)[^&]*", r"\1…", url)
