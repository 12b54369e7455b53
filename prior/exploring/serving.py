"""serve=true of stage=explore: the page at 127.0.0.1, with the models themselves behind it.

The page has two engines. Its own runs ONNX in the browser; this server is the other one, which a page uses when its manifest has
`"server": "/api"`. It is that page's only host.

    GET  /                 the page, text/html
    POST /api/encode       a picture -> its codes
    POST /api/decode       codes -> pixels
    POST /api/complete     codes, of which some are to be drawn -> a stream of codes
    POST /api/judge        codes -> the bits of each under the prior

Codes are whole numbers in [0, K), flat, in the order of Tokenizer's (h, w), (h, w, num_codebooks) or (1, L): row by row, and at
each place one per codebook; L of them. Pixels are bytes, (height, width, shown) in C order, `shown` being 1 (grey) or 3 (RGB) as
in the manifest: those of the Pillow images that Tokenizer.decode_codes returns, to the bit.

encode: the body is an image file as it was dropped or pasted, or one that the page wrote (PNG), with the Content-Type image/* or
application/octet-stream. It is read, turned, scaled and cut as the images in training were. Answers JSON

    {"codes": [...], "width": 64, "height": 64, "pixels": "<base64 of the pixels that the encoder sees>"}

decode: JSON. Answers application/octet-stream, the pixels of all grids one after the other.

    {"codes": [[...], [...]]}     1 to 64 grids; a single one may stand without the outer brackets

complete: JSON. Answers application/x-ndjson, one object a line as the codes are drawn.

    {"codes": [...], "known": [...], "seed": 0, "sample": 0, "label": 3, "sampler": {"temperature": 1.0, "top_k": 0}}

    known      true or 1 for each code that stays, L of them; left out: all are drawn. `codes` may be left out with it
    seed       0 to 4294967295; left out: 0
    sample     which sample of this seed, from 0; with nothing known it is that of stage=sample with these settings
    label      of a prior of classes: the number of a class, or -1 for none; left out: -1
    condition  of a prior of vectors: numbers as [0.5, 2], or {"column": value}; left out: none
    sampler    temperature, top_k, top_p, min_p, guidance, guidance_power, steps, order, choice_temperature, corrector and remask
               of conf/sampler; what is left out is as there

    {"places": [0, 1], "codes": [17, 4]}      drawn in this step: places in the flat codes. A later line may draw a place again
    {"done": true, "codes": [...]}            the last line: all codes
    {"error": "..."}                          instead of it, if something fails on the way

Closing the connection ends the drawing after its step. A prior draws for one request at a time; decoding goes on meanwhile.

judge: JSON {"codes": [...], "label": -1, "condition": ...}. Answers {"bits": [...]}, -log2 p of each code given those before it;
null of a prior that is not exact.

What is refused has the status 400 (bad input), 403 (a host or origin that isn't this machine), 404, 405, 411, 413 (over 64 MiB, or
over 4 MiB of JSON), 415 or 500, and as body {"error": "one sentence for the user"}.
"""

import json
import math
import socketserver
import sys
import traceback
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError, check_int, check_seed, suggest, summarize_error
from codegrid.engine.precision import autocast, deterministic_float32
from prior.conditioning.base import NO_CONDITION
from prior.decoding.kv_decoder import StepCache
from prior.decoding.sampling import Numbers, Sampler, make_sampler
from prior.draw import exit_on_signals
from prior.exploring.subject import Subject
from prior.prior import Prior
from vqgan.pictures import read_picture
from vqgan.tokenizer import Tokenizer

API = "/api"
LOOPBACK = "127.0.0.1"
OWN_NAMES = (LOOPBACK, "localhost", "::1")  # of this machine, in a Host header
MAX_FILE = 2**26  # bytes of a picture
MAX_JSON = 2**22
MAX_DIGITS = 20  # of a Content-Length; int() raises for thousands
MAX_GRIDS = 64
GRIDS_AT_ONCE = 8  # large pictures of 64 grids would not fit into memory
MAX_PORT = 2**16 - 1
IDLE = 60  # seconds after which a silent connection is closed
SAMPLER_SETTINGS = (
    "temperature", "top_k", "top_p", "min_p", "guidance", "guidance_power", "steps", "order", "choice_temperature", "corrector",
    "remask",
)  # fmt: skip
JSON = "application/json"
BYTES = "application/octet-stream"
LINES = "application/x-ndjson"
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class RefusedRequest(Exception):
    """A request that is refused with this status; the sentence is for the user."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Abandoned(Exception):
    """Nobody waits any more for what is being drawn."""


class Worker:
    """A thread that does one job after the other, each in the thread in which its networks have run before."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        Thread(target=self._work, daemon=True).start()

    def submit(self, job: Callable[[], Any]) -> "Future[Any]":
        future: Future[Any] = Future()
        self._jobs.put((job, future))
        return future

    def _work(self) -> None:
        while True:
            job, future = self._jobs.get()
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)


