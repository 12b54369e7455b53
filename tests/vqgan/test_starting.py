"""Runs that start with the tokenizer of another run: its weights and architecture, for images of any size and channels."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from codegrid.engine.errors import InputError
from codegrid.engine.sizes import SizeSetting, check_size, write_size
from codegrid.engine.trust import Trust, admit
from tests.helpers.configs import compose_plain
from tests.helpers.runs import save_tokenizer_run
from tests.helpers.stage1 import Noise
from vqgan.architecture import Adoption, adopt_architecture
from vqgan.channels import fold_channels
from vqgan.load import build_tokenizer
from vqgan.networks.encoder import Encoder
from vqgan.starting import ImageStart, ResumedStart, RunStart
from vqgan.tokenizer import Tokenizer

PYRAMID = [
    "model=pyramid",
    "model.width=32",
    "model.z_channels=8",
    "model.grid=4",
    "data.image_size=16",
]
NETWORKS = {"conv": [], "random": ["model.start=random"], "pyramid": PYRAMID}


class PositionEncoder(Encoder):
    """Adds what it has learned of each place of the grid, and forgets to say that it serves one size alone."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.places = nn.Parameter(torch.randn(self.out_channels, *self.grid))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.places


class OneSizeEncoder(PositionEncoder):
    sized_settings = ()


def save_run(folder: Path, network: str = "conv", *words: str) -> tuple[Tokenizer, dict[str, Any]]:
    """The folder of a run whose every weight is off its start, as after a training."""
    if network == "pyramid":
        words = (*PYRAMID, *words)
    elif network == "random":
        words = ("model.start=random", *words)
    return save_tokenizer_run(folder, *words)


def want(
    folder: Path, *words: str, size: SizeSetting = 16, channels: int = 3, grow: bool = False
) -> Adoption:
    """What a command wants that has these words beside init and its images."""
    sides = check_size("size", size, "pixel")
    data = [f"data.image_size={write_size(sides)}", f"data.channels={channels}"]
    config = compose_plain("stage=vqgan", *data, *words)
    keys = [word.split("=")[0].split("@")[0] for word in words]
    groups = {name: config[name] for name in ("model", "quantizer")}
    return Adoption(str(folder), sides, channels, grow, keys, groups)


def begin(wanted: Adoption) -> tuple[Tokenizer, RunStart]:
    """The tokenizer of a run that starts so, with its weights."""
    start = RunStart(wanted)
    tokenizer = build_tokenizer(start.groups["model"], start.groups["quantizer"]).eval()
    start.fill(
        tokenizer, Noise(wanted.image_size, channels=wanted.channels, cache="ram", batch_size=4)
    )
    return tokenizer, start


def refusal(wanted: Adoption) -> str:
    with pytest.raises(InputError) as caught:
        begin(wanted)
    return str(caught.value)


@pytest.fixture(autouse=True)
def own_classes() -> Iterator[None]:
    names = frozenset(f"{__name__}.{kind.__name__}" for kind in (PositionEncoder, OneSizeEncoder))
    with admit(Trust(names)):
        yield


@pytest.mark.parametrize("network", NETWORKS)
def test_a_run_starts_with_the_weights_of_the_other_to_the_bit(
    tmp_path: Path, network: str
) -> None:
    source, config = save_run(tmp_path, network)
    tokenizer, start = begin(want(tmp_path))
    assert tokenizer.fingerprint() == source.fingerprint()
    assert start.groups == {name: config[name] for name in ("model", "quantizer")}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("size", [8, 24, 20])
