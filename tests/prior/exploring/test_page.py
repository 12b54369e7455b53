"""The page's parts, and what the stage refuses to write."""

import base64
import gzip
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from codegrid.engine.errors import InputError
from prior.exploring import graphs, runtime
from prior.exploring.document import build_page, check_written_size, to_inline_json, write_page
from prior.exploring.graphs import (
    Examples,
    make_decoder,
    make_encoder,
    make_prior,
    number_prior_labels,
    trace_tokenizer,
)
from prior.exploring.manifest import describe_page
from prior.exploring.parts import PageParts
from prior.exploring.runtime import BINARY, SCRIPT, load_runtime
from prior.exploring.subject import Subject, check_page_size, open_subject
from prior.exploring.survey import CodeSurvey, survey_codes
from prior.export.programs import ONNXPrior
from prior.load import load_prior
from tests.helpers.commands import Command, lightning_warnings, read_mistake
from tests.helpers.configs import compose_config
from tests.helpers.exports import needs_onnx
from tests.helpers.runs import SMALL_PRIOR, save_prior_run, save_tokenizer_run
from tests.helpers.shared import share_folder
from vqgan.export.onnx import ONNXExporter, ONNXGraph
from vqgan.tokenizer import Tokenizer

pytestmark = [
    lightning_warnings,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

FEW = ["data.n_train=32", "data.n_val=12", "data.cache=ram"]


def open_run(run: Path) -> Subject:
    config = compose_config("stage=explore", f"ckpt={run}")
    return open_subject(config.ckpt, config.decoder, config.data)


def survey(subject: Subject, **sizes: int) -> CodeSurvey:
    wanted = {"pictures": 3, "counted": 10, "shown": 5, "batch_size": 4} | sizes
    return survey_codes(subject.tokenizer, subject.images, **wanted, device=torch.device("cpu"))


def describe(run: Path, **sizes: int) -> tuple[dict[str, Any], PageParts, CodeSurvey]:
    """The manifest of a page with a server, which needs no networks."""
    subject = open_run(run)
    surveyed = survey(subject, **sizes)
    return *describe_page(subject, surveyed, None, None), surveyed


def read_array(array: dict[str, Any], parts: PageParts) -> np.ndarray:
    """As a browser reads it."""
    return np.frombuffer(parts.contents[array["part"]], f"<{np.dtype(array['type']).str[1:]}").reshape(array["shape"])  # fmt: skip


def read_cells(sprite: dict[str, Any], parts: PageParts) -> np.ndarray:
    """The pictures (n, h, w, ...) of a sprite, row by row."""
    sheet = np.asarray(Image.open(io.BytesIO(parts.contents[sprite["part"]])))
    (h, w), columns = sprite["cell"], sprite["columns"]
    cells = [divmod(i, columns) for i in range(sprite["n"])]
    return np.stack([sheet[y * h : y * h + h, x * w : x * w + w] for y, x in cells])


@pytest.fixture(scope="module")
def tokenizer_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer_run(folder, *FEW)
    return folder


def test_codes_pictures_and_use_are_those_of_the_validation_images(tokenizer_run: Path) -> None:
    manifest, parts, surveyed = describe(tokenizer_run)
    subject = open_run(tokenizer_run)
    tokenizer, images = subject.tokenizer, subject.images
    x = images.preprocess(images.take_evenly("val", 10)[0])
    with torch.no_grad():
        codes = tokenizer.indices(x)
    [table] = manifest["codebooks"]
    use = read_array(table["use"], parts)
    assert use.tolist() == codes.flatten().bincount(minlength=16).tolist()
    assert table["dead"] == (use == 0).sum()
    p = use[use > 0] / use.sum()
    assert table["perplexity"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), abs=0.01)
    pictures = images.preprocess(images.take_evenly("val", 3)[0])
    shown = tokenizer.rules.to_picture(pictures).permute(0, 2, 3, 1).numpy()
    assert (read_cells(manifest["pictures"]["sprite"], parts) == shown).all()
    with torch.no_grad():
        own = tokenizer.indices(pictures)
    assert (read_array(manifest["pictures"]["codes"], parts) == own.numpy()).all()
    chosen = [0, 2, 4, 6, 9]
    assert (read_array(manifest["validation"]["codes"], parts) == codes[chosen].numpy()).all()
    thumbnails = read_cells(manifest["validation"]["sprite"], parts).astype(int)
    originals = tokenizer.rules.to_picture(x[chosen]).permute(0, 2, 3, 1).numpy()
    distances = abs(thumbnails[:, None] - originals[None]).mean((2, 3, 4))  # WebP loses something
    assert distances.argmin(1).tolist() == list(range(5))
    sizes = {name: manifest["validation"][name] for name in ("n", "counted", "total")}
    assert sizes == {"n": 5, "counted": 10, "total": 12}
    assert surveyed.total == 12