@dataclass(frozen=True)
class Completion:
    """What POST /api/complete asks for: codes and known (1, L), on the prior's device."""

    codes: Tensor
    known: Tensor
    numbers: Numbers
    sampler: Sampler
    labels: Tensor | None


class Models:
    """Answers the page's requests by a tokenizer and, if there is one, a prior, each in a thread of its own."""

    def __init__(self, tokenizer: Tokenizer, prior: Prior | None = None) -> None:
        self.tokenizer, self.prior = tokenizer.eval(), prior
        self.shape = tokenizer.code_shape
        self.L = math.prod(self.shape)
        self.coding, self.drawing = Worker(), Worker()

    def encode(self, content: bytes) -> dict[str, Any]:
        """The codes of an image file, and the pixels that the encoder sees of it. Raises InputError for what is no image."""

        @torch.no_grad()
        def run() -> tuple[Tensor, Tensor]:
            tokenizer = self.tokenizer
            x = read_picture(content, tokenizer.form, tokenizer.rules)[None]
            with deterministic_float32():
                codes = tokenizer.indices(x.to(next(tokenizer.parameters()).device))
            return codes.flatten().cpu(), tokenizer.rules.to_picture(x)[0]

        codes, picture = self.coding.submit(run).result()
        pixels = picture.movedim(0, -1).contiguous().numpy().tobytes()
        height, width = picture.shape[1:]
        sizes = {"width": width, "height": height}
        return {"codes": codes.tolist(), **sizes, "pixels": b64encode(pixels).decode()}

    def decode(self, request: Mapping[str, Any]) -> bytes:
        """The pixels of the grids in a request. Raises InputError for what are no codes of this tokenizer."""
        grids = request.get("codes")
        if isinstance(grids, list) and grids and not isinstance(grids[0], list):
            grids = [grids]
        if not isinstance(grids, list) or not 1 <= len(grids) <= MAX_GRIDS:
            raise InputError(f"codes must be 1 to {MAX_GRIDS} grids, each a list of {self.L} codes")
        codes = torch.stack([self.read_codes(grid) for grid in grids])

        def run() -> bytes:
            with deterministic_float32():
                pictures = self.tokenizer.decode_codes(codes, batch_size=GRIDS_AT_ONCE)
            return b"".join(np.asarray(picture).tobytes() for picture in pictures)

        pixels: bytes = self.coding.submit(run).result()
        return pixels

    @contextmanager
    def complete(self, request: Mapping[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
        """Yields the lines of a completion, as they come; whoever leaves before the last one ends the drawing. Raises InputError
        for a request that can't be drawn."""
        asked = self.read_completion(request)
        lines: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        stop = Event()
        self.drawing.submit(lambda: self.draw(asked, lines.put, stop))
        try:
            yield iter(lines.get, None)
        finally:
            stop.set()

    @torch.no_grad()
    def draw(self, asked: Completion, send: Callable[[Any], None], stop: Event) -> None:
        """Send the lines of a completion, then None; end early once `stop` is set."""

        def watch(places: Tensor, codes: Tensor) -> None:
            if stop.is_set():
                raise Abandoned
            send({"places": places.flatten().tolist(), "codes": codes.flatten().tolist()})

        assert self.prior is not None
        try:
            if not stop.is_set():  # while it waited for its turn
                with autocast(self.prior.device):
                    codes = self.prior.model.fill(
                        asked.codes,
                        asked.known[0],
                        asked.numbers,
                        asked.sampler,
                        asked.labels,
                        StepCache(compiled=False, watch=watch),
                    )
                send({"done": True, "codes": codes.flatten().tolist()})
        except Abandoned:
            pass
        except Exception as error:
            send({"error": report_failure(error)})
        finally:
            send(None)

    def judge(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The bits of each code under the prior, those of raster order; None of a prior whose likelihood is not exact."""
        prior = self.require_prior()
        codes = self.read_codes(request.get("codes"))[None]
        label, condition = self.read_label(request)
        if not prior.model.exact:
            return {"bits": None}

        def run() -> Tensor:
            settings: dict[str, Any] = {
                "label": label,
                "condition": condition,
                "per_position": True,
            }
            return prior.nats_of_codes(codes, **settings) / math.log(2)

        bits: Tensor = self.drawing.submit(run).result()
        return {"bits": [round(value, 4) for value in bits.flatten().tolist()]}

    def require_prior(self) -> Prior:
        """The prior. Raises InputError if there is none."""
        if self.prior is None:
            raise InputError(
                "this page has a tokenizer and no prior; start it with ckpt=<run of stage=prior>"
            )
        return self.prior

    def read_completion(self, request: Mapping[str, Any]) -> Completion:
        """What a request asks for. Raises InputError for what this prior can't draw."""
        prior = self.require_prior()
        known = read_known(request.get("known"), self.L)
        codes = torch.zeros(self.shape, dtype=torch.int64)
        if known.any() or request.get("codes") is not None:
            codes = self.read_codes(request.get("codes"))
        seed, sample = request.get("seed", 0), request.get("sample", 0)
        check_seed(seed)
        check_int("sample", sample, 0)
        sampler = read_sampler(request.get("sampler") or {})
        label, condition = self.read_label(request)
        labels = prior.choose_labels(label, condition, 1, sampler)
        device = prior.device
        return Completion(
            codes.flatten()[None].to(device),
            known[None],
            Numbers(seed, [sample], device),
            sampler,
            None if labels is None else labels.to(device),
        )

    def read_label(self, request: Mapping[str, Any]) -> tuple[int | None, Any]:
        """The class and the condition that a request names, as Prior.sample takes them. Raises InputError for texts, which would
        be names of files on this machine."""
        prior = self.require_prior()
        label, condition = request.get("label"), request.get("condition")
        if label is not None and (not isinstance(label, int) or isinstance(label, bool)):
            raise InputError(f"label={label} must be the number of a class, or -1 for none")
        if not is_numbers(condition):
            raise InputError("condition must be numbers, or columns and their values")
        if prior.condition is None:
            has_classes = len(prior.classes) > 0
            none = -1 if has_classes else None
            return none if label in (None, -1) else label, condition
        return None if label == -1 else label, NO_CONDITION if condition is None else condition

    def read_codes(self, value: Any) -> Tensor:
        """The codes of one grid, int64 of the tokenizer's shape. Raises InputError for anything else."""
        is_list = isinstance(value, list) and all(type(code) is int for code in value)
        if not is_list or len(value) != self.L:
            count = f"{len(value)} values" if isinstance(value, list) else type(value).__name__
            raise InputError(f"codes must be {self.L} whole numbers, and these are {count}")
        K = self.tokenizer.K
        assert K is not None
        if not 0 <= min(value) <= max(value) < K:
            raise InputError(f"codes from {min(value)} to {max(value)} must be 0 to {K - 1}")
        return torch.tensor(value).view(self.shape)


def read_known(value: Any, L: int) -> Tensor:
    """Which of L codes stay, (L,) bool; none of them for null. Raises InputError for anything else."""
    if value is None:
        return torch.zeros(L, dtype=torch.bool)
    is_list = isinstance(value, list) and all(each in (0, 1) for each in value)
    if not is_list or len(value) != L:
        raise InputError(
            f"known must be {L} values, 1 for each code that stays and 0 for the others"
        )
    return torch.tensor(value).bool()


def read_sampler(settings: Any) -> Sampler:
    """The sampler with these settings of a request. Raises InputError for others than SAMPLER_SETTINGS, and for wrong values."""
    if not isinstance(settings, Mapping):
        raise InputError(f"sampler must be an object of settings: {', '.join(SAMPLER_SETTINGS)}")
    for name in settings:
        if name not in SAMPLER_SETTINGS:
            raise InputError(
                f"sampler.{name} is no setting of a page{suggest(name, list(SAMPLER_SETTINGS)) or ';'} there is "
                f"{', '.join(SAMPLER_SETTINGS)}"
            )
    return make_sampler(**settings)


def is_numbers(value: Any) -> bool:
    """Whether a value of JSON is null, numbers, or an object of numbers, which may be null where one is missing."""
    if isinstance(value, Mapping):
        value = list(value.values())
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return all(each is None or type(each) in (int, float) for each in values)


def report_failure(error: BaseException) -> str:
    """The sentence for what failed. What is no mistake of the user's is also printed, with its traceback."""
    if isinstance(error, InputError):
        return str(error)
    traceback.print_exception(error, file=sys.stderr)
    return f"the server failed ({summarize_error(error)}); its terminal has more"


class PageServer(ThreadingHTTPServer):
    """Serves a page and its models to this machine alone. Raises InputError if the port is taken."""

    daemon_threads = True

    def __init__(self, page: bytes, models: Models, port: int) -> None:
        self.page, self.models = page, models
        try:
            super().__init__((LOOPBACK, port), PageHandler)
        except OSError as error:
            raise InputError(
                f"port={port} can't be opened ({error.strerror or error}); use port=0 for any that is free"
            ) from error

    def server_bind(self) -> None:
        """Bind without looking this machine's name up, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over connections that browsers close as they please; anything else is a bug and is printed."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        return f"http://{self.server_name}:{self.server_port}/"


class PageHandler(BaseHTTPRequestHandler):
    """Answers the requests of a connection, as the docstring of this module says."""

    protocol_version = "HTTP/1.1"
    server_version = "Codegrid"
    sys_version = ""
    timeout = IDLE
    server: PageServer

    def do_GET(self) -> None:
        self.attend(self.get)

    def do_POST(self) -> None:
        self.attend(self.post)

    def attend(self, action: Callable[[], None]) -> None:
        """Answer a request by an action, or by the sentence of what it raises."""
        self.is_answered = False
        length = self.headers.get("Content-Length", "")
        self.has_length = length.isascii() and length.isdigit() and len(length) < MAX_DIGITS
        self.unread = int(length) if self.has_length else 0
        try:
            self.check_caller()
            action()
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            if self.is_answered:
                raise
            self.refuse(error)

    def get(self) -> None:
        if self.path == "/favicon.ico":  # which browsers ask for by themselves
            self.start_answer(HTTPStatus.NO_CONTENT, {})
        elif self.path == "/":
            self.answer(self.server.page, "text/html; charset=utf-8")
        elif self.path in self.actions:
            raise RefusedRequest(HTTPStatus.METHOD_NOT_ALLOWED, f"{self.path} takes POST")
        else:
            raise RefusedRequest(
                HTTPStatus.NOT_FOUND, f"{self.path} is not there; the page is at /"
            )

    def post(self) -> None:
        if self.path not in self.actions:
            raise RefusedRequest(
                HTTPStatus.NOT_FOUND, f"{self.path} is no part of the page's interface"
            )
        self.actions[self.path]()

    @property
    def actions(self) -> dict[str, Callable[[], None]]:
        """What the addresses of the interface do."""
        return {
            f"{API}/encode": self.encode,
            f"{API}/decode": self.decode,
            f"{API}/complete": self.complete,
            f"{API}/judge": self.judge,
        }

    def encode(self) -> None:
        content = self.read_body(MAX_FILE, "image/", BYTES)
        self.answer_json(self.server.models.encode(content))

    def decode(self) -> None:
        self.answer(self.server.models.decode(self.read_json()), BYTES)

    def judge(self) -> None:
        self.answer_json(self.server.models.judge(self.read_json()))

    def complete(self) -> None:
        with self.server.models.complete(self.read_json()) as lines:
            headers = {"Content-Type": LINES, "Transfer-Encoding": "chunked"}
            self.start_answer(HTTPStatus.OK, headers)
            for line in lines:
                self.write_chunk(json.dumps(line, allow_nan=False).encode() + b"\n")
            self.write_chunk(b"")

    def write_chunk(self, content: bytes) -> None:
        """A piece of a body whose length is not known; an empty one ends it (RFC 9112, section 7.1)."""
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")

    def check_caller(self) -> None:
        """Raise RefusedRequest unless the page itself asks: another site's page could reach this port too, by a name that it lets
        resolve to this machine (DNS rebinding) or by a form."""
        host = self.headers.get("Host", "")
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if name not in OWN_NAMES:
            raise RefusedRequest(
                HTTPStatus.FORBIDDEN,
                f"the page is served to this machine, as {self.server.address}, and not as {host or 'a host without a name'}",
            )
        origin = self.headers.get("Origin", f"http://{host}")
        if origin != f"http://{host}" or self.headers.get("Sec-Fetch-Site") == "cross-site":
            raise RefusedRequest(
                HTTPStatus.FORBIDDEN, f"only the page itself may ask, and this is {origin}"
            )

    def read_json(self) -> Mapping[str, Any]:
        """The object in the body. Raises RefusedRequest for a body that has none."""
        content = self.read_body(MAX_JSON, JSON)
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RefusedRequest(
                HTTPStatus.BAD_REQUEST, f"the body is no JSON ({error})"
            ) from error
        if not isinstance(value, Mapping):
            raise RefusedRequest(HTTPStatus.BAD_REQUEST, "the body must be a JSON object")
        return value

    def read_body(self, limit: int, *types: str) -> bytes:
        """The body, of one of these types and up to so many bytes long. Raises RefusedRequest for any other."""
        if not self.has_length or "Transfer-Encoding" in self.headers:
            raise RefusedRequest(HTTPStatus.LENGTH_REQUIRED, "the request needs a Content-Length")
        kind = self.headers.get_content_type()
        if not kind.startswith(types):
            expected = " or ".join(f"{each}*" if each.endswith("/") else each for each in types)
            sentence = f"the body must be {expected}, and is {kind}"
            raise RefusedRequest(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, sentence)
        if self.unread > limit:
            sentence = f"{self.unread:,} bytes are too many; up to {limit:,} are taken"
            raise RefusedRequest(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, sentence)
        content = self.rfile.read(self.unread)
        self.unread = 0
        return content

    def refuse(self, error: Exception) -> None:
        """Answer by the sentence of an error, and close the connection. What is left of the body is read first, up to four times
        the largest: a browser reads no answer before it has sent all of its own."""
        remaining = min(self.unread, 4 * MAX_FILE)
        while remaining and (part := self.rfile.read(min(remaining, 2**16))):
            remaining -= len(part)
        self.close_connection = True
        if isinstance(error, RefusedRequest):
            self.answer_json({"error": str(error)}, error.status)
            return
        is_mistake = isinstance(error, InputError)
        status = HTTPStatus.BAD_REQUEST if is_mistake else HTTPStatus.INTERNAL_SERVER_ERROR
        self.answer_json({"error": report_failure(error)}, status)

    def answer_json(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.answer(json.dumps(value, allow_nan=False).encode(), JSON, status)

    def answer(self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.start_answer(status, {"Content-Type": kind, "Content-Length": str(len(content))})
        self.wfile.write(content)

    def start_answer(self, status: HTTPStatus, headers: Mapping[str, str]) -> None:
        self.is_answered = True
        self.send_response(status)
        for name, value in {**HEADERS, **headers}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses: requests that are no HTTP, and other methods."""
        self.close_connection = True
        self.answer_json({"error": message or HTTPStatus(code).phrase}, HTTPStatus(code))

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: the page says what fails."""


def serve_page(page: bytes, tokenizer: Tokenizer, prior: Prior | None, port: int) -> None:
    """Serve a page whose manifest has server="/api" at 127.0.0.1, until a signal ends the process: Ctrl-C raises
    KeyboardInterrupt, SIGTERM SystemExit with its exit code.

    tokenizer    on the device where it is to run; that of the prior where there is one
    port         0: any that is free. Raises InputError for one that is taken
    """
    check_port(port)
    with PageServer(page, Models(tokenizer, prior), port) as server, exit_on_signals():
        log_line(f"the page is at {server.address} until Ctrl-C ends it")
        server.serve_forever()


def check_port(port: Any) -> None:
    """Raise InputError unless `port` is the number of a port, or 0."""
    if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port <= MAX_PORT:
        raise InputError(f"port={port} must be a whole number from 0, any free port, to {MAX_PORT}")


def check_server(serve: Any, port: Any) -> None:
    """Raise InputError for settings that are impossible, and for a port without a server."""
    if not isinstance(serve, bool):
        raise InputError(f"serve={serve} must be true or false")
    if serve:
        check_port(port)
    elif port:
        raise InputError(f"port={port} is the server's; add serve=true, or leave port out")


def serve_model(subject: Subject, page: bytes, port: int, device: torch.device) -> None:
    """Serve a page and its models, on this device, until a signal ends the process."""
    subject.tokenizer.to(device)
    if subject.prior is not None:
        subject.prior.to(device)
    serve_page(page, subject.tokenizer, subject.prior, port)
