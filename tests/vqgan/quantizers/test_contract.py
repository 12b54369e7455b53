"""What every bottleneck promises; a new one is one line in WAYS."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from vqgan.quantizers.base import Quantizer

CONF = Path(__file__).parents[3] / "conf"
NARROW = "quantizer.dim=8"
WAYS = [  # (name, overrides): each is built from its config, with K=16 where it has codes
    "none", "kl", f"vq {NARROW}", f"ema {NARROW}", f"gumbel {NARROW}", "fsq", "lfq", "bsq", f"simvq {NARROW}", f"ibq {NARROW}",
    f"residual {NARROW}", f"product {NARROW}",
    "residual quantizer@quantizer.inner=fsq quantizer.dim=null", "residual quantizer@quantizer.inner=simvq quantizer.dim=8",
    "residual quantizer@quantizer.inner=ibq quantizer.dim=8", "residual quantizer@quantizer.inner=gumbel quantizer.dim=8",
    "residual quantizer.dropout=0.5 quantizer.dim=8", "product quantizer@quantizer.inner=bsq quantizer.dim=null",
    f"vq quantizer.cosine=true {NARROW}", f"ema quantizer.cosine=true {NARROW}", f"ibq quantizer.cosine=true {NARROW}",
    f"simvq quantizer.cosine=true {NARROW}", f"vq quantizer.rotation=true {NARROW}", f"ema quantizer.rotation=true {NARROW}",
    f"vq quantizer.entropy.weight=0.1 {NARROW}", f"ema quantizer.temperature=1.0 {NARROW}", "vq quantizer.dim=1",
    f"vq quantizer.codebook_lr=10 quantizer.kmeans=false quantizer.revive=0 {NARROW}",
]  # fmt: skip


def made(way: str, K: int = 16) -> Quantizer:
    name, *overrides = way.split()
    size = [] if name in ("none", "kl") else [f"quantizer.K={K}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        quantizer: Quantizer = instantiate(
            compose("config", ["stage=vqgan", f"quantizer={name}", *size, *overrides]).quantizer
        )
    quantizer.initialise(3 * torch.randn(600, quantizer.in_dim) + 1)
    return quantizer


def z(quantizer: Quantizer, n: int = 2) -> Tensor:
    return 3 * torch.randn(n, quantizer.in_dim, 4, 4) + 1


def state(quantizer: Quantizer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def test_every_config_is_under_the_contract() -> None:
    assert {p.stem for p in (CONF / "quantizer").glob("*.yaml")} == {way.split()[0] for way in WAYS}


@pytest.mark.parametrize("way", WAYS)
class TestContract:
    @pytest.mark.parametrize("training", [True, False])
    def test_shapes_and_types(self, way: str, training: bool) -> None:
        quantizer = made(way).train(training)
        q = quantizer(z(quantizer))
        assert q.z_q.shape == q.z_e.shape == (2, quantizer.dim, 4, 4)
        assert q.z_q.isfinite().all()
        assert q.loss.ndim == 0
        assert q.loss.isfinite()
        if quantizer.K is None:
            assert q.indices is None
            return
        assert q.indices.shape == (
            (2, 4, 4) if quantizer.num_codebooks == 1 else (2, 4, 4, quantizer.num_codebooks)
        )
        assert q.indices.dtype == torch.int64
        assert q.indices.min() >= 0
        assert q.indices.max() < quantizer.K == 16
        assert quantizer.bits == 4 * quantizer.num_codebooks

    def test_lookup_of_the_indices_is_z_q_to_the_bit(self, way: str) -> None:
        quantizer = made(way).eval()
        q = quantizer(z(quantizer))
        if q.indices is not None:
            assert torch.equal(quantizer.lookup(q.indices), q.z_q)

    def test_evaluation_is_deterministic(self, way: str) -> None:
        quantizer = made(way).eval()
        x = z(quantizer)
        assert torch.equal(quantizer(x).z_q, quantizer(x).z_q)

    def test_the_decoders_gradient_reaches_the_encoder(self, way: str) -> None:
        quantizer = made(way)
        x = z(quantizer).requires_grad_()
        q = quantizer(x)
        (q.z_q * torch.randn_like(q.z_q)).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert (
            (x.grad[:, : quantizer.dim] != 0).any(1).float().mean() > 0.5
            or "product" in way
            or "gumbel" in way
        )

    def test_loss_and_decoder_reach_every_parameter(self, way: str) -> None:
        quantizer = made(way)
        q = quantizer(z(quantizer, 16).requires_grad_())
        (q.loss + (q.z_q * torch.randn_like(q.z_q)).sum()).backward()
        idle = [
            name for name, p in quantizer.named_parameters() if p.grad is None or not p.grad.any()
        ]
        assert idle == [] or "dropout" in way

    def test_buffers_ask_for_no_gradient(self, way: str) -> None:
        assert not any(buffer.requires_grad for buffer in made(way).buffers())

    def test_forward_is_pure(self, way: str) -> None:
        quantizer = made(way)
        before = state(quantizer)
        quantizer.train()(z(quantizer))
        assert all(
            torch.equal(value, before[name]) for name, value in quantizer.state_dict().items()
        )

    def test_update_counts_itself_and_leaves_a_finite_state(self, way: str) -> None:
        quantizer = made(way).train()
        for _ in range(3):
            quantizer.update(quantizer(z(quantizer)))
        assert quantizer.updates == 3
        assert all(value.isfinite().all() for value in quantizer.state_dict().values())

    def test_an_update_under_bf16_autocast_is_the_same_update(self, way: str) -> None:
        states = []
        for cast in (False, True):
            torch.manual_seed(1)
            quantizer = made(way).eval()  # in training dropout and drawn codes would differ
            q = quantizer(z(quantizer, 8))
            torch.manual_seed(2)
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                quantizer.update(q)
            states.append(state(quantizer))
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())

    def test_a_batch_in_another_order_gives_the_same_codes(self, way: str) -> None:
        quantizer = made(way).eval()
        x, order = z(quantizer, 5), torch.tensor([3, 1, 4, 0, 2])
        q, permuted = quantizer(x), quantizer(x[order])
        torch.testing.assert_close(q.z_q[order], permuted.z_q)
        if q.indices is not None:
            assert torch.equal(q.indices[order], permuted.indices)

    def test_bf16_autocast_changes_nothing(self, way: str) -> None:
        quantizer = made(way).eval()
        x = z(quantizer, 8)
        with torch.autocast("cpu", torch.bfloat16):
            cast = quantizer(x)
            found = quantizer.lookup(cast.indices) if cast.indices is not None else cast.z_q
        plain = quantizer(x)
        assert cast.z_q.dtype == torch.float32
        assert torch.equal(cast.z_q, plain.z_q)
        assert torch.equal(found, plain.z_q)

    def test_state_dict_round_trip(self, way: str) -> None:
        torch.manual_seed(1)
        quantizer = made(way).eval()
        torch.manual_seed(2)
        other = made(way).eval()
        other.load_state_dict(quantizer.state_dict())
        x = z(quantizer)
        assert torch.equal(other(x).z_q, quantizer(x).z_q)

    def test_the_start_places_what_can_be_placed(self, way: str) -> None:
        """Codes that met the encoder's outputs code them with less error than their mean does."""
        quantizer = made(way).eval()
        x = z(quantizer, 16)
        q = quantizer(x)
        free = "kmeans=false" in way or "cosine" in way or quantizer.K is None
        spread = (q.z_e - q.z_e.mean((0, 2, 3), keepdim=True)).square().mean()
        worst = 1.5 if "simvq" in way else 1.0  # codes on random places of the right covariance
        assert free or (q.z_q - q.z_e).square().mean() < worst * spread