def test_pictures_of_data_without_classes_are_numbered(tokenizer_run: Path) -> None:
    subject = open_run(tokenizer_run)
    surveyed = survey(subject)
    assert describe_page(subject, surveyed, None, None)[0]["pictures"]["names"] == surveyed.names
    nameless = replace(surveyed, names=None)
    manifest, _ = describe_page(subject, nameless, None, None)
    assert manifest["pictures"]["names"] == ["picture 1", "picture 2", "picture 3"]


@pytest.mark.parametrize(
    ("words", "layout", "shape", "tables", "table_of"),
    [
        (["quantizer=residual"], "grid", [4, 4, 4], 4, [0, 1, 2, 3, 0, 1]),
        (["quantizer=multiscale"], "scales", [1, 30], 1, [0, 0, 0]),
        (["quantizer=multiscale", "quantizer.shared=false"], "scales", [1, 30], 4, [0, 1, 1, 1, 1, 2]),
        (["model=vit", "model.tokens=8", "model.width=16", "model.depth=1", "model.heads=2"], "row", [1, 8], 1, [0, 0]),
    ],
    ids=["codebooks", "scales", "scales-apart", "sequence"],
)  # fmt: skip
def test_every_arrangement_of_codes_is_described(
    words: list[str],
    layout: str,
    shape: list[int],
    tables: int,
    table_of: list[int],
    tmp_path: Path,
) -> None:
    save_tokenizer_run(tmp_path, *FEW, *words)
    manifest, parts, surveyed = describe(tmp_path, counted=6)
    codes = manifest["codes"]
    assert (codes["layout"], codes["shape"], codes["tables"]) == (layout, shape, tables)
    assert codes["table_of"][: len(table_of)] == table_of
    assert len(codes["table_of"]) == np.prod(shape)
    flat = surveyed.codes.flatten(1).numpy()
    for number, table in enumerate(manifest["codebooks"]):
        of_table = [t for t, own in enumerate(codes["table_of"]) if own == number]
        expected = np.bincount(flat[:, of_table].ravel(), minlength=16)
        assert read_array(table["use"], parts).tolist() == expected.tolist()
        assert table["patches"]["n"] == 16
    if layout == "scales":
        assert codes["scales"] == [[1, 1], [2, 2], [3, 3], [4, 4]]


def test_a_continuous_tokenizer_is_refused_in_a_sentence(tmp_path: Path) -> None:
    save_tokenizer_run(tmp_path, "quantizer=kl")
    with pytest.raises(InputError, match="is continuous and has no codes to explore"):
        open_run(tmp_path)


def test_a_model_that_pictures_cannot_enter_says_so(tmp_path: Path, photos: Path) -> None:
    words = ["data=folder", f"data.root={photos}", "data.n_val=4", "data.depth=16", "data.number_type=uint16"]  # fmt: skip
    save_tokenizer_run(tmp_path / "run", *words, "data.cache=ram")
    manifest, _, _ = describe(tmp_path / "run", counted=4)
    assert manifest["image"]["accepts"] is False
    assert manifest["image"]["refusal"] in manifest["notes"]
    assert manifest["encoder"] is None


def test_a_prior_of_counts_draws_behind_a_server_and_not_in_a_page(tmp_path: Path) -> None:
    save_prior_run(tmp_path, "prior=bigram")
    subject = open_run(tmp_path)
    refusal = subject.refuse_prior(is_served=False)
    assert refusal is not None
    assert "Bigram, has no network" in refusal
    manifest, _, _ = describe(tmp_path)
    assert manifest["notes"] == []
    assert (manifest["prior"]["name"], manifest["prior"]["kind"]) == ("bigram", "grid")
    weights = sum(p.numel() for p in subject.tokenizer.parameters())
    assert subject.prior is not None
    subject.prior.model.extra = torch.nn.Parameter(torch.zeros(10**6))
    assert weights < 10**6
    check_page_size(subject, 5)  # the page would not have the prior's weights


