"""Files of codes under each prior: the same codes, whatever the machine does, or a sentence."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch

from codegrid.engine.errors import InputError
from prior.coding.codec import Codec
from prior.coding.file import CodedFile
from prior.decoding.generate import sample
from prior.decoding.sampling import Sampler
from prior.models.base import PriorModel
from prior.models.gpt import GPT
from prior.models.unigram import Unigram
from tests.helpers.priors import (
    CONDITIONS,
    PRIORS,
    build_prior,
    documented_prior,
    make_conditioned,
    make_conditions,
    make_prior,
    randomised,
)
from vqgan.tokenizer import Tokenizer

K = 5
EXACT = [name for name, case in PRIORS.items() if case.kind.exact]
BOUNDED = [name for name, case in PRIORS.items() if not case.kind.exact]


class Codes:
    """A tokenizer as far as a codec knows it."""

    def fingerprint_codes(self) -> str:
        return "0123456789ab"


def make_codec(model: PriorModel) -> Codec:
    return Codec(model, cast(Tokenizer, Codes()))


def draw_codes(codec: Codec, n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(codec.model.K, (n, *codec.code_shape), generator=generator)


def compress(codec: Codec, codes: torch.Tensor, **settings: Any) -> list[CodedFile]:
    """Files as another program gets them."""
    return [CodedFile.read(image.file.write()) for image in codec.compress(codes, **settings)]


def decompress(codec: Codec, files: list[CodedFile]) -> torch.Tensor:
    read = codec.decompress(files)
    assert not any(codes is None for codes in read)
    return torch.stack([codes for codes in read if codes is not None])


@contextmanager
def machine(threads: int = 1, onednn: bool = True, low: bool = False) -> Iterator[None]:
    """Inside, torch computes with these settings; `low`: in bfloat16 where a precision setting decides."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.backends.mkldnn.set_flags(onednn)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            yield
    finally:
        torch.set_num_threads(before)
        torch.backends.mkldnn.set_flags(True)


@pytest.mark.parametrize("name", EXACT)
def test_codes_come_back_to_the_bit_whatever_the_batch_threads_and_precision(name: str) -> None:
    model = make_prior(name, K=K)
    codec = make_codec(model)
    codes = draw_codes(codec, 16)
    files = compress(codec, codes)
    assert torch.equal(decompress(codec, files), codes)
    with machine(threads=2, onednn=False, low=True):
        other = make_codec(model)
        alone = [compress(other, row[None])[0] for row in codes[:2]]
        assert torch.equal(decompress(other, files), codes)
    assert torch.equal(decompress(codec, alone), codes[:2])
    assert torch.equal(decompress(codec, files[3:4]), codes[3:4])


@pytest.mark.parametrize("name", EXACT)
def test_a_prior_in_float64_is_the_same_function(name: str) -> None:
    model = make_prior(name, K=K)
    codes = torch.randint(K, (4, model.L))
    with torch.no_grad():
        expected = model.judge(codes, None).logits
        again = make_codec(model).model.judge(codes, None).logits
    assert again.dtype == torch.float64
    torch.testing.assert_close(again.float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EXACT)
def test_a_pass_part_by_part_differs_by_the_rounding_of_float64(name: str) -> None:
    codec = make_codec(make_prior(name, K=K))
    images = codec.compress(draw_codes(codec, 4))
    assert max(image.noise or 0 for image in images) < 1e-12
    assert min(image.margin for image in images) > 1e-6
    assert all(image.is_certain for image in images)


