"""Exceptions with a message for the user: one sentence that names the fix.

The command line prints the message without a traceback. The exit code is 2 for a user's mistake
(`UserError` and its subclasses) and 1 for everything else. `reason`, `first_line` and
`without_password` prepare text for quotation in messages.
"""

from __future__ import annotations

import re

ERROR = "glua-bench: error: "  # prefix of the line on stderr


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
    """Return an error's message in one line without a full stop, for quotation in a sentence.

    Example:
        >>> reason(ValueError("bad magic.\\nSee the manual."))
        'bad magic; See the manual'
        >>> reason(ValueError())
        'ValueError'
    """
    return _quoted(str(error)) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, as `reason` does."""
    return _quoted(str(error).strip().partition("\n")[0]) or type(error).__name__


def _quoted(text: str) -> str:
    return shortened(" ".join(text.split()).rstrip(".").replace(". ", "; "), 200)


def shortened(text: str, most: int) -> str:
    """Shorten a text to at most `most` characters, with "…" at the end."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def complaint(output: str, otherwise: str = "no reason") -> str:
    """Return the last error in the output of a `glua-bench` process.

    Args:
        output: output of the process; without an error in it, its last line is returned.
        otherwise: returned if the output is empty.
    """
    lines = output.strip().splitlines() or [otherwise]
    errors = [line for line in lines if line.startswith(ERROR)] or lines
    return errors[-1].removeprefix(ERROR)


def without_password(url: str) -> str:
    """Mask password and tokens of a URL.

    The password extends to the last "@", since it may contain "/", ":" and "@". Over HTTP the user
    is removed as well, since it may be a token.

    Example:
        >>> without_password("postgresql://me:se/c:r@t@host/base?password=secret&x=1")
        'postgresql://me:…@host/base?password=…&x=1'
        >>> without_password("https://token@host:5000")
        'https://host:5000'
    """
    url = re.sub(r"(?i)^(https?://).*@", r"\1", url)
    url = re.sub(r"^([\w+.-]+://[^/:@?#]*):.*@", r"\1:…@", url)
    return re.sub(r"(?i)([?&][^=&]*(?:passw|token|secret|key)[^=&]*=)[^&]*", r"\1…", url)
