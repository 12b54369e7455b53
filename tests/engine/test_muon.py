"""Muon against the singular value decomposition, torch.optim.Muon and torch.optim.AdamW."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from codegrid.engine.errors import InputError
from codegrid.engine.muon import (
    QUINTIC,
    Muon,
    MuonOptimizer,
    group_by_shape,
    iterate,
    iterate_by_gram,
    orthogonalise,
    orthogonalise_alike,
)
from tests.helpers.parts import make

Group = dict[str, Any]


def make_muon(groups: list[Group], **settings: Any) -> MuonOptimizer:
    return make(Muon, **settings)(groups)


def random_parameters(*shapes: tuple[int, ...], seed: int = 0) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def take_steps(
    optimizer: torch.optim.Optimizer, n: int = 3, scale: float = 1.0, seed: int = 1
) -> None:
    """n updates by random gradients, the same for the same seed."""
    random = torch.Generator().manual_seed(seed)
    for _ in range(n):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = scale * torch.randn(p.shape, generator=random)
        optimizer.step()


def orthogonalise_by_svd(x: Tensor, iterations: int) -> Tensor:
    """The definition: each singular value goes through the polynomial, in float64."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    a, b, c = QUINTIC
    for _ in range(iterations):
        s = a * s + b * s**3 + c * s**5
    return (u * s[..., None, :]) @ v


def decaying_matrix(rows: int, columns: int, smallest: float) -> Tensor:
    """Singular values from 1 down to `smallest`, on a logarithmic scale."""
    u, _, v = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
    s = torch.logspace(0, torch.tensor(smallest).log10().item(), rows)
    return (u * s) @ v


