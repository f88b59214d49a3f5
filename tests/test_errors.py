"""errors.py: passwords and tokens are masked, whatever they contain and wherever a URL stands."""

from __future__ import annotations

import itertools
import pickle
import time

import pytest

from glua_bench.errors import ConfigError, RunFailure, complaint, escaped_url, without_password

# Every secret ends in "cr3t", and no part of it but the first characters may be seen.
SECRETS = (
    "cr3t", "s/cr3t", "s:cr3t", "s@cr3t", "s#cr3t", "s%40cr3t", "s?cr3t", "12/cr3t", "s'cr3t",
    's"cr3t', "s=cr3t", "s,cr3t", "s)cr3t", "@cr3t/", "s://cr3t", "s\\cr3t",
)  # fmt: skip
FRAMES = (
    "{}", "'{}'", '"{}"', "see ({}) now.", "<{}>", "`{}`", '{{"a":"{}","b":"c"}}',
    "--storage={} x", "uri.{}", "({!r}, 1)", "a {} b http://u:other@h.x/ c", "x=[{}], y=1",
)  # fmt: skip
USERS = ("me", "me@server", "jane.doe", "")
PLACES = ("host/base", "host.x.org:5432/base?x=1", "127.0.0.1:9")
SCHEMES = ("postgresql", "http", "HTTPS", "mysql+pymysql")


def urls(secret: str) -> list[str]:
    made = [
        f"{scheme}://{user}:{secret}@{place}"
        for scheme, user, place in itertools.product(SCHEMES, USERS, PLACES)
    ]
    return [
        *made,
        f"https://{secret}@host",
        f"https://host/x?token={secret}&y=1",
        f"http://host.x.org:80/x?api_key={secret}",
        f"postgresql://me@host/base?sslpassword={secret}",
        f"postgresql://me:{secret}@host/base?password={secret}&b=2",
        f"postgresql:/me:{secret}@host/base",
    ]


@pytest.mark.fault("secrets", "URLs with every kind of password, in every kind of text")
@pytest.mark.parametrize("secret", SECRETS)
def test_no_part_of_a_secret_is_left(secret: str) -> None:
    for url in urls(secret):
        assert "cr3t" not in without_password(url, whole=True)
        with_blank = f"--storage={url.replace(secret, f'two words {secret}')}"
        assert "cr3t" not in without_password(with_blank, whole=True)
        for frame in FRAMES:
            shown = without_password(frame.format(url))
            assert "cr3t" not in shown and "other" not in shown, (frame, url)
            assert without_password(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "https://cdn.jsdelivr.net/npm/@niivue/niivue@0.44",
        "https://user.github.io/x?y=a@b",
        "sqlite:////data/me@lab/a:b.db",
        "file:///x/a:b@c",
        "C:/data/a:b@c",
        "http://host:5000: 3 runs uploaded",
        "postgresql://me@host/base?application_name=a",
        "Dice 0.5 @ 500: a/b:c@d",
    ],
)
def test_a_text_without_a_secret_stays(text: str) -> None:
    assert without_password(text) == text == without_password(text, whole=True)


def test_long_texts_are_masked_in_linear_time() -> None:
    began = time.perf_counter()
    assert without_password("a" * 300_000 + " x:/y " + "b+" * 100_000).endswith("b+")
    assert time.perf_counter() - began < 2


def test_a_connection_string_of_libpq_is_masked() -> None:
    shown = without_password("host=h password='my cr3t' user=me sslpassword=cr3t")
    assert shown == "host=h password=… user=me sslpassword=…"


def test_errors_never_quote_a_password() -> None:
    url = "postgresql://me:cr3t@host/base"
    for kind in (ConfigError, RunFailure):
        error = kind(f"{url} cannot be read.")
        assert str(error) == "postgresql://me:…@host/base cannot be read."
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert complaint(f"glua-bench: error: {url} is away.") == "postgresql://me:…@host/base is away."


@pytest.mark.parametrize("secret", SECRETS)
def test_a_library_finds_the_same_host_and_password(secret: str) -> None:
    sqlalchemy = pytest.importorskip("sqlalchemy")
    for user in USERS[:3]:
        url = escaped_url(f"postgresql://{user}:{secret}@host:5432/base?application_name=a")
        found = sqlalchemy.make_url(url)
        assert (found.host, found.port, found.database) == ("host", 5432, "base")
        assert found.username == user and found.password in (secret, "s@cr3t")
        assert escaped_url(url) == url