REFUSED = {
    "quantizer=vq quantizer.K=1": "quantizer.K=1 must be a whole number of at least 2 codes",
    "quantizer=ema quantizer.K=2.5": "quantizer.K=2.5 must be a whole number of at least 2 codes",
    "quantizer=gumbel quantizer.K=0": "quantizer.K=0 must be a whole number of at least 2 codes",
    "quantizer=fsq quantizer.K=1": "quantizer.K=1 must be a whole number of at least 2 codes",
    "quantizer=lfq quantizer.K=1": "quantizer.K=1 must be a whole number of at least 2 codes",
    "quantizer=vq quantizer.dim=0": "quantizer.dim=0 must be a whole number of at least 1",
    "quantizer=vq quantizer.beta=-1": "quantizer.beta=-1 must be a number at least 0",
    "quantizer=lfq quantizer.beta=-0.5": "quantizer.beta=-0.5 must be a number at least 0",
    "quantizer=ema quantizer.decay=1.5": "quantizer.decay=1.5 must be a number from 0 to 1",
    "quantizer=ema quantizer.revive=-1": "quantizer.revive=-1 must be a number from 0 to 1",
    "quantizer=vq quantizer.temperature=-1": "quantizer.temperature=-1 must be a number at least 0",
    "quantizer=vq quantizer.entropy.weight=-1": "quantizer.entropy.weight=-1 must be a number at least 0",
    "quantizer=gumbel quantizer.kl_weight=-1": "quantizer.kl_weight=-1 must be a number at least 0",
    "quantizer=kl quantizer.weight=-1": "quantizer.weight=-1 must be a number at least 0",
    "quantizer=fsq quantizer.K=509": "K=509 is no product of levels from 2 to 8, which fsq needs; the nearest are 504 and 512",
    "quantizer=fsq quantizer.levels=[8,8,4]": "[8, 8, 4] multiply to 256, not to quantizer.K=512; use quantizer.K=256",
    "quantizer=fsq quantizer.levels=[8,1] quantizer.K=8": "quantizer.levels=1 must be a whole number of at least 2",
    "quantizer=fsq quantizer.dim=64": "quantizer.dim=64 must be null or 3, the channels that K=512 takes here",
    "quantizer=lfq quantizer.K=500": "K=500 is no power of two, which one bit a channel needs; the nearest are 256 and 512",
    "quantizer=bsq quantizer.K=3": "quantizer.K=3 is no power of two, which one bit a channel needs; the nearest are 2 and 4",
    "quantizer=product quantizer.dim=65": "quantizer.dim=65 is not divisible by quantizer.num_codebooks=2; use quantizer.dim=64",
    "quantizer=product quantizer.num_codebooks=0": "quantizer.num_codebooks=0 must be a whole number of at least 1",
    "quantizer=residual quantizer.dropout=2": "quantizer.dropout=2 must be a number from 0 to 1",
    "quantizer=residual quantizer.inner.cosine=true": "quantizer.inner.cosine=true can't be in residual",
    "quantizer=residual quantizer@quantizer.inner=fsq": "quantizer.dim=64 must be null or 3",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_a_bottleneck_cant_be_is_refused_with_the_rule_and_the_way_out(overrides: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config: Any = compose("config", ["stage=vqgan", *overrides.split()]).quantizer
    with pytest.raises(Exception, match=re.escape(REFUSED[overrides])):
        instantiate(config)


@pytest.mark.parametrize("K", [2, 4, 64, 128, 256, 512, 1024, 4096, 16384])
@pytest.mark.parametrize("name", ["vq", "ema", "gumbel", "fsq", "lfq", "bsq", "simvq", "ibq"])
def test_a_sweep_over_k_needs_no_special_cases(name: str, K: int) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        narrow = [] if name in ("fsq", "lfq", "bsq") else ["quantizer.dim=4"]
        quantizer = instantiate(
            compose(
                "config", ["stage=vqgan", f"quantizer={name}", f"quantizer.K={K}", *narrow]
            ).quantizer
        )
    published = {256: 240, 1024: 1000, 4096: 4375, 16384: 15360} if name == "fsq" else {}
    assert published.get(K, K) == quantizer.K