@pytest.mark.parametrize("how", [iterate, iterate_by_gram])
@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 24, 30), (2, 16, 200)])
def test_both_ways_of_iterating_equal_the_polynomial_of_the_singular_values(
    how: Callable[[Tensor, int], Tensor], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    normed = x / torch.linalg.matrix_norm(x, keepdim=True)
    for iterations in (1, 2, 5):
        expected = orthogonalise_by_svd(x, iterations).float()
        torch.testing.assert_close(how(normed, iterations), expected, rtol=0, atol=1e-4)


def test_bfloat16_is_accurate_to_a_few_percent() -> None:
    """As on a GPU."""
    torch.manual_seed(0)
    x = decaying_matrix(32, 48, 0.03)[None]
    result = orthogonalise(x, 5, "bfloat16")
    assert result.dtype == torch.bfloat16
    error = result - orthogonalise_by_svd(x, 5)
    assert torch.linalg.matrix_norm(error, 2) < 0.1


@pytest.mark.parametrize("smallest", [1e-2, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("columns", [64, 576])
def test_small_singular_values_stay_accurate(smallest: float, columns: int) -> None:
    """Errors of the Gram matrix grow with each iteration."""
    torch.manual_seed(0)
    x = decaying_matrix(64, columns, smallest)[None]
    error = orthogonalise(x, 5) - orthogonalise_by_svd(x, 5)
    assert torch.linalg.matrix_norm(error, 2) < 5e-3


@pytest.mark.parametrize("columns", [32, 300])
def test_singular_values_come_near_one(columns: int) -> None:
    torch.manual_seed(0)
    x = decaying_matrix(32, columns, 0.1)[None]
    s = torch.linalg.svdvals(orthogonalise(x, 5))
    assert s.min() > 0.65
    assert s.max() < 1.25


def test_a_matrix_of_rank_one_keeps_its_direction() -> None:
    torch.manual_seed(0)
    u, v = torch.randn(20), torch.randn(90)
    x = torch.outer(u, v)[None]
    result = orthogonalise(x, 5)
    torch.testing.assert_close(result / result.norm(), x / x.norm(), rtol=0, atol=1e-4)


def test_matrices_of_one_shape_and_its_transpose_are_computed_as_if_alone() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(shape) for shape in ((16, 40), (40, 16), (16, 40))]
    together = orthogonalise_alike(matrices, 5)
    for x, result in zip(matrices, together, strict=True):
        assert result.shape == x.shape
        torch.testing.assert_close(result, orthogonalise_by_svd(x, 5).float(), rtol=0, atol=1e-4)


def test_matrices_are_grouped_by_their_sides() -> None:
    shapes = [(16, 40), (24, 24), (40, 16), (16, 4, 5, 2), (50, 20)]
    assert group_by_shape(torch.empty(shape) for shape in shapes) == [[0, 2, 3], [1], [4]]


def test_a_step_of_many_matrices_is_that_of_each() -> None:
    shapes = [(16, 40), (24, 24), (40, 16), (16, 4, 5, 2), (50, 20)]
    together, alone = random_parameters(*shapes), random_parameters(*shapes)
    for p, q in zip(together, alone, strict=True):
        p.grad = q.grad = torch.randn_like(p)
    make_muon([{"params": together, "matrix": True}]).step()
    for p, q in zip(together, alone, strict=True):
        make_muon([{"params": [q], "matrix": True}]).step()
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_autocast_changes_no_bit() -> None:
    torch.manual_seed(0)
    for shape in ((1, 32, 32), (1, 32, 99)):
        x = torch.randn(shape)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = orthogonalise(x, 5)
        assert torch.equal(mixed, orthogonalise(x, 5))


def test_matrices_follow_torchs_muon() -> None:
    """torch computes in bfloat16, with singular values off by up to 3%."""
    shapes = [(32, 48), (64, 20), (24, 24)]
    ours, theirs = random_parameters(*shapes), random_parameters(*shapes)
    settings = {"lr": 0.05, "weight_decay": 0.3, "momentum": 0.9}
    reference = torch.optim.Muon(theirs, **settings, adjust_lr_fn="original")
    optimizer = make_muon(
        [{"params": ours, "matrix": True}], matrix_lr=0.05, matrix_decay=0.3, momentum=0.9
    )
    before = [p.detach().clone() for p in ours]
    take_steps(reference, 4)
    take_steps(optimizer, 4)
    for start, p, q in zip(before, ours, theirs, strict=True):
        assert (p - q).norm() < 0.03 * (p - start).norm()


def test_nesterovs_momentum_is_that_of_the_definition() -> None:
    """torch's own is in bfloat16, too coarse to tell one momentum from the next."""
    [p] = random_parameters((16, 20))
    optimizer = make_muon([{"params": [p], "matrix": True}], matrix_lr=0.1, matrix_decay=0.5)
    expected, mean = p.detach().double(), torch.zeros(16, 20, dtype=torch.float64)
    random = torch.Generator().manual_seed(1)
    for _ in range(4):
        g = torch.randn(p.shape, generator=random).double()
        mean = 0.95 * mean + 0.05 * g
        expected = expected * (1 - 0.1 * 0.5)
        expected = expected - 0.1 * orthogonalise_by_svd(0.95 * mean + 0.05 * g, 5)
    take_steps(optimizer, 4)
    torch.testing.assert_close(p.detach(), expected.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_all_else_follows_adamw_to_the_bit(fused: bool) -> None:
    shapes = [(7,), (3, 5), (2, 3, 4)]
    ours, theirs = random_parameters(*shapes), random_parameters(*shapes)
    settings: dict[str, Any] = {
        "lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2, "fused": fused,
    }  # fmt: skip
    take_steps(torch.optim.AdamW(theirs, **settings), 5)
    take_steps(make_muon([{"params": ours}], **settings), 5)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_a_convolution_is_a_matrix_of_its_output_channels() -> None:
    [conv], [matrix] = random_parameters((24, 8, 3, 3)), random_parameters((24, 72))
    for p in (conv, matrix):
        take_steps(make_muon([{"params": [p], "matrix": True}]))
    torch.testing.assert_close(conv.flatten(1), matrix)


def test_the_layout_of_a_convolution_in_memory_does_not_matter() -> None:
    [plain], [last] = random_parameters((24, 8, 3, 3)), random_parameters((24, 8, 3, 3))
    last.data = last.data.to(memory_format=torch.channels_last)
    for p in (plain, last):
        take_steps(make_muon([{"params": [p], "matrix": True}]))
    assert torch.equal(plain, last)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_a_tall_matrix_takes_longer_steps() -> None:
    [tall], [wide] = random_parameters((80, 20)), random_parameters((80, 20))
    wide.data = wide.data.t().contiguous()
    starts = tall.detach().clone(), wide.detach().clone()
    gradient = torch.randn(80, 20)
    tall.grad, wide.grad = gradient, gradient.t().contiguous()
    for p in (tall, wide):
        make_muon([{"params": [p], "matrix": True}], matrix_decay=0.0).step()
    torch.testing.assert_close(tall - starts[0], 2 * (wide - starts[1]).t())


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_length_of_the_gradients_does_not_matter(scale: float) -> None:
    [p], [q] = random_parameters((20, 30)), random_parameters((20, 30))
    take_steps(make_muon([{"params": [p], "matrix": True}]))
    take_steps(make_muon([{"params": [q], "matrix": True}]), scale=scale)
    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


def test_the_dtype_of_the_iterations_is_not_that_of_the_weights() -> None:
    [p], [q] = random_parameters((20, 30)), random_parameters((20, 30))
    start = p.detach().clone()
    for weight, dtype in ((p, "float32"), (q, "bfloat16")):
        optimizer = make_muon([{"params": [weight], "matrix": True}], dtype=dtype)
        take_steps(optimizer)
        assert weight.dtype == optimizer.state[weight]["momentum_buffer"].dtype == torch.float32
    assert 0 < (p - q).norm() < 0.03 * (p - start).norm()


def test_without_a_gradient_a_matrix_only_decays() -> None:
    """As the first of two convolutions before the second, which starts at zero, has moved."""
    [p] = random_parameters((20, 30))
    start = p.detach().clone()
    p.grad = torch.zeros_like(p)
    make_muon([{"params": [p], "matrix": True}], matrix_lr=0.1, matrix_decay=0.5).step()
    torch.testing.assert_close(p.detach(), 0.95 * start)
    absent = make_muon([{"params": random_parameters((20, 30)), "matrix": True}])
    absent.step()
    assert not absent.state


def test_an_optimizer_resumes_to_the_bit() -> None:
    def build() -> MuonOptimizer:
        matrix, vector = random_parameters((20, 30), (5,))
        return make_muon([{"params": [vector]}, {"params": [matrix], "matrix": True}])

    whole, first, second = build(), build(), build()
    take_steps(whole, 2, seed=1)
    take_steps(whole, 2, seed=2)
    take_steps(first, 2, seed=1)
    for p, q in zip(parameters_of(second), parameters_of(first), strict=True):
        p.data.copy_(q)
    second.load_state_dict(first.state_dict())
    take_steps(second, 2, seed=2)
    for p, q in zip(parameters_of(whole), parameters_of(second), strict=True):
        assert torch.equal(p, q)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def test_the_closure_is_called_with_gradients_on() -> None:
    [p] = random_parameters((20, 30))
    optimizer = make_muon([{"params": [p], "matrix": True}])

    def closure() -> float:
        loss = p.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) > 0
    assert optimizer.state


class Network(nn.Module):
    """One layer of each kind; the names say which are matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix_linear = nn.Linear(16, 16)
        self.matrix_conv = nn.Conv2d(2, 16, 3)
        self.matrix_lstm = nn.LSTM(16, 16)
        self.few_rows = nn.Linear(99, 15)
        self.few_columns = nn.Linear(15, 99)
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32)
        self.embedding = nn.Embedding(32, 32)
        self.norm = nn.LayerNorm((32, 32))
        self.transposed = nn.ConvTranspose2d(32, 32, 3)
        self.codes = nn.Parameter(torch.zeros(32, 32))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(32, 32))
        self.head = nn.Linear(32, 32)


def test_matrices_are_large_weights_of_inner_layers() -> None:
    network = Network()
    names = {p: name for name, p in network.named_parameters()}
    inner = {
        "matrix_linear.weight",
        "matrix_conv.weight",
        "matrix_lstm.weight_ih_l0",
        "matrix_lstm.weight_hh_l0",
    }
    for ends, expected in {False: inner, True: inner | {"head.weight"}}.items():
        muon = make(Muon, ends=ends)
        assert {names[p] for p in muon.choose_matrices(network, [network.head])} == expected


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"matrix_lr": -1}, r"optimizer\.matrix_lr=-1 must be a number at least 0"),
        ({"lr": "fast"}, r"optimizer\.lr=fast must be a number at least 0"),
        ({"momentum": 1}, r"optimizer\.momentum=1 must be below 1"),
        ({"momentum": 2}, r"optimizer\.momentum=2 must be a number from 0 to 1"),
        ({"betas": 0.9}, r"optimizer\.betas=0\.9 must be two numbers"),
        ({"betas": [0.9]}, r"optimizer\.betas=\[0\.9\] must be two numbers"),
        ({"betas": [0.9, 1.5]}, r"optimizer\.betas=1\.5 must be a number from 0 to 1"),
        ({"dtype": "half"}, r"optimizer\.dtype=half must be one of auto, float32, bfloat16"),
        ({"ends": "no"}, r"optimizer\.ends=no must be true or false"),
        ({"iterations": 0}, r"optimizer\.iterations=0 must be a whole number of at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make(Muon, **settings)
