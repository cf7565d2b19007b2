"""Refusals, sent instead of a result: an HTTP status, a code for programs, and a sentence for people."""

from __future__ import annotations

from typing import Any


class Refused(Exception):
    """A request, or one of its pictures, gets no result. `seconds` says when to try again (Retry-After)."""

    def __init__(self, status: int, code: str, message: str, seconds: int | None = None) -> None:
        super().__init__(status, code, message, seconds)
        self.status, self.code, self.message, self.seconds = status, code, message, seconds

    @classmethod
    def of(cls, told: dict[str, Any]) -> Refused:
        """The refusal that `told` described in another process."""
        return cls(told["status"], told["code"], told["message"])

    def told(self) -> dict[str, Any]:
        """A description that can be sent to another process."""
        return {"status": self.status, "code": self.code, "message": self.message}

    def body(self) -> dict[str, Any]:
        """The response body: `{"error": {"code": …, "message": …}}`."""
        return {"error": {"code": self.code, "message": self.message}}

    def headers(self) -> dict[str, str]:
        """Extra headers of the response."""
        return {} if self.seconds is None else {"Retry-After": str(self.seconds)}


def busy() -> Refused:
    return Refused(429, "busy", "The queue is full: try again in a moment.", 1)


def draining() -> Refused:
    return Refused(503, "draining",
                   "The server is shutting down: ask another one, or try again in a moment.", 5)


def internal() -> Refused:
    return Refused(500, "internal", "The server failed at this request: its log says where.")


def not_ready() -> Refused:
    return Refused(503, "not_ready", "The model is being loaded: try again in a moment.", 2)


def timed_out(seconds: float) -> Refused:
    return Refused(504, "timed_out", f"The request took longer than {seconds:g} seconds: try again, or "
                   "send less.")


def too_large(most: int) -> Refused:
    return Refused(413, "too_large", f"The upload has more than {most:,} bytes: send fewer or "
                   "smaller pictures.")


def broken_body(why: str) -> Refused:
    return Refused(400, "broken_body", f"The request's body cannot be read: {why}.")


def bad_value(message: str) -> Refused:
    """`message` may come from a task, whose error messages have no full stop."""
    return Refused(422, "bad_value", message if message.endswith(".") else f"{message}.")


def not_an_image(why: str) -> Refused:
    return Refused(415, "not_an_image", f"{why}: send a whole JPEG, PNG, WebP, GIF or BMP.")


def worker_lost() -> Refused:
    return Refused(503, "worker_lost", "The process that worked on this request ended: send it again.", 1)