@pytest.mark.parametrize("name", ["gpt", "var", "bigram"])
def test_bytes_are_those_of_the_claimed_nats(name: str) -> None:
    model = make_prior(name, K=K, grid=(4, 6))
    codec = make_codec(model)
    drawn = sample(model, Sampler.unmodified(), 40, seed=0).view(-1, *codec.code_shape)
    images = codec.compress(drawn, verify=False)
    claimed = sum(image.nats for image in images) / math.log(2) / 8
    measured = sum(len(image.file.payload) for image in images)
    assert abs(sum(image.bits for image in images) / 8 - claimed) < 0.001 * claimed
    assert abs(measured - claimed) < 0.001 * claimed + 0.8 * len(images), "an end is half a byte"
    with torch.no_grad():
        logp = model.judge(drawn.flatten(1), None).logits.log_softmax(-1)
    nats = -logp.gather(2, drawn.flatten(1)[..., None]).sum((1, 2))
    torch.testing.assert_close(
        torch.tensor([image.nats for image in images]), nats, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("name", BOUNDED)
def test_a_prior_with_a_bound_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"has no likelihood that is exact .* use a prior"):
        make_codec(make_prior(name))


def disturb(codec: Codec, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the logits of reading differ by up to `size`, as on another machine."""
    original, generator = codec.model.predict_in_turn, torch.Generator().manual_seed(0)

    def predict_in_turn(n: int, labels: torch.Tensor | None) -> Iterator[torch.Tensor]:
        predictions = original(n, labels)
        logits = next(predictions)
        while True:
            noise = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
            codes = yield logits + size * (2 * noise - 1)
            try:
                logits = predictions.send(codes)
            except StopIteration:
                return

    monkeypatch.setattr(codec.model, "predict_in_turn", predict_in_turn)


def test_a_machine_whose_sums_differ_in_the_last_bits_reads_the_same_codes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codec = make_codec(make_prior("gpt", K=200))
    codes = draw_codes(codec, 16)
    files = compress(codec, codes)
    disturb(codec, 1e-9, monkeypatch)
    assert torch.equal(decompress(codec, files), codes)


def test_a_machine_with_other_logits_reads_no_wrong_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = make_codec(make_prior("gpt", K=200))
    files = compress(codec, draw_codes(codec, 4))
    disturb(codec, 0.1, monkeypatch)
    assert codec.decompress(files) == [None] * 4


def test_a_prior_that_rounds_to_float32_is_refused_when_it_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codec = make_codec(make_prior("gpt", K=200))
    disturb(codec, 1e-6, monkeypatch)
    with pytest.raises(InputError, match=r"GPT computes other logits code by code .* in the type"):
        codec.compress(draw_codes(codec, 4))


def test_the_documented_prior_writes_files() -> None:
    codec = make_codec(randomised(build_prior(documented_prior(), K=K)).eval())
    codes = draw_codes(codec, 2)
    assert torch.equal(decompress(codec, compress(codec, codes)), codes)


class Rounding(Unigram):
    """Rounds to float32 on the way to its logits, in all passes alike."""

    def rows(self, context: torch.Tensor) -> torch.Tensor:
        return super().rows(context).float().to(self.unigram.dtype)


@pytest.mark.parametrize("verify", [True, False])
def test_a_prior_whose_passes_all_round_to_float32_is_refused_too(verify: bool) -> None:
    """On this machine they agree to the bit; on another one they would not."""
    codec = make_codec(Rounding(torch.randn(1, K, 4), (2, 3)))
    with pytest.raises(InputError, match=r"Rounding rounds to torch.float32 .* at_least_float32"):
        codec.compress(draw_codes(codec, 1), verify=verify)


def refuse_to_compile(*_: Any) -> Any:
    raise AssertionError("compiled")


def test_a_compiled_prior_is_coded_as_before() -> None:
    model = make_prior("gpt", K=K)
    codec = make_codec(model)
    codes = draw_codes(codec, 2)
    files = compress(codec, codes)
    for part in (model, *cast(GPT, model).blocks):
        part.compile(backend=refuse_to_compile)
    assert torch.equal(decompress(make_codec(model), files), codes)
    assert [file.payload for file in compress(make_codec(model), codes)] == [
        f.payload for f in files
    ]


def test_no_damage_of_one_bit_gives_wrong_codes() -> None:
    codec = make_codec(make_prior("bigram", K=K, classes=0))
    [codes] = draw_codes(codec, 1)
    content = codec.compress(codes[None])[0].file.write()
    readable = 0
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            [read] = codec.decompress([CodedFile.read(bytes(damaged))])
        except InputError:
            continue
        if read is not None:
            assert torch.equal(read, codes)
            readable += 1
    assert readable <= 8, "some bits of the last byte do not matter"


def test_a_damaged_file_spoils_no_other_of_its_batch() -> None:
    codec = make_codec(make_prior("rq", K=K))
    codes = draw_codes(codec, 3)
    files = compress(codec, codes)
    first, _, last = codec.decompress(
        [files[0], CodedFile(**{**vars(files[1]), "payload": b"?"}), files[2]]
    )
    assert first is not None
    assert last is not None
    assert torch.equal(torch.stack([first, last]), codes[[0, 2]])


@pytest.mark.parametrize(
    ("part", "sentence"),
    [("prior", "under the prior f00000000000"), ("tokenizer", "of the tokenizer f00000000000")],
)
def test_files_of_others_are_refused(part: str, sentence: str) -> None:
    codec = make_codec(make_prior("unigram", K=K))
    [file] = compress(codec, draw_codes(codec, 1))
    other = CodedFile(**{**vars(file), part: "f00000000000"})
    with pytest.raises(InputError, match=sentence):
        codec.decompress([other])


def test_a_prior_that_learned_on_is_another() -> None:
    model = make_prior("gpt", K=K)
    codec = make_codec(model)
    files = compress(codec, draw_codes(codec, 1))
    with torch.no_grad():
        next(iter(model.parameters())).mul_(1.001)
    with pytest.raises(InputError, match="was written under the prior"):
        make_codec(model).decompress(files)


@pytest.mark.parametrize("name", ["gpt", "lstm", "pixelcnn", "rq"])
@pytest.mark.parametrize("kind", ["classes", *CONDITIONS])
def test_what_an_image_is_of_is_in_its_file(name: str, kind: str) -> None:
    if kind == "classes":
        model = make_prior(name, K=K, classes=3)
        labels = torch.tensor([0, 2, -1])
    else:
        model = make_conditioned(name, kind, K=K)
        labels = make_conditions(model, 3)
        labels[2] = cast(torch.Tensor, model.blank_labels(1))[0]
    codec = make_codec(model)
    codes = draw_codes(codec, 3)
    files = compress(codec, codes, labels=labels)
    assert torch.equal(decompress(codec, files), codes)
    blank = compress(codec, codes)
    assert [file.payload for file in files[:2]] != [file.payload for file in blank[:2]]
    assert files[2].payload == blank[2].payload


@pytest.mark.parametrize("kind", ["classes", *CONDITIONS])
def test_a_damaged_label_gives_no_wrong_codes(kind: str) -> None:
    model = (
        make_prior("gpt", K=K, classes=3)
        if kind == "classes"
        else make_conditioned("gpt", kind, K=K)
    )
    codec = make_codec(model)
    [codes] = draw_codes(codec, 1)
    label = torch.tensor([2]) if kind == "classes" else make_conditions(model, 1)
    [file] = compress(codec, codes[None], labels=label)
    for value in (b"\x00", b"\x03", b"\x7f", b"\xff"):
        changed = file.label[:-1] + value
        if changed == file.label:
            continue
        try:
            [read] = codec.decompress([CodedFile(**{**vars(file), "label": changed})])
        except InputError:
            continue
        assert read is None


def test_a_label_of_another_kind_is_refused() -> None:
    [codec, other] = [make_codec(make_prior("gpt", K=K, classes=n)) for n in (3, 0)]
    [file] = compress(codec, draw_codes(codec, 1), labels=torch.tensor([1]))
    with pytest.raises(InputError, match="has a label that this prior does not take"):
        other.check(CodedFile(**{**vars(file), "prior": other.hashes[1]}))
