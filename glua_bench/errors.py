"""Exceptions with a message for the user: one sentence that names the fix.

The command line prints the message without a traceback. The exit code is 2 for a user's mistake
(`UserError` and its subclasses) and 1 for everything else.
"""

from __future__ import annotations


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
