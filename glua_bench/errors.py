"""Exceptions with a message for the user: one sentence that names the fix.

The command line prints the message without a traceback. The exit code is 2 for a user's mistake
(`UserError` and its subclasses) and 1 for everything else. `reason`, `first_line`, `printable` and
`without_password` prepare text for quotation in messages; `cause` and `death` describe failures of
the machine, which are not bugs.
"""

from __future__ import annotations

import errno
import re
import signal
from urllib.parse import quote

ERROR = "glua-bench: error: "  # prefix of the line on stderr


class _Reported(Exception):
    """Base of errors whose message is shown as it is; passwords of URLs in it are masked."""

    def __init__(self, message: object = "") -> None:
        super().__init__(without_password(str(message)))


class UserError(_Reported):
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


class RunFailure(_Reported):
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
    text = without_password(text)  # before a URL is cut
    return shortened(" ".join(text.split()).rstrip(".").replace(". ", "; "), 200)


def shortened(text: str, most: int) -> str:
    """Shorten a text to at most `most` characters, with "…" at the end."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


# Control characters but tab and line feed, and characters that reverse the direction of text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Mask passwords and escape control characters, by which a name could rewrite a terminal.

    Example:
        >>> printable("case\\x1b[2J")
        'case\\\\x1b[2J'
    """
    shown = without_password(text)
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), shown)


_LESS = "use a smaller batch_size (--set batch_size=N)"
_LESS_MEMORY = f"close other programs, {_LESS}, or fewer --jobs or --workers"
# Type → what has happened and what to do; looked up by name, since torch is imported late.
_KNOWN_TYPES = {
    "MemoryError": f"The memory of this machine is exhausted; {_LESS_MEMORY}.",
    "_ArrayMemoryError": f"The memory of this machine is exhausted; {_LESS_MEMORY}.",
    "ArrowMemoryError": f"The memory of this machine is exhausted; {_LESS_MEMORY}.",
    "OutOfMemoryError": f"The memory of the GPU is exhausted; {_LESS}, another GPU, or "
    "--precision 16-mixed.",
    "BrokenProcessPool": f"A process was killed, most likely for lack of memory; {_LESS_MEMORY}.",
}
_KNOWN_TEXTS = (
    (r"DefaultCPUAllocator|can't allocate memory|bad_alloc", _KNOWN_TYPES["MemoryError"]),
    (r"CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED", _KNOWN_TYPES["OutOfMemoryError"]),
    (
        r"Connection (closed|reset) by peer|NCCL.*remote|Broken pipe.*gloo|gloo.*Broken pipe",
        f"Another process of this run ended early, most likely killed for lack of memory; {_LESS}, "
        "and repeat the command, which resumes.",
    ),
)
_DAMAGED_TYPES = (
    "ArrowInvalid", "BadGzipFile", "BadZipFile", "IsalError", "LZMAError", "SafetensorError",
    "UnpicklingError", "error",
)  # fmt: skip
_DAMAGED_TEXTS = (
    r"PytorchStreamReader|CRC check failed|Parquet (magic|file|input)|Compressed file ended"
)


def cause(error: BaseException) -> str:
    """Return a sentence on an error that is the machine's or a file's and no bug; "" for others.

    Out of memory, a full disk, a killed process of the run, and damaged files.
    """
    # Libraries also wrap these errors.
    wrapped = error.__cause__ or error.__context__
    for each in [error, wrapped] if wrapped is not None else [error]:
        name, text = type(each).__name__, str(each)
        if isinstance(each, OSError) and each.errno == errno.ENOMEM:
            return _KNOWN_TYPES["MemoryError"]
        if isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT):
            of = f" of {each.filename}" if each.filename else ""
            return f"The disk{of} is full; free some space, and repeat the command."
        if isinstance(each, OSError) and each.errno == errno.EIO:
            of = f" of {each.filename}" if each.filename else ""
            return f"The disk{of} has failed ({each.strerror}); check it, and repeat the command."
        if name in _KNOWN_TYPES:
            return _KNOWN_TYPES[name]
        for pattern, sentence in _KNOWN_TEXTS:
            if isinstance(each, RuntimeError) and re.search(pattern, text, re.DOTALL):
                return sentence
        damaged = name in _DAMAGED_TYPES and (name != "error" or type(each).__module__ == "zlib")
        if damaged or re.search(_DAMAGED_TEXTS, text):
            return f"A file is damaged ({reason(each)}); restore it, or create it again."
    return ""


def death(code: int) -> str:
    """Return why a process ended by a signal, from its negative exit code, and what to do.

    Example:
        >>> death(-15)
        'ended by SIGTERM; repeat the command.'
    """
    number = -code
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if name == "SIGKILL":
        return (
            "killed (SIGKILL), most likely for lack of memory; use a smaller "
            "batch_size (--set batch_size=N), or fewer --jobs or --workers."
        )
    if name in ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT"):
        return f"crashed in a library ({name}); repeat the command."
    return f"ended by {name}; repeat the command."


def complaint(output: str, otherwise: str = "no reason") -> str:
    """Return the last error in the output of a `glua-bench` process.

    Args:
        output: output of the process; without an error in it, its last line is returned.
        otherwise: returned if the output is empty.
    """
    lines = output.strip().splitlines() or [otherwise]
    errors = [line for line in lines if line.startswith(ERROR)] or lines
    return without_password(errors[-1].removeprefix(ERROR))