def test_a_prior_is_described_as_its_sampler_needs_it(tmp_path: Path) -> None:
    save_prior_run(tmp_path, "prior=maskgit", *SMALL_PRIOR, classes=["cat", "dog"])
    manifest, _, _ = describe(tmp_path)
    about = manifest["prior"]
    assert about["classes"] == ["cat", "dog"]
    expected = ("masked", True, False, "cosine", 12, "confidence", 16)
    names = ("kind", "reads_after", "is_exact", "schedule", "steps", "own_order", "T")
    assert tuple(about[name] for name in names) == expected
    assert manifest["server"] == "/api"


def test_a_page_that_is_too_large_is_refused_before_anything_is_encoded(
    tokenizer_run: Path,
) -> None:
    subject = open_run(tokenizer_run)
    check_page_size(subject, 100)
    with pytest.raises(InputError, match=r"about 5 megabytes, and max_megabytes=4 are allowed"):
        check_page_size(subject, 4)


def test_a_page_whose_pictures_make_it_too_large_is_not_written() -> None:
    check_written_size(bytes(10**6), 1)
    with pytest.raises(InputError, match=r"has 2 megabytes, and max_megabytes=1 are allowed"):
        check_written_size(bytes(10**6 + 1), 1)


def test_a_name_cannot_end_the_element_that_it_lies_in(tokenizer_run: Path) -> None:
    title = '</script><script>alert("x")</script><!--'
    assert json.loads(to_inline_json({"title": title})) == {"title": title}
    manifest, parts, _ = describe(tokenizer_run)
    page = build_page({**manifest, "title": title}, parts.contents)
    assert "alert(" not in page.replace("\\u003cscript>alert(", "").replace(
        "&lt;script&gt;alert(", ""
    )
    [text] = re.findall(r'id="manifest">(.*?)</script>', page, re.DOTALL)
    assert json.loads(text)["title"] == title


def test_all_parts_are_in_the_page_and_whole(tokenizer_run: Path) -> None:
    manifest, parts, _ = describe(tokenizer_run)
    parts.add("odd", bytes(range(256)))
    page = build_page(manifest, parts.contents)
    assert read_parts(page) == parts.contents
    assert "http://" not in page.replace("http://www.w3.org/", "")


def read_parts(page: str) -> dict[str, bytes]:
    """The parts of a page, as its script reads them."""
    elements = re.findall(r'id="part-([\w-]+)"( data-gzip)?>(.*?)</script>', page, re.DOTALL)
    raw = {name: (base64.b64decode(text), bool(packed)) for name, packed, text in elements}
    return {name: gzip.decompress(part) if packed else part for name, (part, packed) in raw.items()}


