"""Assert that unusable files are refused with one clear sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from glua_bench.errors import DataError


@contextmanager
def refused(name: object, match: str | None = None) -> Iterator[pytest.ExceptionInfo[DataError]]:
    """Expect a `DataError` whose message is one sentence that names the file and a fix."""
    with pytest.raises(DataError, match=match) as caught:
        yield caught
    text = str(caught.value)
    assert str(name) in text
    assert text.endswith(".") and "\n" not in text and ":" in text
    assert ". " not in text.replace(str(name), "")
