import pytest
import torch
from torch import Tensor

from codegrid.engine.errors import InputError
from prior.decoding.generate import sample
from prior.decoding.sampling import Sampler
from prior.models.pixelcnn import PixelCNN
from tests.helpers.parts import make
from tests.helpers.priors import make_prior, randomised

K, DIM = 5, 4


def slow(model: PixelCNN, codes: Tensor, label: int) -> Tensor:
    """The logits (h, w, K) of one grid of codes (h, w), position by position and weight by weight."""
    (rows, columns), reach = codes.shape, model.reach
    places = [(i, j) for i in range(rows) for j in range(columns)]
    nothing = torch.zeros(len(model.place))
    x = {place: model.read(codes[place]) for place in places}
    v = {(i, j): x.get((i - 1, j), nothing) + model.place[:, i, j] for i, j in places}
    h = {(i, j): x.get((i, j - 1), nothing) + model.place[:, i, j] for i, j in places}
    biases = model.labels.vectors[label].view(len(model.vertical), 2, -1)
    for vertical, horizontal, (bias_v, bias_h) in zip(
        model.vertical, model.horizontal, biases, strict=True
    ):
        a, b = {}, {}
        for i, j in places:
            a[i, j], b[i, j] = bias_v.clone(), bias_h.clone()
            for left in range(-reach, reach + 1):
                for up in range(reach + 1):
                    a[i, j] += vertical.weight[:, :, reach - up, reach + left] @ v.get(
                        (i - up, j + left), nothing
                    )
                if left <= 0:
                    b[i, j] += horizontal.conv.weight[:, :, 0, reach + left] @ h.get(
                        (i, j + left), nothing
                    )
            b[i, j] += horizontal.across.weight[:, :, 0, 0] @ a[i, j]
        for place in places:
            f, g = b[place].chunk(2)
            h[place] = (
                h[place]
                + horizontal.out.weight[:, :, 0, 0] @ (torch.tanh(f) * torch.sigmoid(g))
                + horizontal.out.bias
            )
            f, g = a[place].chunk(2)
            v[place] = torch.tanh(f) * torch.sigmoid(g)
    logits = []
    for place in places:
        y = torch.relu(model.last.weight[:, :, 0, 0] @ torch.relu(h[place]) + model.last.bias)
        logits.append(model.head.weight[:, :, 0, 0] @ y + model.head.bias)
    return torch.stack(logits).view(rows, columns, -1)


def pixelcnn(grid: tuple[int, int], **settings: int | float) -> PixelCNN:
    model = make_prior("pixelcnn", grid=grid, **settings)
    assert isinstance(model, PixelCNN)
    return model


@torch.no_grad()
@pytest.mark.parametrize("kernel", [3, 5])
def test_logits_are_those_of_the_papers_equations(kernel: int) -> None:
    model = pixelcnn((3, 4), kernel=kernel, classes=2)
    codes = torch.randint(K, (1, 12))
    expected = slow(model, codes.view(3, 4), label=1).view(1, 12, K)
    torch.testing.assert_close(model(codes, torch.tensor([1])), expected, rtol=1e-4, atol=1e-5)


def receptive_field(model: PixelCNN, t: int) -> Tensor:
    """Which codes (h, w) the logits at t depend on, by their gradient in float64."""
    vectors = []
    model.double().read.register_forward_hook(
        lambda _, __, x: vectors.append(x.requires_grad_()) or x
    )
    logits = model(torch.randint(model.K, (1, model.L)))
    [gradient] = torch.autograd.grad(logits[0, t].square().sum(), vectors)
    return gradient[0].abs().sum(-1).view(model.grid) > 0


def test_codes_are_seen_as_far_as_the_layers_reach_and_none_is_hidden() -> None:
    field = receptive_field(pixelcnn((6, 9), depth=2, kernel=3), t=4 * 9 + 4)
    expected = torch.zeros(6, 9, dtype=torch.bool)
    expected[1:4, 2:7] = True  # three rows above, two columns to each side
    expected[4, 1:4] = True
    assert torch.equal(field, expected)


def test_as_deep_as_it_comes_the_last_code_of_a_grid_of_16_sees_all_before() -> None:
    model = randomised(make(PixelCNN, torch.randn(1, K, DIM), (16, 16), width=16))
    field = receptive_field(model, t=255).flatten()
    assert field[:-1].all()
    assert not field[-1]


def test_positions_are_told_apart_where_codes_are_nothing_but_zeros() -> None:
    """FSQ has such a code, which must not look like what is outside the grid."""
    model = make(PixelCNN, torch.zeros(1, K, DIM), (3, 3), width=8, depth=1)
    torch.nn.init.normal_(model.head.weight)
    logits = model(torch.zeros(1, 9, dtype=torch.int64))[0]
    assert all(
        not torch.allclose(logits[a], logits[b], rtol=0, atol=1e-6)
        for a in range(9)
        for b in range(a)
    )


def test_sampling_computes_each_position_of_each_layer_once() -> None:
    model = pixelcnn((4, 5))
    computed: dict[str, int] = {}
    for name, part in model.named_modules():
        if name.endswith(("conv", "across", "out", "head", "vertical.0", "vertical.1")):
            computed[name] = 0

            def count(_: torch.nn.Module, __: tuple[Tensor], x: Tensor, name: str = name) -> None:
                computed[name] += x.shape[2] * x.shape[3]

            part.register_forward_hook(count)
    sample(model, Sampler.unmodified(), 3, seed=0)
    assert computed == dict.fromkeys(computed, 20)
    assert len(computed) == 2 * 4 + 1


def test_dropout_is_of_training_alone() -> None:
    model = pixelcnn((2, 3), dropout=0.5)
    codes = torch.randint(K, (2, 6))
    assert torch.equal(model(codes), model(codes))
    model.train()
    assert not torch.equal(model(codes), model(codes))


def test_dropout_of_everything_leaves_what_is_the_same_everywhere() -> None:
    model = pixelcnn((2, 3), dropout=1.0).train()
    logits = model(torch.randint(K, (2, 6)))
    assert torch.equal(logits, logits[:1, :1].expand_as(logits))


@pytest.mark.parametrize("kernel", [1, 4])
def test_a_kernel_without_a_centre_and_two_sides_is_refused(kernel: int) -> None:
    with pytest.raises(InputError, match=rf"prior\.kernel={kernel} must be odd and at least 3"):
        make(PixelCNN, torch.randn(1, K, DIM), (2, 3), kernel=kernel)
