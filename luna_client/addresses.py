"""The addresses of servers, as people type them."""

import ipaddress
from urllib.parse import SplitResult, urlsplit

from luna_protocol.errors import Malformed

_SCHEMES = ("http", "https")


def normal(address: str) -> str:
    """With http:// where it is left out, and without quotes, spaces and slashes around it. What is no address stays as
    it is: `parsed` refuses it when it is used."""
    bare = address.strip().strip("\"'").strip().rstrip("/")
    return bare if "://" in bare else f"http://{bare.lstrip('/')}"


def parsed(address: str) -> SplitResult:
    """
    Raises:
        Malformed: this is no address of a server.
    """
    hint = "give http://HOST:PORT, such as http://127.0.0.1:8080 or http://[::1]:8080; https:// and a path are fine too"
    try:
        parts = urlsplit(address)
        usable = parts.port is None or parts.port > 0
    except ValueError as error:
        raise Malformed(f"{address!r} is no address of a server: {error}", hint) from None
    # http:/HOST, a slash short, would have the host "http".
    usable = usable and parts.scheme in _SCHEMES and parts.hostname not in (None, "", *_SCHEMES)
    usable = usable and address.isprintable() and " " not in address
    if not usable or parts.query or parts.fragment or parts.username is not None:
        raise Malformed(f"{address!r} is no address of a server", hint)
    return parts


def is_loopback(address: str) -> bool:
    """Whether the address is this machine's own."""
    try:
        host = parsed(address).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except (Malformed, ValueError):
        return False