# A URL up to the next blank, also one with a missing slash; a drive letter is no scheme.
_URL = re.compile(r"(?<![\w+.-])[\w+.-]{2,}:/+\S+")
_AUTHORITY = re.compile(r"(?:-+[\w-]+=)?([\w+.-]{2,}):/{1,2}(?!/)")
_HOST = re.compile(r"localhost|[\w-]+(\.[\w-]+)+|\[[\da-fA-F:.]+\]")
_PARAMETER = re.compile(
    r"(?i)[?&;#][^=&;]*(?:passw|pwd|token|secret|key|credential|signature|auth)[^=&;]*="
)
_KEYWORD = re.compile(r"(?i)\b((?:ssl)?passw(?:or)?d=)(?:'[^']*'|[^\s'…]\S*)")  # as for libpq
_MARKS = ("…", r"\u2026")  # as printed, and in JSON


def without_password(text: str, whole: bool = False) -> str:
    """Mask passwords and tokens of the URLs in a text, whatever characters they contain.

    A password extends to the last "@", since it may contain "@", "/", ":" and "#". Over HTTP the
    user is removed as well, since it may be a token. If a URL can be read in several ways, too much
    is masked rather than too little. Masking a text again does not change it.

    Args:
        text: any text, e.g. a message or a traceback.
        whole: whether the text is a single URL or option, whose password may contain blanks and
            quotes.

    Example:
        >>> without_password("postgresql://me:se/c:r@t@host/base?password=secret&x=1")
        'postgresql://me:…@host/base?password=…&x=1'
        >>> without_password("'https://token@host:5000' and redis://:secret@cache are down")
        "'https://host:5000' and redis://:…@cache are down"
    """
    if whole and _AUTHORITY.match(text):
        return _masked(text)
    if ":/" in text:
        pieces, end = [], 0
        while found := _URL.search(text, end):
            start, url = found.start(), found.group()
            before = text[start - 1 : start]
            if before and before in "'\"`<":  # ends at the closing quote before a delimiter
                closing = re.escape(">" if before == "<" else before)
                if closed := re.search(rf"\\?{closing}(?=[\s,;:.)\]}}]|$)", url):
                    url = url[: closed.start()]
            url = url.rstrip("'\"`<>()[]{},;.:\\")
            pieces += [text[end:start], _masked(url)]
            end = start + len(url)
        text = "".join([*pieces, text[end:]])
    return _KEYWORD.sub(rf"\1{_MARKS[0]}", text) if "=" in text else text


def escaped_url(url: str) -> str:
    """Escape special characters in user and password, so that all libraries find the same host.

    They would otherwise quote a part of the password as host or port in their messages.

    Args:
        url: URL whose password may contain "@", "/", ":", "#" and blanks, escaped or not.

    Example:
        >>> escaped_url("postgresql://me:se/c:r@t@host/base")
        'postgresql://me:se%2Fc%3Ar%40t@host/base'
        >>> escaped_url("postgresql://host:5432/base?application_name=a@b")
        'postgresql://host:5432/base?application_name=a@b'
    """
    scheme = _AUTHORITY.match(url)
    if scheme is None:
        return url
    begin = scheme.end()
    at = url.partition("?")[0].rfind("@")
    if at < begin:
        at = url.rfind("@")
        if at < begin or re.match(r"[^:@/?#]*(:\d*)?([/?#]|$)", url[begin:]):
            return url
    parts = url[begin:at].partition(":")
    known = [re.sub(r"%(?![\da-fA-F]{2})", "%25", part) for part in parts[::2]]
    user, password = (quote(part, safe="%!$&'()*+,;=~") for part in known)
    return f"{url[:begin]}{user}{parts[1]}{password}{url[at:]}"


def _masked(url: str) -> str:
    """Mask one URL, or an option with one, such as --storage=URL."""
    scheme = _AUTHORITY.match(url)
    spans = [(m.end(), f"{url}&".index("&", m.end()), _MARKS[0]) for m in _PARAMETER.finditer(url)]
    begin, at = len(url) if scheme is None else scheme.end(), url.rfind("@")
    if scheme is not None and at >= begin and not _names_host(url[begin:]):
        colon = url.find(":", begin, at)
        if scheme[1].lower().endswith(("http", "https")):
            spans.append((begin, at + 1, ""))
        elif colon >= 0:
            spans.append((colon + 1, at, _MARKS[0]))
    shown, done, hidden = "", 0, 0
    for start, end, mark in sorted(spans):
        if start < hidden:  # overlaps with the last span
            shown, done = shown + ("" if shown.endswith(_MARKS[0]) else _MARKS[0]), max(done, end)
        elif not url.startswith(_MARKS, start):
            shown, done = f"{shown}{url[done:start]}{mark}", end
        hidden = max(hidden, done)
    return shown + url[done:]


def _names_host(rest: str) -> bool:
    """Return True if what follows a scheme is a host, although an "@" comes later."""
    place, _, port = re.split(r"[/?#]", rest, maxsplit=1)[0].partition(":")
    if port and "@" in rest.partition("?")[0]:
        return False
    return bool(_HOST.fullmatch(place)) and (not port or port.isdecimal())
