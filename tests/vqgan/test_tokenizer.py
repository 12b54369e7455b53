"""Tokenizers: shapes, sizes, and the start from classical vector quantization."""

import pytest
import torch

from codegrid.engine.errors import InputError
from tests.helpers.parts import make
from tests.helpers.stage1 import make_tokenizer
from vqgan.networks.blocks import ResBlock
from vqgan.networks.decoder import Decoder
from vqgan.networks.encoder import Encoder, plan_depths, plan_downsampling, plan_widths
from vqgan.networks.patches import Patches, to_patches
from vqgan.quantizers.search import nearest
from vqgan.tokenizer import choose_start_batch


@pytest.mark.parametrize(
    ("size", "grid", "stem", "steps"),
    [(64, 8, 4, [4, 2]), (64, 4, 4, [4, 2, 2]), (64, 16, 4, [4]), (64, 32, 4, [2]), (64, 64, 4, [1]), (64, 1, 4, [4, 2, 2, 2, 2]),
     (64, 8, 1, [1, 2, 2, 2]), (96, 8, 4, [4, 3]), (65, 13, 4, [1, 5])],
)  # fmt: skip
def test_the_depth_follows_from_the_image_size_and_the_grid(
    size: int, grid: int, stem: int, steps: list[int]
) -> None:
    assert plan_downsampling(size, grid, stem) == steps


def test_widths_double_up_to_the_maximum() -> None:
    assert plan_widths(8, [4, 2, 2, 2], max_width_mult=4) == [8, 16, 32, 32]


@pytest.mark.parametrize("depth", [1, [1, 1]])
def test_one_depth_for_all_resolutions_and_a_list_of_it_are_the_same_network(depth: object) -> None:
    for network in (Encoder, Decoder):
        torch.manual_seed(0)
        expected = make(network, 16, 3, 2, width=8, depth=1, stem=4, max_width_mult=4)
        torch.manual_seed(0)
        actual = make(network, 16, 3, 2, width=8, depth=depth, stem=4, max_width_mult=4)
        assert list(actual.state_dict()) == list(expected.state_dict())
        assert all(
            torch.equal(a, b)
            for a, b in zip(actual.parameters(), expected.parameters(), strict=True)
        )


@pytest.mark.parametrize("network", [Encoder, Decoder])
def test_a_list_of_depths_goes_from_the_image_to_the_grid(
    network: type[Encoder] | type[Decoder],
) -> None:
    built = make(network, 16, 3, 2, width=8, depth=[0, 2], stem=4, max_width_mult=4)
    blocks = [layer for layer in built.layers if isinstance(layer, ResBlock)]
    assert [block.conv1.in_channels for block in blocks] == [16, 16]  # the grid's width


def test_a_list_of_depths_that_does_not_fit_the_resolutions_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"\[1, 2\] must have a number for each of the 3 res.*depth=2 for all"
    ):
        plan_depths("model.encoder.depth", [1, 2], 3)
    with pytest.raises(InputError, match=r"depth=-1 must be a whole number of at least 0"):
        plan_depths("model.encoder.depth", [1, -1], 2)


@pytest.mark.parametrize(
    ("size", "images"),
    [((16, 16), 64), ((64, 64), 64), ((128, 128), 16), ((256, 128), 8), ((2048, 512), 1)],
)
def test_a_random_start_takes_the_memory_of_64_images_of_64_pixels(
    size: tuple[int, int], images: int
) -> None:
    assert choose_start_batch(torch.empty(1, 3, *size)) == images


@pytest.mark.parametrize(
    ("start", "size", "grid", "images"),
    [
        ("patches", 16, 4, 2000),
        ("patches", 64, 32, 2000),  # to the bit as ever
        ("patches", 128, 8, 1563),
        ("patches", 128, 32, 256),
        ("patches", 256, 8, 500),
        ("random", 64, 32, 512),
        ("random", 128, 8, 512),
        ("random", 128, 16, 391),
        ("random", 128, 32, 256),
    ],
)
def test_a_start_takes_fewer_images_the_more_pixels_and_codes_they_have(
    start: str, size: int, grid: int, images: int
) -> None:
    assert make_tokenizer(size, grid, start).start_images == images


def test_a_random_start_sees_images_from_all_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqgan.tokenizer.RANDOM_START_IMAGES", 8)
    t, inputs = make_tokenizer(start="random", channels=1), []
    monkeypatch.setattr(
        t, "encode_start", lambda x: inputs.append(x) or torch.randn(40, t.dim, 1, 1)
    )
    x = torch.arange(30.0).view(30, 1, 1, 1).expand(30, 1, 16, 16)
    t.initialise(x)
    assert inputs[0][:, 0, 0, 0].tolist() == [0, 4, 8, 12, 16, 20, 24, 29]
    t.initialise(x[:8])
    assert torch.equal(inputs[1], x[:8])