def test_a_disk_that_refuses_the_page_leaves_no_piece_of_it(tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(InputError, match=r"can't write .*page.html"):
        write_page(tmp_path / "page.html", b"x")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_a_network_of_the_users_own_that_cannot_be_traced_is_named(
    tokenizer_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = open_run(tokenizer_run).tokenizer

    def refuse(self: ONNXExporter, tokenizer: Tokenizer) -> dict[str, bytes]:
        raise RuntimeError("data-dependent control flow")

    monkeypatch.setattr(ONNXExporter, "encode_files", refuse)
    with pytest.raises(RuntimeError):
        trace_tokenizer(tokenizer)
    tokenizer.decoder.__class__ = type("Mine", (type(tokenizer.decoder),), {"__module__": "mine"})
    with pytest.raises(
        InputError, match=r"Mine can't be traced by torch.export .*; add serve=true"
    ):
        trace_tokenizer(tokenizer)


# onnxruntime-web


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two files that count as those of onnxruntime-web."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / SCRIPT).write_text("export const x = 1;")
    (folder / BINARY).write_bytes(b"\0asm")
    digests = {
        name: runtime.hash_content((folder / name).read_bytes()) for name in (SCRIPT, BINARY)
    }
    monkeypatch.setattr(runtime, "SHA256", digests)
    return folder


def fake_npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program npm on the PATH; returns the file that counts its calls."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    program = bin_folder / "npm"
    program.write_text(f"#!/bin/sh\necho called >> {folder}/calls\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:/usr/bin:/bin")
    return folder / "calls"


def test_a_folder_of_the_user_is_checked(files: Path) -> None:
    assert load_runtime(str(files), "nowhere").binary == b"\0asm"
    (files / BINARY).write_bytes(b"\0asm of another version")
    with pytest.raises(InputError, match=r"SHA-256 differs"):
        load_runtime(str(files), "nowhere")
    (files / BINARY).unlink()
    with pytest.raises(InputError, match=rf"runtime={files} has no {re.escape(BINARY)}"):
        load_runtime(str(files), "nowhere")


def test_npm_is_asked_once(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = f"mkdir -p package/dist && cp {files}/* package/dist && tar czf onnxruntime-web.tgz package && rm -r package"
    calls = fake_npm(tmp_path, pack, monkeypatch)
    first = load_runtime(None, tmp_path / "cache")
    assert load_runtime(None, tmp_path / "cache") == first
    assert calls.read_text().split() == ["called"]
    cached = [file for file in (tmp_path / "cache").rglob("*") if file.suffix in (".mjs", ".wasm")]
    assert sorted(file.name for file in cached) == sorted([SCRIPT, BINARY])


def test_without_a_network_one_sentence_says_the_ways_out(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_npm(tmp_path, "echo 'npm error code ENOTFOUND' >&2; exit 1", monkeypatch)
    with pytest.raises(InputError) as raised:
        load_runtime(None, tmp_path / "cache")
    sentence = str(raised.value)
    assert "npm could not download onnxruntime-web@1.30.0 (npm error code ENOTFOUND)" in sentence
    assert "runtime=<folder>" in sentence
    assert not [*(tmp_path / "cache").glob("onnxruntime-web-*/*")]


def test_another_file_from_npm_is_not_kept(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = f"mkdir -p package/dist && cp {files}/* package/dist && echo x >> package/dist/{SCRIPT} && tar czf o.tgz package"
    fake_npm(tmp_path, pack, monkeypatch)
    with pytest.raises(InputError, match="SHA-256 differs"):
        load_runtime(None, tmp_path / "cache")
    assert not [*(tmp_path / "cache").glob("onnxruntime-web-*/*")]


def test_without_npm_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "codegrid\[explore\]"'):
        load_runtime(None, tmp_path / "cache")


# The networks, and the whole command


@pytest.fixture(scope="module")
def prior_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prior")
    words = ["data.n_val=12", "model.encoder.depth=1", "model.decoder.depth=1"]
    save_prior_run(folder, *SMALL_PRIOR, classes=3, tokenizer_words=words)
    return folder


@pytest.fixture(scope="module")
def files_of(prior_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The ONNX files of the run's tokenizer and of its prior."""

    def fill(folder: Path) -> None:
        trained = load_prior(prior_run)
        files = ONNXExporter().encode_files(trained.tokenizer) | ONNXPrior().encode_files(trained)
        for name, content in files.items():
            (folder / name).write_bytes(content)

    folder = share_folder(tmp_path_factory, "networks of a page", fill)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@needs_onnx
@pytest.mark.slow
def test_networks_that_are_not_the_models_are_refused(
    prior_run: Path, files_of: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = open_run(prior_run)
    surveyed = survey(subject)
    examples = Examples.compute(subject.tokenizer, surveyed.x)
    decoder, difference = make_decoder(files_of["decoder.onnx"], examples)
    assert decoder.precision == "float16"
    assert 0 < difference < 1 / 255
    pixel = examples.decoded.clone()
    pixel[1, 0, 0, 0] += 2.2 / 127.5 * (1 if pixel[1, 0, 0, 0] < 0 else -1)
    with pytest.raises(
        InputError, match=r"other pictures than the tokenizer: pixels differ by 2\.\d+ of 255"
    ):
        make_decoder(files_of["decoder.onnx"], Examples(examples.images, examples.codes, pixel))
    _, equal = make_encoder(files_of["encoder.onnx"], examples)
    assert equal == 1
    wrong = examples.codes.clone()
    wrong[0, 0] = (wrong[0, 0] + 1) % 16
    with pytest.raises(InputError, match=r"only 91\.7% are equal, where 99% must be"):
        make_encoder(files_of["encoder.onnx"], Examples(examples.images, wrong, examples.decoded))
    with pytest.raises(InputError, match="pixels differ by nan of 255"):
        lost = examples.decoded.index_fill(0, torch.tensor([len(examples.decoded) - 1]), torch.nan)
        make_decoder(files_of["decoder.onnx"], Examples(examples.images, examples.codes, lost))
    assert subject.prior is not None
    trained = subject.prior
    labels = number_prior_labels(trained, surveyed.labels % 3)
    written = {"prior.onnx": files_of["prior.onnx"]}
    monkeypatch.setattr(ONNXPrior, "encode_files", lambda self, trained: written)
    _, own, nats = make_prior(trained, surveyed.codes, labels)
    assert number_prior_labels(trained, torch.tensor([2, 5])).tolist() == [-1, -1]  # type: ignore[union-attr]
    flat = surveyed.codes.flatten(1)
    with torch.no_grad():
        logits = trained.model(flat, labels)
    expected = -logits.log_softmax(-1).gather(2, flat[..., None]).mean()
    assert own == pytest.approx(float(expected), abs=1e-5)
    assert nats == pytest.approx(own, abs=2e-3)
    right = graphs.list_own_nats(trained.model, surveyed.codes, labels)
    assert float(right.mean()) == own
    cancelling = torch.tensor([0.03, -0.03]).repeat(80)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="those of a code by 0.03"):
        patch.setattr(graphs, "list_own_nats", lambda *_: right + cancelling)
        make_prior(trained, surveyed.codes, labels)
    with torch.no_grad():
        next(iter(trained.model.head.parameters())).neg_()
    with pytest.raises(InputError, match="another prior than ckpt: its nats per token differ by"):
        make_prior(trained, surveyed.codes, labels)


@needs_onnx
@pytest.mark.slow
def test_weights_stay_in_float32_where_half_precision_would_show(
    prior_run: Path, files_of: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = open_run(prior_run)
    examples = Examples.compute(subject.tokenizer, survey(subject).x)
    monkeypatch.setattr(graphs, "MARGIN", 1e-9)
    graph, difference = make_decoder(files_of["decoder.onnx"], examples)
    assert graph.precision == "float32"
    assert graph.content == files_of["decoder.onnx"]
    assert difference < 1e-6


@needs_onnx
@pytest.mark.slow
def test_the_command_writes_a_page_whose_networks_are_the_models_and_overwrites_nothing(
    prior_run: Path,
    command: Command,
    tmp_path: Path,
    files: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["stage=explore", f"ckpt={prior_run}", f"runtime={files}", "pictures=2", "accelerator=cpu", "name=mine"]  # fmt: skip
    assert command(*words) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    page = tmp_path / result["page"]
    assert page.stat().st_size == result["bytes"]
    text = page.read_text()
    manifest = json.loads(re.findall(r'id="manifest">(.*?)</script>', text, re.DOTALL)[0])
    parts = read_parts(text)
    assert manifest["checks"] == result["checks"]
    trained = load_prior(prior_run)
    codes = np.frombuffer(parts["picture-codes"], np.uint8).reshape(2, 4, 4).astype(np.int64)
    graph = ONNXGraph(parts[manifest["decoder"]["part"]])
    [pictures] = graph({"indices": torch.from_numpy(codes)})
    with torch.no_grad():
        expected = trained.tokenizer.decode_indices(torch.from_numpy(codes)).clamp(-1, 1)
    assert float((pictures - expected).abs().max()) / 2 <= 1 / 255
    sheet = np.asarray(Image.open(io.BytesIO(parts["pictures"]))).astype(np.float32) / 127.5 - 1
    images = sheet.reshape(-1, 16, 2, 16, 3).transpose(0, 2, 4, 1, 3).reshape(2, 3, 16, 16)
    encoder = ONNXGraph(parts[manifest["encoder"]["part"]])
    [indices] = encoder({"images": torch.from_numpy(images.copy())})
    assert (indices.numpy() == codes).mean() > 0.99
    inputs = {
        "codes": torch.zeros(1, dtype=torch.int64),
        "position": torch.tensor(0),
        "cache": torch.zeros(manifest["prior"]["cache"]),
        "labels": torch.tensor([1]),
    }
    logits, _ = ONNXGraph(parts[manifest["prior"]["part"]])(inputs)
    with torch.no_grad():
        first = trained.model(torch.zeros(1, 16, dtype=torch.int64), torch.tensor([1]))[:, 0]
    assert torch.allclose(logits.log_softmax(-1), first.log_softmax(-1), atol=0.02)
    before = page.read_bytes()
    assert command(*words, f"run_dir={page.parent}") == 2
    assert "is not empty" in read_mistake(capsys)
    assert page.read_bytes() == before
