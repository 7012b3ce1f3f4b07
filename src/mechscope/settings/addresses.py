"""Addresses of endpoints, checked before anything is loaded or sent."""

from __future__ import annotations

from urllib.parse import urlsplit

from mechscope.errors import SettingsError


def check_address(url: str) -> str:
    """Return an address of http or https without its last slash.

    Raises:
        SettingsError: It is none, or holds more than a host, a port and a path.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError as error:
        raise _refused(url, str(error)) from error
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise _refused(url, "it lacks http or https, a host, or a port above 0")
    if parts.username is not None or parts.password is not None:
        # not repeated, as it may hold a password
        raise SettingsError("the endpoint's address holds a user's name or password: give the key in the environment instead")
    if parts.query or parts.fragment:
        raise _refused(url, "it has a query or a fragment, behind which nothing can be added")
    if not (url.isascii() and url.isprintable()) or " " in url:
        raise _refused(url, "it has characters that an address cannot hold")
    return url.rstrip("/")


def _refused(url: str, reason: str) -> SettingsError:
    return SettingsError(f"endpoint {url!r} is no address of http or https ({reason}): write it as http://localhost:8000/v1")
