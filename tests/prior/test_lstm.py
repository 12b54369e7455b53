from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prior.decoding.generate import sample
from prior.decoding.sampling import Sampler
from prior.models.lstm import LSTM, has_lstm
from tests.helpers.parts import make
from tests.helpers.priors import make_prior

K, DIM = 5, 4


def lstm(grid: tuple[int, int] = (3, 4), **settings: int | float) -> LSTM:
    model = make_prior("lstm", grid=grid, **settings)
    assert isinstance(model, LSTM)
    return model


def slow(model: LSTM, codes: Tensor, label: int) -> Tensor:
    """The logits (T, K) of one grid of codes (T,), by the equations of Gers et al. 2000, step by step."""
    columns, logits = model.grid[1], []
    width = model.head.in_features
    h, c = torch.zeros(2, model.lstm.num_layers, width)
    for t in range(len(codes)):
        x = model.labels.vectors[label] + model.row[t // columns] + model.column[t % columns]
        if t >= 1:
            x = x + model.before(codes[t - 1])
        if t >= columns:
            x = x + model.above(codes[t - columns])
        for layer in range(model.lstm.num_layers):
            w_x, w_h, b_x, b_h = model.lstm.all_weights[layer]
            read, forget, new, write = (w_x @ x + b_x + w_h @ h[layer] + b_h).chunk(4)
            c[layer] = forget.sigmoid() * c[layer] + read.sigmoid() * new.tanh()
            h[layer] = write.sigmoid() * c[layer].tanh()
            x = h[layer]
        logits.append(model.head.weight @ x)
    return torch.stack(logits)


@torch.no_grad()
def test_logits_are_those_of_the_equations() -> None:
    model = lstm(classes=2)
    codes = torch.randint(K, (1, 12))
    torch.testing.assert_close(
        model(codes, torch.tensor([1]))[0], slow(model, codes[0], label=1), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_memory_lasts_over_the_whole_grid() -> None:
    model = lstm((4, 4))
    codes = torch.randint(K, (1, 16))
    changed = codes.clone()
    changed[0, 0] = (codes[0, 0] + 1) % K
    assert not torch.equal(model(codes)[0, -1], model(changed)[0, -1])


@torch.no_grad()
def test_what_is_in_memory_mostly_stays_at_first() -> None:
    model = make(LSTM, torch.randn(1, K, DIM), (2, 3), width=8, depth=2)
    for name, p in model.lstm.named_parameters():
        if "weight" in name:
            p.zero_()
    memory = model.lstm(torch.randn(1, 1, 8), (torch.zeros(2, 1, 8), torch.ones(2, 1, 8)))[1][1]
    torch.testing.assert_close(
        memory, torch.ones(2, 1, 8) * torch.tensor(1.0).sigmoid()
    )  # 0.73 a step, where 0.5 is usual


def test_sampling_runs_the_network_one_step_a_code() -> None:
    model = lstm()
    steps: list[int] = []
    model.lstm.register_forward_hook(lambda _, read, __: steps.append(read[0].shape[1]))
    sample(model, Sampler.unmodified(), 3, seed=0)
    assert steps == [1] * 12


def test_dropout_is_of_training_alone_and_one_layer_takes_it_without_a_warning() -> None:
    model = lstm(depth=1, dropout=0.5)
    codes = torch.randint(K, (2, 12))
    assert torch.equal(model(codes), model(codes))
    model.train()
    assert not torch.equal(model(codes), model(codes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_processor_without_an_lstm_of_the_precision_runs_it_in_float32_and_says_so(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = lstm(dropout=0.0, token_dropout=0.0).eval()
    codes = torch.randint(K, (2, 12))
    recurrent, tried = nn.LSTM.forward, []

    def refuse(self: nn.LSTM, x: Tensor, state: Any = None) -> Any:
        tried.append(torch.is_autocast_enabled("cpu"))
        if tried[-1]:
            raise RuntimeError("could not create a primitive descriptor for the LSTM forward")
        return recurrent(self, x, state)

    expected = model(codes)
    monkeypatch.setattr(nn.LSTM, "forward", refuse)
    has_lstm.cache_clear()
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype):
        model(codes)
        logits = model(codes)
        decode = model.decoder(2)
        steps = [decode(before) for before in (None, codes[:, 0])]
    has_lstm.cache_clear()
    assert torch.equal(torch.get_rng_state(), state), "the run's random numbers are untouched"
    assert tried == [True, False, False, False, False], "the probe runs once"
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(torch.stack(steps, 1), expected[:, :2], rtol=0.05, atol=0.05)
    assert (
        capsys.readouterr().err.count(
            f"prior=lstm runs in float32: this processor has no LSTM in {dtype}"
        )
        == 1
    )


def test_an_lstm_of_full_precision_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prior.models.lstm.has_lstm", None)
    assert lstm()(torch.zeros(1, 12, dtype=torch.long)).dtype == torch.float32
    assert has_lstm("cuda", torch.float16), "GPUs have all"
