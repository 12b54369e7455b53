"""serve=true: the page and its models at 127.0.0.1, as the docstring of prior/exploring/serving.py promises."""

import json
import math
import re
import signal
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from codegrid.engine.errors import InputError
from prior import Prior
from prior.exploring.serving import MAX_JSON, Models, PageServer, check_port
from tests.helpers.commands import start
from tests.helpers.runs import SMALL_PRIOR, save_prior_run, save_tokenizer_run

PAGE = b"<!doctype html><title>a page</title>"
KINDS = {
    "gpt": [],
    "masked": ["prior=maskgit", *SMALL_PRIOR],
    "counted": ["prior=bigram"],
    "classes": [],
}
CLASSES = {"classes": 3}


@pytest.fixture(scope="module")
def priors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prior]:
    folder = tmp_path_factory.mktemp("runs")
    for name, words in KINDS.items():
        save_prior_run(folder / name, *words, classes=CLASSES.get(name, 0))
    return {name: Prior.from_pretrained(folder / name) for name in KINDS}


@contextmanager
def serving(models: Models) -> Iterator[PageServer]:
    with PageServer(PAGE, models, 0) as server:
        thread = Thread(target=lambda: server.serve_forever(poll_interval=0.01))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def servers(priors: dict[str, Prior]) -> Iterator[dict[str, PageServer]]:
    with (
        serving(Models(priors["gpt"].tokenizer, priors["gpt"])) as gpt,
        serving(Models(priors["masked"].tokenizer, priors["masked"])) as masked,
        serving(Models(priors["counted"].tokenizer, priors["counted"])) as counted,
        serving(Models(priors["classes"].tokenizer, priors["classes"])) as classes,
        serving(Models(priors["gpt"].tokenizer)) as alone,
    ):
        yield {"gpt": gpt, "masked": masked, "counted": counted, "classes": classes, "alone": alone}


def ask(
    server: PageServer | int,
    path: str,
    body: bytes | None = None,
    kind: str = "application/json",
    method: str | None = None,
    **headers: str,
) -> tuple[int, bytes]:
    """Status and body of the answer to a request, as a browser at the page makes it; a server or its port."""
    port = server if isinstance(server, int) else server.server_port
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    sent = {"Content-Type": kind} if body is not None else {}
    method = method or ("GET" if body is None else "POST")
    connection.request(method, path, body, {**sent, **headers})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def post(server: PageServer, action: str, **request: Any) -> bytes:
    status, content = ask(server, f"/api/{action}", json.dumps(request).encode())
    assert status == 200, content
    return content


def complete(server: PageServer, **request: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in post(server, "complete", **request).splitlines()]


def refused(server: PageServer, action: str, **request: Any) -> str:
    status, content = ask(server, f"/api/{action}", json.dumps(request).encode())
    assert status == 400
    sentence: str = json.loads(content)["error"]
    return sentence