def test_other_sizes_get_the_grid_of_the_same_f(tmp_path: Path, network: str, size: int) -> None:
    source, _ = save_run(tmp_path, network)
    tokenizer, start = begin(want(tmp_path, size=size))
    assert tokenizer.grid == (size // 4, size // 4)
    assert tokenizer.f == source.f
    assert start.groups["model"]["grid"] == size // 4
    x = torch.randn(2, 3, size, size)
    assert tokenizer.decode_indices(tokenizer.indices(x)).shape == x.shape
    # A network of convolutions alone gives the same codes; attention sees the whole image.
    assert torch.equal(tokenizer.encode(x).z_e, source.encode(x).z_e)


@pytest.mark.parametrize("size", [8, 32])
def test_attention_stays_in_its_levels(tmp_path: Path, size: int) -> None:
    source, _ = save_run(tmp_path, "pyramid", "model.attention=[8,4,5]")
    tokenizer, start = begin(want(tmp_path, size=size))
    others = [10] if size == 32 else []  # 5 was the side of no level, nor is what becomes of it
    assert start.groups["model"]["attention"] == [size // 2, size // 4, *others]
    assert [type(a) for a in tokenizer.encoder.modules()] == [
        type(b) for b in source.encoder.modules()
    ]


@pytest.mark.parametrize("network", NETWORKS)
def test_grey_images_get_the_codes_and_the_mean_picture_of_their_rgb_copies(
    tmp_path: Path, network: str
) -> None:
    source, _ = save_run(tmp_path, network)
    for p in source.parameters():
        p.data += torch.randn_like(p) / 10
    grey, _ = begin(want(tmp_path, channels=1))
    grey.load_state_dict(
        {
            name: fold_channels(value, grey.state_dict()[name].shape, 3, 1)
            for name, value in source.state_dict().items()
        }
    )
    x = torch.randn(2, 1, 16, 16)
    copies = x.expand(-1, 3, -1, -1)
    torch.testing.assert_close(grey.encode(x).z_e, source.encode(copies).z_e, atol=1e-4, rtol=1e-4)
    indices = source.indices(copies)
    picture = source.decode_indices(indices).mean(1, keepdim=True)
    torch.testing.assert_close(grey.decode_indices(indices), picture, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_rectangles_of_bands_get_the_codes_of_equal_channels(tmp_path: Path, network: str) -> None:
    source, _ = save_run(tmp_path, network)
    tokenizer, start = begin(want(tmp_path, channels=5, size=(8, 24)))
    assert tokenizer.grid == (2, 6)
    assert start.groups["model"]["grid"] == [2, 6]
    grey = torch.rand(2, 1, 8, 24) * 2 - 1
    z_e = tokenizer.encode(grey.expand(-1, 5, -1, -1)).z_e
    expected = source.encode(grey.expand(-1, 3, -1, -1)).z_e
    torch.testing.assert_close(z_e, expected, atol=1e-4, rtol=1e-4)
    indices = tokenizer.indices(grey.expand(-1, 5, -1, -1))
    picture = source.decode_indices(indices).mean(1, keepdim=True).expand(-1, 5, -1, -1)
    torch.testing.assert_close(tokenizer.decode_indices(indices), picture, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_rgb_images_are_read_as_grey_and_written_alike(tmp_path: Path, network: str) -> None:
    source, _ = save_run(tmp_path, network, "data.channels=1")
    rgb, _ = begin(want(tmp_path, channels=3))
    x = torch.randn(2, 3, 16, 16)
    grey = x.mean(1, keepdim=True)
    torch.testing.assert_close(rgb.encode(x).z_e, source.encode(grey).z_e, atol=1e-5, rtol=1e-4)
    indices = source.indices(grey)
    picture = source.decode_indices(indices).expand(-1, 3, -1, -1)
    torch.testing.assert_close(rgb.decode_indices(indices), picture, atol=1e-5, rtol=1e-4)


def test_new_layers_and_a_grown_codebook_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(tmp_path)
    begin(want(tmp_path, "quantizer.K=24", channels=1, size=24, grow=True))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith(": Encoder with 16 codes, 24 pixels to a grid of 6x6 (f=4)")
    assert "has 3 channels and the images 1: the first and the last layer are new" in lines[1]
    assert lines[2].endswith("grows from 16 to 24 codes, which split the crowded ones")


@torch.no_grad()
@pytest.mark.parametrize("shared", ["true", "false"])
def test_scales_on_other_sizes_are_those_in_which_the_source_encodes_them(
    tmp_path: Path, shared: str
) -> None:
    words = ["quantizer=multiscale", f"quantizer.shared={shared}", "quantizer.convolutions=2"]
    source, _ = save_run(tmp_path, "conv", *words)
    tokenizer, _ = begin(want(tmp_path, *words, "quantizer.K=16", "quantizer.dim=8", size=24))
    x = torch.rand(2, 3, 24, 24) * 2 - 1
    codes = source.indices(x)
    assert torch.equal(tokenizer.indices(x), codes)
    assert torch.equal(tokenizer.decode_indices(codes), source.decode_indices(codes, grid=(6, 6)))


def test_a_codebook_that_grows_keeps_everything_else(tmp_path: Path) -> None:
    source, _ = save_run(tmp_path)
    tokenizer, start = begin(want(tmp_path, "quantizer.K=24", grow=True))
    assert (tokenizer.K, start.groups["quantizer"]["K"]) == (24, 24)
    state = tokenizer.state_dict()
    assert torch.equal(state["quantizer.codebook"][:16], source.quantizer.codebook)  # type: ignore[arg-type]
    for name, value in source.state_dict().items():
        if not name.startswith("quantizer."):
            assert torch.equal(state[name], value), name


def test_inner_codebooks_grow_with_the_config(tmp_path: Path) -> None:
    save_run(tmp_path, "conv", "quantizer=residual", "quantizer.num_codebooks=2")
    tokenizer, start = begin(
        want(
            tmp_path,
            "quantizer=residual",
            "quantizer.num_codebooks=2",
            "quantizer.dim=8",
            "quantizer.K=24",
            grow=True,
        )
    )
    assert start.groups["quantizer"]["inner"]["K"] == 24
    assert tokenizer.quantizer.codebooks().shape == (2, 24, 8)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["quantizer.K=32"], r"quantizer.K=32, and init=X has quantizer.K=16; .* so leave quantizer.K=... out, or add grow=true"),
        (["quantizer.K=8"], r"quantizer.K=8, and init=X has quantizer.K=16; .* so leave quantizer.K=... out"),
        (["quantizer.cosine=true"], "quantizer.cosine=True, and init=X has quantizer.cosine=False"),
        (["model.width=16"], "model.width=16, and init=X has model.width=8 at data.image_size=16"),
        (["model.grid=8"], "model.grid=8, and init=X has model.grid=4 at data.image_size=16"),
        (["model.start=random"], "model.start=random, and init=X has model.start=patches"),
        (["model=pyramid"], "model.grid=8 by model=..., and init=X has model.grid=4"),
        (["quantizer=vq"], "quantizer._target_=vqgan.quantizers.vq.VQ by quantizer=..., and init=X has"),
        (["quantizer=fsq"], "by quantizer=..., and init=X has"),
        (["+quantizer.colour=red"], "quantizer.colour=red, and init=X has no such setting"),
    ],
)  # fmt: skip
def test_another_architecture_is_refused_with_both_values(
    tmp_path: Path, words: list[str], sentence: str
) -> None:
    save_run(tmp_path)
    wanted = want(tmp_path, *words)
    wanted = Adoption(
        "X", (16, 16), 3, False, [key.lstrip("+") for key in wanted.keys], wanted.config
    )
    source, config = save_run(tmp_path)
    with pytest.raises(InputError, match=sentence) as caught:
        adopt_architecture(source, config, wanted)
    assert ("grow=true" in str(caught.value)) == (words == ["quantizer.K=32"])


@pytest.mark.parametrize(
    "words",
    [
        ["quantizer.K=16"],
        ["model.width=8", "model.grid=4"],
        ["model.encoder.image_size=16"],
        ["quantizer=ema", "quantizer.K=16", "quantizer.dim=8"],
        ["model=conv", "model.width=8", "model.grid=4"],
    ],
)
def test_a_setting_that_repeats_the_architecture_is_no_clash(
    tmp_path: Path, words: list[str]
) -> None:
    _, config = save_run(tmp_path)
    assert begin(want(tmp_path, *words))[1].groups["quantizer"] == config["quantizer"]


def test_how_codes_learn_is_the_commands(tmp_path: Path) -> None:
    source, config = save_run(tmp_path)
    words = ["quantizer.beta=1.0", "quantizer.revive=0.0", "quantizer.entropy.weight=0.1"]
    tokenizer, start = begin(want(tmp_path, *words))
    assert (tokenizer.quantizer.beta, tokenizer.quantizer.revive) == (1.0, 0.0)
    assert start.groups["quantizer"]["entropy"] == {**config["quantizer"]["entropy"], "weight": 0.1}
    assert tokenizer.fingerprint() == source.fingerprint()


def test_how_inner_codes_learn_is_the_commands(tmp_path: Path) -> None:
    save_run(tmp_path, "conv", "quantizer=residual")
    words = ["quantizer=residual", "quantizer.K=16", "quantizer.dim=8"]
    tokenizer, _ = begin(want(tmp_path, *words, "quantizer.inner.beta=1.0", "quantizer.nested=0.5"))
    assert tokenizer.quantizer.nested == 0.5
    assert {inner.beta for inner in tokenizer.quantizer.inner_quantizers} == {1.0}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "K", "sentence"),
    [
        ([], 16, "grow=true needs the number of codes to grow to, above the 16 of init="),
        (
            ["quantizer.K=8"],
            8,
            "quantizer.K=8 and grow=true: a codebook only grows, and that of init=.* has 16",
        ),
    ],
)
def test_a_codebook_grows_to_a_number_above_its_own(
    tmp_path: Path, words: list[str], K: int, sentence: str
) -> None:
    save_run(tmp_path)
    with pytest.raises(InputError, match=sentence):
        begin(want(tmp_path, *words, grow=True))


