"""Downloads that give up."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def limited_silence(seconds: float) -> Iterator[None]:
    """Inside, connections raise TimeoutError after so many seconds of silence: a network that drops packets would block
    the program for ever."""
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)
