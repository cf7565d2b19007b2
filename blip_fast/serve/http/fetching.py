"""Pictures by URL: only from hosts that the server's owner has listed, and never from a private network.

A host name is resolved once, all of its addresses must be public, and the connection goes to one of the
addresses that were checked. A name that resolves differently later (DNS rebinding) therefore gains nothing.
Redirects are not followed and proxies are not used.
"""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from blip_fast.serve.refusals import Refused, too_large

PORTS = {"http": 80, "https": 443}
PART = 65_536  # bytes per read

_URL = re.compile(r"[\x21-\x7e]{1,2000}")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv6 addresses that a gateway translates to IPv4

Resolve = Callable[[str, int], Sequence[str]]
Connect = Callable[[str, int, float], socket.socket]


def resolved(host: str, port: int) -> list[str]:
    """All addresses of a host name. Raises OSError."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def connected(address: str, port: int, seconds: float) -> socket.socket:
    return socket.create_connection((address, port), seconds)


class Fetcher:
    """Fetches pictures in threads, so that the event loop does not wait for other machines."""

    def __init__(self, hosts: Sequence[str], most_bytes: int, seconds: float, *, resolve: Resolve = resolved,
                 connect: Connect = connected) -> None:
        """
        Args:
            hosts: the allowed host names, compared as a whole.
            most_bytes, seconds: limits of one picture's size and download time.
            resolve, connect: turn a host name into addresses, and an address into a connection.
        """
        self._hosts = frozenset(host.lower() for host in hosts)
        self._most, self._seconds = most_bytes, seconds
        self._resolve, self._connect = resolve, connect

    async def __call__(self, url: str) -> bytes:
        """The content at the URL. Raises Refused: `url_refused` (before connecting) or `url_failed`."""
        scheme, host, path = self._url_parts(url)
        return await asyncio.to_thread(self._fetch, scheme, host, path)

    def _url_parts(self, url: str) -> tuple[str, str, str]:
        """Scheme, host and path of an allowed URL."""
        if not self._hosts:
            raise _url_refused("this server fetches nothing: send the picture itself")
        try:
            parts = urlsplit(url) if _URL.fullmatch(url) else None
            usual = parts is not None and parts.port in (None, PORTS.get(parts.scheme))
        except ValueError:
            parts, usual = None, False
        if parts is None or parts.scheme not in PORTS or not usual or parts.username is not None:
            raise _url_refused("write http(s)://host/path, without a user or another port")
        host = (parts.hostname or "").lower()
        if host not in self._hosts:
            raise _url_refused("its host is not among those that this server fetches from")
        return parts.scheme, host, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    def _fetch(self, scheme: str, host: str, path: str) -> bytes:
        ends = time.monotonic() + self._seconds
        port = PORTS[scheme]
        try:
            addresses = list(self._resolve(host, port))
        except OSError:
            raise _url_failed("its host has no address") from None
        if not addresses or not all(is_public(address) for address in addresses):
            raise _url_refused("its host has an address in a private network")
        try:
            with self._connect(addresses[0], port, self._seconds) as plain:
                if scheme == "http":
                    return self._get(plain, host, path, ends)
                with ssl.create_default_context().wrap_socket(plain, server_hostname=host) as secure:
                    return self._get(secure, host, path, ends)
        except (OSError, http.client.HTTPException):
            raise _url_failed("its host cannot be reached, or breaks off") from None

    def _get(self, sock: socket.socket, host: str, path: str, ends: float) -> bytes:
        connection = http.client.HTTPConnection(host)
        connection.sock = sock
        connection.request("GET", path, headers={"Accept": "image/*", "Accept-Encoding": "identity",
                                                 "Connection": "close"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise _url_failed(f"its host answers with status {answer.status}; redirects are not followed")
        parts, size = [], 0
        while part := answer.read1(PART):
            parts.append(part)
            size += len(part)
            if size > self._most:
                raise too_large(self._most)
            if time.monotonic() > ends:
                raise _url_failed(f"its host takes longer than {self._seconds:g} seconds")
        return b"".join(parts)


def is_public(address: str) -> bool:
    """Whether an address is on the public internet: not this machine, its network, or a tunnel into one."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        elif found.sixtofour is not None or found.teredo is not None or found in _NAT64:
            return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


def _url_refused(why: str) -> Refused:
    return Refused(422, "url_refused", f"The URL is refused: {why}.")


def _url_failed(why: str) -> Refused:
    return Refused(422, "url_failed", f"The URL cannot be fetched: {why}.")
