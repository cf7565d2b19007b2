"""Pictures by URL: only listed hosts, no private address in any spelling, only the checked address."""

import asyncio
import http.server
import socket
import threading
from contextlib import contextmanager, suppress

import pytest

pytest.importorskip("fastapi")

from patience import PATIENCE

from blip_fast.serve.http.fetching import Fetcher, is_public
from blip_fast.serve.refusals import Refused

PUBLIC = "93.184.215.14"
PRIVATE = [
    "127.0.0.1", "127.1.2.3", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "0.0.0.0",
    "224.0.0.1", "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1", "::1", "::",
    "fe80::1%eth0", "fc00::1",
    "fd12:3456::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::1", "64:ff9b::7f00:1",
    "64:ff9b::a00:1", "2001::1", "2001:db8::1"]


@contextmanager
def site(answer):
    """A server on this machine. Yields a function that connects to it for every address, the requests that
    the server got, and the addresses of the connections."""
    asked, connections = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Host"]))
            with suppress(ConnectionError):  # the client has closed the connection
                answer(self)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def connect(address: str, port: int, seconds: float) -> socket.socket:
        connections.append((address, port))
        return socket.create_connection(server.server_address[:2], seconds)

    try:
        yield connect, asked, connections
    finally:
        server.shutdown()
        server.server_close()


def send(body: bytes, status: int = 200, **headers: str):
    def answer(handler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def fetch(url: str, connect=None, addresses=(PUBLIC,), most=1000, seconds=PATIENCE) -> bytes:
    fetcher = Fetcher(["Pictures.example"], most, seconds, resolve=lambda host, port: addresses,
                      connect=connect or (lambda *where: pytest.fail("connected")))
    return asyncio.run(fetcher(url))


def refusal(*arguments, **options) -> Refused:
    with pytest.raises(Refused) as caught:
        fetch(*arguments, **options)
    return caught.value


def test_the_checked_address_is_the_one_that_is_asked():
    with site(send(b"picture")) as (connect, asked, connections):
        assert fetch("http://pictures.example/a/b.jpg?size=1#part", connect) == b"picture"
        assert asked == [("/a/b.jpg?size=1", "pictures.example")] and connections == [(PUBLIC, 80)]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(address):
    """One private address among several is enough to refuse the name."""
    assert not is_public(address)
    for addresses in ([address], [PUBLIC, address]):
        refused = refusal("https://pictures.example/a.jpg", addresses=addresses)
        assert refused.code == "url_refused" and address not in refused.message


def test_public_addresses():
    assert all(map(is_public, [PUBLIC, "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"]))


@pytest.mark.parametrize("url", [
    "http://other.example/a.jpg", "http://pictures.example.evil.example/",
    "http://evil.example/pictures.example",
    "http://user@pictures.example/", "http://pictures.example:8080/", "http://pictures.example@evil.example/",
    "http://127.0.0.1/", "http://[::1]/", "http://2130706433/", "http://0x7f.1/", "file:///etc/passwd",
    "ftp://pictures.example/", "gopher://pictures.example/", "//pictures.example/a", "pictures.example/a",
    "http://pictures.example./", "", "http://pictures.example/a\r\nHost: evil", "http://pictures.example/a b",
    "http://pictures.example\\@evil.example/", "http://pictures.example:99999/", "http://[pictures.example/",
    "http://pictures.exämple/", "http://" + "a" * 5000])
def test_urls_that_are_refused(url):
    assert refusal(url).code == "url_refused"


def test_nothing_is_fetched_unless_it_is_allowed():
    with pytest.raises(Refused, match="url_refused"):
        asyncio.run(Fetcher([], 1000, 1.0)("http://pictures.example/a.jpg"))


def test_redirects_are_not_followed():
    with site(send(b"", 302, Location="http://127.0.0.1/")) as (connect, asked, _):
        refused = refusal("http://pictures.example/", connect)
        assert refused.code == "url_failed" and "302" in refused.message and len(asked) == 1


def test_too_much_too_slow_and_broken():
    with site(send(b"x" * 1001)) as (connect, _, _):
        assert refusal("http://pictures.example/", connect).code == "too_large"

    def never(handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(50):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            threading.Event().wait(0.05)

    with site(never) as (connect, _, _):
        assert refusal("http://pictures.example/", connect, seconds=0.3).code == "url_failed"
    with site(lambda handler: handler.wfile.write(b"no HTTP\r\n\r\n")) as (connect, _, _):
        assert refusal("http://pictures.example/", connect).code == "url_failed"

    def refused(*where):
        raise ConnectionRefusedError

    assert refusal("http://pictures.example/", refused).code == "url_failed"
    assert refusal("https://pictures.example/", addresses=[]).code == "url_refused"


def test_a_certificate_of_another_name_is_refused():
    """TLS uses the name in the URL, and a server without a certificate for it gets no request."""
    with site(send(b"picture")) as (connect, asked, _):  # a server without TLS
        assert refusal("https://pictures.example/", connect).code == "url_failed" and asked == []