@pytest.mark.parametrize(("seconds", "announced"), [(0.1, False), (5.0, True)])
def test_a_long_start_says_so(
    seconds: float,
    announced: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ticks = (seconds * n for n in range(100))
    monkeypatch.setattr("vqgan.tokenizer.time.monotonic", lambda: next(ticks))
    z = make_tokenizer(start="random").encode_start(torch.randn(200, 3, 16, 16))
    assert z.shape[:1] + z.shape[2:] == (200, 4, 4)
    sentence = "makes of 200 images, which takes about 11 seconds"
    assert (sentence in capsys.readouterr().err) == announced


@pytest.mark.parametrize(("stem", "last_step"), [(1, 1), (2, 2), (4, 2), (8, 4)])
def test_four_pixels_a_side_are_decoded_in_two_steps(stem: int, last_step: int) -> None:
    decoder = make(Decoder, 48, 3, 2, width=8, stem=stem, max_width_mult=4)
    assert decoder.last.out_channels == 3 * last_step**2
    assert decoder(torch.randn(2, decoder.in_channels, 2, 2)).shape == (2, 3, 48, 48)


@pytest.mark.parametrize("start", ["patches", "random"])
@pytest.mark.parametrize(("size", "grid"), [(16, 4), (16, 1), (16, 16), (20, 4), (18, 3)])
def test_images_become_grids_of_codes_and_back(size: int, grid: int, start: str) -> None:
    t = make_tokenizer(size, grid, start)
    q = t.encode(torch.randn(2, 3, size, size))
    assert q.indices.shape == (2, grid, grid)
    assert t.decode(q.z_q).shape == (2, 3, size, size)
    assert (t.K, t.dim, t.grid, t.f) == (16, 8, (grid, grid), size // grid)


@pytest.mark.parametrize("training", [True, False])
def test_decoding_indices_equals_decoding_z_q(training: bool) -> None:
    t, x = make_tokenizer().train(training), torch.randn(2, 3, 16, 16)
    q = t.encode(x)
    assert torch.equal(t.decode_indices(t.indices(x)), t.decode(q.z_q))


@pytest.mark.parametrize(
    ("size", "grid", "way_out"),
    [(64, 7, "model.grid=8 or data.image_size=63"), (65, 8, "model.grid=5 or data.image_size=64")],
)
def test_a_grid_that_does_not_divide_the_image_is_refused_with_the_way_out(
    size: int, grid: int, way_out: str
) -> None:
    with pytest.raises(
        InputError,
        match=f"data.image_size={size} is not model.grid={grid} times one whole number; use {way_out}",
    ):
        make(Encoder, size, 3, grid, width=64)


@pytest.mark.parametrize("grid", [0, -1, 2.5])
def test_a_grid_below_one_is_refused(grid: int) -> None:
    with pytest.raises(
        InputError, match=f"model.grid={grid} must be at least 1 code a side: one whole number"
    ):
        make(Encoder, 64, 3, grid, width=64)


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(
        InputError, match="model.start=middle must be null or one of patches, random"
    ):
        make_tokenizer(start="middle")


def test_patches_are_cut_row_by_row() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert to_patches(x, 2).tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]


def test_as_many_components_as_pixels_lose_nothing() -> None:
    p, x = Patches(3, 4, 48), torch.randn(8, 3, 16, 16)
    p.initialise(x)
    torch.testing.assert_close(p.decode(p.encode(x)), x, atol=1e-4, rtol=1e-4)


def test_fewer_components_lose_what_principal_component_analysis_loses() -> None:
    p, x = Patches(3, 4, 5), torch.randn(40, 3, 16, 16)
    p.initialise(x)
    rows = to_patches(x, 4)
    values = torch.linalg.svdvals(rows - rows.mean(0))
    lost = (p.decode(p.encode(x)) - x).square().sum()
    torch.testing.assert_close(lost, values[5:].square().sum(), rtol=1e-3, atol=1e-3)


def test_a_start_from_patches_is_classical_vector_quantization() -> None:
    t, x = make_tokenizer(dim=48), torch.randn(40, 3, 16, 16)
    t.initialise(x)
    rows, codes = to_patches(x, 4), to_patches(t.decode_indices(torch.arange(16).view(1, 4, 4)), 4)
    expected = codes[nearest(rows, codes)]
    torch.testing.assert_close(
        to_patches(t.decode(t.encode(x).z_q), 4), expected, atol=1e-3, rtol=1e-3
    )


def test_a_random_start_places_the_codes_among_the_encoder_outputs() -> None:
    t, x = make_tokenizer(start="random"), torch.randn(40, 3, 16, 16)
    before = t.encode(x).terms["commitment"]
    t.initialise(x)
    assert t.encode(x).terms["commitment"] < before / 3
    assert len(t.indices(x).unique()) == 16


def test_grey_images_work() -> None:
    t = make_tokenizer(channels=1)
    t.initialise(torch.randn(8, 1, 16, 16))
    assert t.decode(t.encode(torch.randn(2, 1, 16, 16)).z_q).shape == (2, 1, 16, 16)


def test_the_fingerprint_changes_with_the_weights() -> None:
    t = make_tokenizer()
    before = t.fingerprint()
    assert t.fingerprint() == before
    t.decoder.last.bias.data += 1e-3
    assert t.fingerprint() != before


def test_every_parameter_gets_a_gradient_after_the_first_steps() -> None:
    t = make_tokenizer()
    t.initialise(torch.randn(8, 3, 16, 16))
    optimizer = torch.optim.SGD(t.parameters(), 0.1)
    for _ in range(3):  # zero-initialised branches get gradients one after the other
        x = torch.randn(4, 3, 16, 16)
        q = t.encode(x)
        optimizer.zero_grad()
        ((t.decode(q.z_q) - x).square().mean() + q.loss).backward()
        optimizer.step()
    assert [name for name, p in t.named_parameters() if p.grad is None or not p.grad.any()] == []