def test_a_lattice_can_not_grow_and_is_not_advised_to(tmp_path: Path) -> None:
    fsq = ["quantizer=fsq", "quantizer.dim=null"]
    save_run(tmp_path, "conv", *fsq)
    assert "grow=true" not in refusal(want(tmp_path, *fsq, "quantizer.K=64"))
    sentence = refusal(want(tmp_path, *fsq, "quantizer.K=64", grow=True))
    assert "the codebook of a FSQ" in sentence
    assert "can't grow; leave grow out" in sentence


def test_growing_to_the_same_number_changes_nothing(tmp_path: Path) -> None:
    source, _ = save_run(tmp_path)
    assert (
        begin(want(tmp_path, "quantizer.K=16", grow=True))[0].fingerprint() == source.fingerprint()
    )


def test_sizes_that_f_does_not_divide_are_refused(tmp_path: Path) -> None:
    save_run(tmp_path)
    sentence = refusal(want(tmp_path, "model.grid=2", size=18))
    assert (
        f"data.image_size=18 is not divisible by the f=4 of init={tmp_path}; use data.image_size=16 or 20"
        in sentence
    )


def own_encoder(kind: type[Encoder]) -> list[str]:
    return [f"model.encoder._target_={__name__}.{kind.__name__}"]


def test_a_network_that_serves_one_size_is_refused_at_another(tmp_path: Path) -> None:
    save_run(tmp_path, "conv", *own_encoder(OneSizeEncoder))
    begin(want(tmp_path))
    sentence = refusal(want(tmp_path, size=32))
    assert "the OneSizeEncoder of init=" in sentence
    assert "serves 16 pixels alone; use data.image_size=16" in sentence