def png(size: tuple[int, int], seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def test_the_page_is_at_the_root(servers: dict[str, PageServer]) -> None:
    assert ask(servers["gpt"], "/") == (200, PAGE)
    assert servers["gpt"].address == f"http://127.0.0.1:{servers['gpt'].server_port}/"
    assert ask(servers["gpt"], "/favicon.ico") == (204, b"")


def test_one_connection_serves_many_requests(servers: dict[str, PageServer]) -> None:
    connection = HTTPConnection("127.0.0.1", servers["gpt"].server_port, timeout=20)
    for _ in range(3):
        body = json.dumps({"codes": [0] * 16, "known": [1] * 15 + [0]})
        connection.request("POST", "/api/complete", body, {"Content-Type": "application/json"})
        assert json.loads(connection.getresponse().read().splitlines()[-1])["done"] is True
    connection.close()


def test_pixels_are_those_of_decode_codes(
    servers: dict[str, PageServer], priors: dict[str, Prior]
) -> None:
    codes = torch.randint(16, (3, 4, 4), generator=torch.Generator().manual_seed(0))
    pixels = post(servers["gpt"], "decode", codes=codes.flatten(1).tolist())
    expected = priors["gpt"].tokenizer.decode_codes(codes)
    assert pixels == b"".join(np.asarray(picture).tobytes() for picture in expected)
    one = post(servers["gpt"], "decode", codes=codes[0].flatten().tolist())
    assert len(one) == 16 * 16 * 3
    difference = np.abs(
        np.frombuffer(one, np.uint8).astype(int) - np.asarray(expected[0]).reshape(-1)
    )
    assert difference.max() <= 1  # a batch of another size is rounded otherwise


@pytest.mark.parametrize("size", [(16, 16), (40, 25)])
def test_a_dropped_file_has_the_codes_of_encode_images(
    servers: dict[str, PageServer], priors: dict[str, Prior], size: tuple[int, int]
) -> None:
    content = png(size)
    status, body = ask(servers["gpt"], "/api/encode", content, "image/png")
    answer = json.loads(body)
    assert status == 200
    tokenizer = priors["gpt"].tokenizer
    expected = tokenizer.encode_images(Image.open(BytesIO(content)))
    assert answer["codes"] == expected.flatten().tolist()
    assert expected.equal(tokenizer.encode_images(content))
    assert (answer["height"], answer["width"]) == (16, 16)
    pixels_read = np.frombuffer(b64decode(answer["pixels"]), np.uint8).reshape(16, 16, 3)
    if size == (16, 16):
        assert (pixels_read == np.asarray(Image.open(BytesIO(content)))).all()
    again = tokenizer.encode_images(Image.fromarray(pixels_read))
    assert again.equal(expected)


@pytest.mark.parametrize("name", ["gpt", "masked", "counted"])
def test_codes_come_as_they_are_drawn_and_known_ones_stay(
    servers: dict[str, PageServer], name: str
) -> None:
    codes = list(range(16))
    known = [1] * 3 + [0] * 4 + [1] * 2 + [0] * 6 + [1]
    *steps, last = complete(servers[name], codes=codes, known=known, seed=7)
    assert len(steps) > 1
    drawn = dict(zip(range(16), codes, strict=True))
    for step in steps:
        drawn |= dict(zip(step["places"], step["codes"], strict=True))
        assert not any(known[place] for place in step["places"])
    assert last == {"done": True, "codes": list(drawn.values())}
    assert {place for step in steps for place in step["places"]} == {
        place for place in range(16) if not known[place]
    }
    assert last["codes"] != codes


@pytest.mark.parametrize("name", ["gpt", "masked", "counted"])
def test_with_nothing_known_they_are_the_samples_of_a_seed(
    servers: dict[str, PageServer], priors: dict[str, Prior], name: str
) -> None:
    expected = priors[name].sample(3, output="codes", seed=5, temperature=0.8, top_k=6)
    sampler = {"temperature": 0.8, "top_k": 6}
    for i in (0, 2):
        last = complete(servers[name], seed=5, sample=i, sampler=sampler)[-1]
        assert last["codes"] == expected[i].flatten().tolist()


def test_labels_are_numbers_of_classes_and_none_by_default(
    servers: dict[str, PageServer], priors: dict[str, Prior]
) -> None:
    for label in (2, -1):
        expected = priors["classes"].sample(1, output="codes", seed=1, label=label, guidance=2.0)
        request: dict[str, Any] = {"seed": 1, "sampler": {"guidance": 2.0}}
        named = request if label == -1 else {**request, "label": label}
        assert complete(servers["classes"], **named)[-1]["codes"] == expected.flatten().tolist()
    assert complete(servers["gpt"], label=-1)[-1]["done"] is True


def test_bits_of_codes_add_up_to_their_nats(
    servers: dict[str, PageServer], priors: dict[str, Prior]
) -> None:
    codes = torch.randint(16, (1, 4, 4), generator=torch.Generator().manual_seed(1))
    bits = json.loads(post(servers["classes"], "judge", codes=codes.flatten().tolist(), label=1))[
        "bits"
    ]
    nats = priors["classes"].nats_of_codes(codes, label=1)
    assert sum(bits) * math.log(2) == pytest.approx(float(nats), abs=1e-3)
    masked = post(servers["masked"], "judge", codes=codes.flatten().tolist())
    assert json.loads(masked) == {"bits": None}


def test_decoding_goes_on_while_a_prior_draws_and_who_leaves_ends_the_drawing(
    priors: dict[str, Prior],
) -> None:
    models = Models(priors["gpt"].tokenizer, priors["gpt"])
    reached, leave = Event(), Event()
    drawn: list[int] = []
    draw = models.draw

    def draw_slowly(asked: Any, send: Any, stop: Event) -> None:
        def send_slowly(line: Any) -> None:
            send(line)
            if line is not None:
                drawn.append(len(line["places"]))
            if len(drawn) == 2:
                reached.set()
                assert leave.wait(20)

        draw(asked, send_slowly, stop)

    models.draw = draw_slowly  # type: ignore[method-assign]
    with models.complete({}) as lines:
        assert next(lines)["places"] == [0]
        assert reached.wait(20)
        assert len(models.decode({"codes": [0] * 16})) == 16 * 16 * 3
    leave.set()
    models.drawing.submit(lambda: None).result(20)
    assert len(drawn) == 2
    models.draw = draw  # type: ignore[method-assign]
    with models.complete({}) as lines:
        assert list(lines)[-1]["done"] is True


def test_what_fails_on_the_way_is_the_last_line(
    priors: dict[str, Prior], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = Models(priors["gpt"].tokenizer, priors["gpt"])
    fails = RuntimeError("out of memory")

    def fill(*_: Any) -> Tensor:
        raise fails

    monkeypatch.setattr(priors["gpt"].model, "fill", fill)
    with serving(models) as server:
        [line] = complete(server)
        assert line == {"error": "the server failed (out of memory); its terminal has more"}
    assert "out of memory" in capsys.readouterr().err


CODES = [0] * 16


@pytest.mark.parametrize(
    ("action", "request_", "sentence"),
    [
        ("decode", {}, "codes must be 1 to 64 grids"),
        ("decode", {"codes": []}, "codes must be 1 to 64 grids"),
        ("decode", {"codes": [CODES] * 65}, "codes must be 1 to 64 grids"),
        ("decode", {"codes": [0] * 15}, "codes must be 16 whole numbers, and these are 15 values"),
        ("decode", {"codes": [0] * 15 + [16]}, "codes from 0 to 16 must be 0 to 15"),
        ("decode", {"codes": [0] * 15 + [0.5]}, "codes must be 16 whole numbers"),
        ("decode", {"codes": [0] * 15 + [True]}, "codes must be 16 whole numbers"),
        ("complete", {"known": [1] * 16}, "codes must be 16 whole numbers, and these are NoneType"),
        ("complete", {"codes": CODES, "known": [2] * 16}, "known must be 16 values"),
        ("complete", {"seed": -1}, "seed=-1"),
        ("complete", {"sample": -1}, "sample=-1"),
        ("complete", {"label": 1}, "needs a prior of classes"),
        ("complete", {"label": "/etc/passwd"}, "must be the number of a class"),
        ("complete", {"condition": "/etc/passwd"}, "condition must be numbers"),
        ("complete", {"condition": [0.5]}, "needs a prior that was trained with a condition"),
        (
            "complete",
            {"sampler": {"init_image": "/etc/passwd"}},
            "sampler.init_image is no setting",
        ),
        ("complete", {"sampler": {"temprature": 1}}, "did you mean temperature?"),
        ("complete", {"sampler": {"temperature": 0}}, "sampler.temperature=0 must be above 0"),
        ("complete", {"sampler": {"steps": 3}}, "sampler.steps=3 is for priors that draw many"),
        ("complete", {"sampler": [1]}, "sampler must be an object"),
        ("judge", {"codes": [0]}, "codes must be 16 whole numbers, and these are 1 values"),
    ],
)
def test_bad_input_gets_a_sentence(
    servers: dict[str, PageServer], action: str, request_: dict[str, Any], sentence: str
) -> None:
    if request_.get("sampler") == {"steps": 3}:  # noticed while it draws
        [line] = complete(servers["gpt"], **request_)
        assert sentence in line["error"]
        return
    assert sentence in refused(servers["gpt"], action, **request_)


def test_a_page_without_a_prior_says_so(servers: dict[str, PageServer]) -> None:
    assert "has a tokenizer and no prior" in refused(servers["alone"], "complete")
    assert len(post(servers["alone"], "decode", codes=CODES)) == 16 * 16 * 3


def test_a_file_that_is_no_picture_gets_a_sentence(servers: dict[str, PageServer]) -> None:
    for content in (b"hello", b"", png((16, 16))[:40]):
        status, body = ask(servers["gpt"], "/api/encode", content, "application/octet-stream")
        assert status == 400
        assert json.loads(body)["error"].startswith("the file can't be read as an image (")


@pytest.mark.parametrize(
    ("status", "path", "body", "kind", "more"),
    [
        (403, "/", None, "", {"Host": "evil.example:8000"}),
        (403, "/", None, "", {"Host": ""}),
        (403, "/", None, "", {"Host": "127.0.0.1.evil.example"}),
        (403, "/api/decode", b"{}", "application/json", {"Origin": "http://evil.example"}),
        (403, "/api/decode", b"{}", "application/json", {"Origin": "null"}),
        (403, "/api/decode", b"{}", "application/json", {"Sec-Fetch-Site": "cross-site"}),
        (415, "/api/decode", b"{}", "text/plain", {}),
        (415, "/api/encode", b"{}", "application/json", {}),
        (404, "/api/delete", b"{}", "application/json", {}),
        (404, "/../secret", None, "", {}),
        (405, "/api/decode", None, "", {}),
        (411, "/api/decode", b"{}", "application/json", {"Content-Length": "two"}),
        (411, "/api/decode", b"{}", "application/json", {"Content-Length": "1" * 5000}),
        (411, "/api/decode", b"{}", "application/json", {"Transfer-Encoding": "chunked"}),
        (413, "/api/decode", b" " * (MAX_JSON + 1), "application/json", {}),
        (400, "/api/decode", b"{", "application/json", {}),
        (400, "/api/decode", b"[" * 100_000, "application/json", {}),
        (400, "/api/decode", b"[]", "application/json", {}),
        (501, "/", None, "", {"method": "DELETE"}),
    ],
)  # fmt: skip
def test_others_than_the_page_and_what_is_no_request_of_it_are_refused(
    servers: dict[str, PageServer],
    status: int,
    path: str,
    body: bytes | None,
    kind: str,
    more: dict[str, str],
) -> None:
    answer, content = ask(servers["gpt"], path, body, kind, **more)
    assert (answer, list(json.loads(content))) == (status, ["error"])
    assert ask(servers["gpt"], "/")[0] == 200


def test_names_of_this_machine_are_allowed(servers: dict[str, PageServer]) -> None:
    port = servers["gpt"].server_port
    for host in (f"localhost:{port}", "localhost:9000", f"[::1]:{port}", f"127.0.0.1:{port}"):
        headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
        body = json.dumps({"codes": CODES}).encode()
        assert ask(servers["gpt"], "/api/decode", body, **headers)[0] == 200


def test_a_port_that_is_taken_or_none_is_refused(servers: dict[str, PageServer]) -> None:
    port = servers["gpt"].server_port
    with pytest.raises(InputError, match=rf"port={port} can't be opened \(.*\); use port=0"):
        PageServer(PAGE, servers["gpt"].models, port)
    for wrong in (-1, 65536, "8000", True):
        with pytest.raises(InputError, match="must be a whole number from 0"):
            check_port(wrong)


def test_several_codebooks_are_one_after_the_other_at_each_place(tmp_path: Path) -> None:
    tokenizer, _ = save_tokenizer_run(tmp_path / "run", "quantizer=product", "quantizer.K=16")
    models = Models(tokenizer)
    codes = torch.randint(16, (1, *tokenizer.code_shape))
    assert models.L == codes.numel() > 16
    expected = tokenizer.decode_codes(codes)
    assert models.decode({"codes": codes.flatten().tolist()}) == np.asarray(expected[0]).tobytes()
    encoded = torch.tensor(models.encode(png((16, 16)))["codes"]).view(codes.shape)
    assert encoded.equal(tokenizer.encode_images(png((16, 16))))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_serves_until_a_signal_and_writes_nothing(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    save_prior_run(tmp_path / "run")
    words = ["stage=explore", "ckpt=run", "serve=true", "accelerator=cpu", "counted=8", "shown=4"]
    run = start(*words, folder=tmp_path)
    try:
        address = None
        while address is None and run.poll() is None:
            time.sleep(0.05)
            address = re.search(r"the page is at http://127.0.0.1:(\d+)/ until Ctrl-C", run.log)
        assert address, run.log
        port = int(address[1])
        page = ask(port, "/")[1].decode()
        [manifest] = re.findall(r'id="manifest">(.*?)</script>', page, re.DOTALL)
        described = json.loads(manifest)
        assert (described["server"], described["decoder"], described["runtime"]) == (
            "/api",
            None,
            None,
        )
        lines = ask(port, "/api/complete", b'{"seed": 1}')[1].splitlines()
        last = json.loads(lines[-1])
        assert len(last["codes"]) == 16
        run.send_signal(number)
        assert run.wait() == code
    finally:
        run.send_signal(signal.SIGKILL)  # if it has not ended
        run.poll(60)
    assert "Traceback" not in run.log
    assert not (tmp_path / "runs").exists()
