"""The errors that a user can cause, each one sentence that names the fix.

The command line prints the sentence without a traceback. Exit code 2 marks a user's
mistake (`UserError` and its children); exit code 1 marks everything that is ours or the
machine's.
"""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave cannot be used; the message says what to change.

    Args:
        message: one sentence that names the file or option and the fix.
    """

    exit_code = 2


class DataError(UserError):
    """A file or directory of images or labels cannot be used."""


class ConfigError(UserError):
    """An option or a configuration value is unknown or out of range."""


class PluginError(UserError):
    """A plugin cannot be found, imported or used."""


class RunFailure(Exception):
    """A run stopped for a reason that is not the command's wording (exit code 1).

    Raised for a non-finite loss, a full disk, an unwritable directory.
    """

    exit_code = 1
