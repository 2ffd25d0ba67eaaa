"""What goes on around a call into a model library: the hub is not waited for in vain, and chatter is held back."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

NO_HUB = "where no hub is reachable, give a local folder"


@contextmanager
def library_call() -> Iterator[None]:
    """Within the context, the hub's client answers from its cache where the hub's name cannot be resolved (it would
    retry for half a minute a file otherwise), and what libraries log to the root logger goes nowhere unless the
    program has set up logging."""
    root, silent = logging.getLogger(), logging.NullHandler()
    if not root.handlers:
        root.addHandler(silent)
    try:
        with _hub_at_once():
            yield
    finally:
        root.removeHandler(silent)


@contextmanager
def _hub_at_once() -> Iterator[None]:
    try:
        from huggingface_hub import constants
    except ImportError:
        yield
        return
    if constants.HF_HUB_OFFLINE or getproxies() or _resolves(urlsplit(constants.ENDPOINT).hostname or ""):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
