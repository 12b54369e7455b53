"""serve=true: what stage=explore asks of the server."""

from pkgutil import resolve_name
from typing import Any

import torch

from codegrid.engine.errors import InputError
from prior.exploring.subject import Subject

SERVING = "prior.exploring.serving"


def check_server(serve: Any, port: Any) -> None:
    """Raise InputError for settings that are impossible, and for a port without a server."""
    if not isinstance(serve, bool):
        raise InputError(f"serve={serve} must be true or false")
    if serve:
        resolve_name(f"{SERVING}:check_port")(port)
    elif port:
        raise InputError(f"port={port} is the server's; add serve=true, or leave port out")


def serve_model(subject: Subject, page: bytes, port: int, device: torch.device) -> None:
    """Serve a page and its models until a signal ends the process."""
    subject.tokenizer.to(device)
    if subject.prior is not None:
        subject.prior.to(device)
    resolve_name(f"{SERVING}:serve_page")(page, subject.tokenizer, subject.prior, port)