def test_weights_that_depend_on_the_size_after_all_are_refused(tmp_path: Path) -> None:
    save_run(tmp_path, "conv", *own_encoder(PositionEncoder))
    begin(want(tmp_path))
    sentence = refusal(want(tmp_path, size=32))
    assert "encoder.places [8, 4, 4] instead of [8, 8, 8]" in sentence
    assert "use data.image_size=16 data.channels=3" in sentence


def test_a_class_of_somebody_elses_needs_trust(tmp_path: Path) -> None:
    save_run(tmp_path, "conv", *own_encoder(PositionEncoder))
    with admit(Trust()), pytest.raises(InputError, match=r"is not part of Codegrid; .* trust=\["):
        RunStart(want(tmp_path))


def test_a_folder_without_a_checkpoint_is_named_by_init(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^init=.* has no checkpoint"):
        RunStart(want(tmp_path))


def test_a_run_says_what_it_started_with(tmp_path: Path) -> None:
    save_run(tmp_path, "conv", "id=abc123")
    _, start = begin(want(tmp_path))
    assert (start.origin, start.tags) == ({"of": "abc123"}, ("init=abc123",))
    resumed = ResumedStart(Path("run"), "abc123")
    assert (resumed.origin, resumed.tags) == (start.origin, start.tags)
    begun = ResumedStart(Path("run"), None)
    assert (begun.origin, begun.tags) == ({}, ())
    assert (ImageStart().origin, ImageStart().tags) == ({}, ())


def test_a_channel_more_or_less_changes_no_other_weight() -> None:
    weight = torch.randn(3, 3, 3, 3)
    assert fold_channels(weight, weight.shape, 3, 1) is weight
    bias = torch.tensor([1.0, 2.0, 6.0])
    assert fold_channels(bias, torch.Size([1]), 3, 1).tolist() == [3.0]
    assert fold_channels(torch.tensor([3.0]), bias.shape, 1, 3).tolist() == [3.0, 3.0, 3.0]
