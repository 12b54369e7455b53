"""What every bottleneck must keep; a new one is one line in VARIANTS."""

import re
from functools import cache
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from tests.helpers.configs import compose_config, list_options
from tests.helpers.pages import load_example
from vqgan.quantizers.base import Quantizer
from vqgan.quantizers.lattice import Lattice

NARROW = "quantizer.dim=8"
VARIANTS = [  # name and overrides; each is built from its config, with K=16 if it has codes
    "none", "kl", f"vq {NARROW}", f"ema {NARROW}", f"gumbel {NARROW}",
    "fsq", "fsq quantizer.activation=tanh",
    "residual quantizer@quantizer.inner=fsq quantizer.inner.activation=normal quantizer.dim=null",
    "fsq quantizer.activation=logistic quantizer.gradient=rotation",
    "fsq quantizer.activation=normal quantizer.gradient=diveq",
    "lfq", "bsq", f"simvq {NARROW}", f"ibq {NARROW}",
    f"residual {NARROW}", f"product {NARROW}",
    f"residual quantizer.num_codebooks=1 {NARROW}", f"product quantizer.num_codebooks=1 {NARROW}",
    "residual quantizer@quantizer.inner=fsq quantizer.dim=null", "residual quantizer@quantizer.inner=simvq quantizer.dim=8",
    "residual quantizer@quantizer.inner=ibq quantizer.dim=8", "residual quantizer@quantizer.inner=gumbel quantizer.dim=8",
    "residual quantizer.nested=0.5 quantizer.dim=8", "product quantizer@quantizer.inner=bsq quantizer.dim=null",
    f"vq quantizer.cosine=true {NARROW}", f"ema quantizer.cosine=true {NARROW}", f"ibq quantizer.cosine=true {NARROW}",
    f"simvq quantizer.cosine=true {NARROW}", f"vq quantizer.gradient=rotation {NARROW}",
    f"ema quantizer.gradient=rotation {NARROW}",
    f"vq quantizer.gradient=diveq {NARROW}", f"simvq quantizer.gradient=diveq {NARROW}",
    "residual quantizer@quantizer.inner=vq quantizer.inner.gradient=diveq quantizer.dim=8",
    f"vq quantizer.entropy.weight=0.1 {NARROW}", f"ema quantizer.temperature=1.0 {NARROW}", "vq quantizer.dim=1",
    f"vq quantizer.codebook_lr=10 quantizer.kmeans=false quantizer.revive=0 {NARROW}",
    f"multiscale {NARROW}", f"multiscale quantizer@quantizer.inner=vq quantizer.convolutions=2 {NARROW}",
    f"multiscale quantizer.scales=[2,4] quantizer.shared=false quantizer.convolutions=0 {NARROW}",
    f"multiscale quantizer@quantizer.inner=simvq quantizer.convolutions=0 {NARROW}",
    "multiscale quantizer@quantizer.inner=fsq quantizer.shared=false quantizer.dim=null",
]  # fmt: skip
EXAMPLE = "docs/extending/quantizer.md"  # its code blocks are a quantizer, which must pass too


@cache
def read_settings(variant: str) -> dict[str, Any]:
    """The `quantizer` group of a config as a plain dict."""
    name, *overrides = variant.split()
    if name == EXAMPLE:
        config = OmegaConf.create({"quantizer": load_example(EXAMPLE)})
    else:
        groups = [word for word in overrides if "@" in word]
        config = compose_config("stage=vqgan", f"quantizer={name}", *groups)
    # Hydra would take a third of a second for each combination of values, so only group choices go through it.
    for key, value in (word.split("=") for word in overrides if "@" not in word):
        OmegaConf.update(config, key, yaml.safe_load(value), merge=False)
    settings: dict[str, Any] = OmegaConf.to_container(config.quantizer, resolve=True)  # type: ignore[assignment]
    return settings


def build(variant: str) -> Quantizer:
    """The quantizer, initialised with outputs of an encoder."""
    has_codes = "K" in read_settings(variant)
    settings = read_settings(f"{variant} quantizer.K=16" if has_codes else variant)
    quantizer: Quantizer = instantiate(settings)
    quantizer.bind((4, 4))
    quantizer.initialise(3 * torch.randn(600, quantizer.in_dim) + 1)
    return quantizer


def make_z_e(quantizer: Quantizer, n: int = 2) -> Tensor:
    return 3 * torch.randn(n, quantizer.in_dim, 4, 4) + 1


def copy_state(quantizer: Quantizer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def test_every_config_is_under_the_contract() -> None:
    assert set(list_options("quantizer")) == {variant.split()[0] for variant in VARIANTS}


@pytest.mark.parametrize("variant", [*VARIANTS, f"{EXAMPLE} {NARROW}"])
class TestContract:
    @pytest.mark.parametrize("training", [True, False])
    def test_shapes_and_types(self, variant: str, training: bool) -> None:
        quantizer = build(variant).train(training)
        q = quantizer(make_z_e(quantizer))
        assert q.z_q.shape == q.z_e.shape == (2, quantizer.dim, 4, 4)
        assert q.z_q.isfinite().all()
        assert q.loss.ndim == 0
        assert q.loss.isfinite()
        if quantizer.K is None:
            assert q.indices is None
            return
        assert q.indices.shape == (2, *quantizer.code_shape((4, 4)))
        if quantizer.is_gridded:
            several = (quantizer.num_codebooks,) if quantizer.num_codebooks > 1 else ()
            assert q.indices.shape == (2, 4, 4, *several)
        assert q.indices.dtype == torch.int64
        assert q.indices.min() >= 0
        assert q.indices.max() < quantizer.K == 16
        assert quantizer.bits * 16 == pytest.approx(4 * q.indices[0].numel())

    def test_lookup_inverts_the_indices_to_the_bit(self, variant: str) -> None:
        quantizer = build(variant).eval()
        q = quantizer(make_z_e(quantizer))
        if q.indices is not None:
            assert torch.equal(quantizer.lookup(q.indices), q.z_q)

    def test_the_parts_of_one_codebook_have_all_the_codes(self, variant: str) -> None:
        quantizer = build(variant).eval()  # in training nested dropout would leave parts out
        q = quantizer(make_z_e(quantizer))
        if q.indices is None:
            return
        parts = quantizer.list_parts(q)
        assert all(len(part.code_vectors()) == 1 for part, _ in parts)
        codes = [own.indices.flatten(1) for _, own in parts]
        joined = torch.stack(codes, -1) if quantizer.is_gridded else torch.cat(codes, 1)
        assert torch.equal(joined.view_as(q.indices), q.indices)

    def test_a_near_code_is_another_one_close_by(self, variant: str) -> None:
        """Of a lattice one step away in one channel; else among the nearest by a plain sort of all distances."""
        quantizer = build(variant)
        q = quantizer(make_z_e(quantizer, 8))
        if q.indices is None:
            return
        for part, own in quantizer.list_parts(q):
            indices = own.indices.flatten()
            near = part.draw_near(indices, 3)
            assert near.shape == indices.shape
            [codes] = part.code_vectors()
            for code, other in zip(indices.tolist(), near.tolist(), strict=True):
                if isinstance(part, Lattice):
                    digits = part.to_digits(torch.tensor([code, other]))
                    assert digits.diff(dim=0).abs().sum() == 1
                else:
                    distances = (codes - codes[code]).square().sum(1)
                    nearest = [k for k in distances.argsort().tolist() if k != code][:3]
                    assert other in nearest

    @pytest.mark.parametrize("training", [True, False])
    def test_codes_are_replaced_to_the_bit_with_the_gradient_of_the_first(
        self, variant: str, training: bool
    ) -> None:
        quantizer = build(variant).train(training)
        x = make_z_e(quantizer).requires_grad_()
        q = quantizer(x)
        if q.indices is None:
            return
        assert torch.equal(quantizer.replace(q, q.indices), q.z_q)
        others = torch.randint_like(q.indices, 16)
        replaced = quantizer.replace(q, others)
        expected_z_q = quantizer.lookup(others)
        if quantizer.nested:  # an image's last codes may be left out
            depths = [sum(i < len(part.z_e) for part in q.parts) for i in range(len(x))]
            assert (min(depths) < quantizer.num_codebooks) == training
            rows = zip(others.split(1), depths, strict=True)
            expected_z_q = torch.cat([quantizer.lookup(own[..., :depth]) for own, depth in rows])
        assert torch.equal(replaced, expected_z_q)
        slope = torch.randn_like(q.z_q)
        expected, gradient = (
            torch.autograd.grad((z_q * slope).sum(), x, retain_graph=True, materialize_grads=True)
            for z_q in (q.z_q, replaced)
        )
        assert torch.equal(gradient[0], expected[0])

    def test_evaluation_is_deterministic(self, variant: str) -> None:
        quantizer = build(variant).eval()
        x = make_z_e(quantizer)
        assert torch.equal(quantizer(x).z_q, quantizer(x).z_q)

    def test_the_decoders_gradient_reaches_the_encoder(self, variant: str) -> None:
        quantizer = build(variant)
        x = make_z_e(quantizer).requires_grad_()
        q = quantizer(x)
        (q.z_q * torch.randn_like(q.z_q)).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert (
            (x.grad[:, : quantizer.dim] != 0).any(1).float().mean() > 0.5
            or "product" in variant
            or "gumbel" in variant
        )

    def test_bypassed_outputs_have_the_shape_of_codes_and_a_gradient(self, variant: str) -> None:
        quantizer = build(variant)
        if quantizer.K is None:
            return
        x = make_z_e(quantizer).requires_grad_()
        q = quantizer.bypass(x)
        assert q.z_q.shape == (2, quantizer.dim, 4, 4)
        assert q.z_q.dtype == torch.float32
        assert q.indices is None
        assert q.loss == 0
        (q.z_q * torch.randn_like(q.z_q)).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()

    def test_loss_and_decoder_reach_every_parameter(self, variant: str) -> None:
        quantizer = build(variant)
        q = quantizer(make_z_e(quantizer, 16).requires_grad_())
        (q.loss + (q.z_q * torch.randn_like(q.z_q)).sum()).backward()
        idle = [
            name for name, p in quantizer.named_parameters() if p.grad is None or not p.grad.any()
        ]
        assert idle == [] or "nested" in variant

    def test_buffers_ask_for_no_gradient(self, variant: str) -> None:
        assert not any(buffer.requires_grad for buffer in build(variant).buffers())

    def test_forward_is_pure(self, variant: str) -> None:
        quantizer = build(variant)
        before = copy_state(quantizer)
        quantizer.train()(make_z_e(quantizer))
        assert all(
            torch.equal(value, before[name]) for name, value in quantizer.state_dict().items()
        )

    def test_update_counts_itself_and_leaves_a_finite_state(self, variant: str) -> None:
        quantizer = build(variant).train()
        for _ in range(3):
            quantizer.update(quantizer(make_z_e(quantizer)))
        assert quantizer.updates == 3
        assert all(value.isfinite().all() for value in quantizer.state_dict().values())

    def test_an_update_under_bf16_autocast_is_the_same_update(self, variant: str) -> None:
        states = []
        for cast in (False, True):
            torch.manual_seed(1)
            quantizer = build(
                variant
            ).eval()  # in training nested dropout and drawn codes would differ
            q = quantizer(make_z_e(quantizer, 8))
            torch.manual_seed(2)
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                quantizer.update(q)
            states.append(copy_state(quantizer))
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())

    def test_the_order_of_the_batch_does_not_matter(self, variant: str) -> None:
        quantizer = build(variant).eval()
        x, order = make_z_e(quantizer, 5), torch.tensor([3, 1, 4, 0, 2])
        q, permuted = quantizer(x), quantizer(x[order])
        torch.testing.assert_close(q.z_q[order], permuted.z_q)
        if q.indices is not None:
            assert torch.equal(q.indices[order], permuted.indices)

    def test_bf16_autocast_changes_nothing(self, variant: str) -> None:
        quantizer = build(variant).eval()
        x = make_z_e(quantizer, 8)
        with torch.autocast("cpu", torch.bfloat16):
            cast = quantizer(x)
            looked_up = quantizer.lookup(cast.indices) if cast.indices is not None else cast.z_q
        plain = quantizer(x)
        assert cast.z_q.dtype == torch.float32
        assert torch.equal(cast.z_q, plain.z_q)
        assert torch.equal(looked_up, plain.z_q)

    def test_state_dict_round_trip(self, variant: str) -> None:
        torch.manual_seed(1)
        quantizer = build(variant).eval()
        torch.manual_seed(2)
        other = build(variant).eval()
        other.load_state_dict(quantizer.state_dict())
        x = make_z_e(quantizer)
        assert torch.equal(other(x).z_q, quantizer(x).z_q)

    def test_initialised_codes_lie_among_the_outputs(self, variant: str) -> None:
        """Initialised codes represent encoder outputs with less error than the outputs' mean does."""
        quantizer = build(variant).eval()
        x = make_z_e(quantizer, 16)
        q = quantizer(x)
        is_exempt = "kmeans=false" in variant or "cosine" in variant or quantizer.K is None
        spread = (q.z_e - q.z_e.mean((0, 2, 3), keepdim=True)).square().mean()
        bound = 1.5 if "simvq" in variant else 1.0  # random codes of the right covariance
        assert is_exempt or (q.z_q - q.z_e).square().mean() < bound * spread


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
    "quantizer=fsq quantizer.activation=relu": "quantizer.activation=relu must be one of tanh, logistic, normal, quantiles",
    "quantizer=fsq quantizer.activation=quantiles quantizer.decay=2": "quantizer.decay=2 must be a number from 0 to 1",
    "quantizer=fsq quantizer.gradient=none": "quantizer.gradient=none must be one of straight_through, rotation, diveq",
    "quantizer=fsq quantizer.dim=64": "quantizer.dim=64 must be null or 3, the channels that K=512 takes here",
    "quantizer=lfq quantizer.K=500": "K=500 is no power of two, which one bit a channel needs; the nearest are 256 and 512",
    "quantizer=bsq quantizer.K=3": "quantizer.K=3 is no power of two, which one bit a channel needs; the nearest are 2 and 4",
    "quantizer=product quantizer.dim=65": "quantizer.dim=65 is not divisible by quantizer.num_codebooks=2; use quantizer.dim=64",
    "quantizer=product quantizer.num_codebooks=0": "quantizer.num_codebooks=0 must be a whole number of at least 1",
    "quantizer=residual quantizer.nested=2": "quantizer.nested=2 must be a number from 0 to 1",
    "quantizer=residual quantizer.inner.cosine=true": "quantizer.inner.cosine=true can't be in residual",
    "quantizer=residual quantizer@quantizer.inner=fsq": "quantizer.dim=64 must be null or 3",
    "quantizer=vq quantizer.gradient=reinmax": "quantizer.gradient=reinmax must be one of straight_through, rotation, diveq",
    "quantizer=ema quantizer.gradient=diveq": "those of ema are running means; use quantizer=vq, or quantizer.gradient=rotation",
    "quantizer=ibq quantizer.gradient=diveq": "can't be set for ibq, which has a gradient of its own; leave it out",
    "quantizer=gumbel quantizer.from=1.0": "quantizer.from=1.0 must be a step (whole) or a fraction of the run",
    "quantizer=residual quantizer.inner.from=0.1": "all codebooks come into use together; use quantizer.from=0.1",
    "quantizer=multiscale quantizer.inner.cosine=true": "quantizer.inner.cosine=true can't be in multiscale",
    "quantizer=multiscale quantizer@quantizer.inner=vq quantizer.inner.gradient=diveq": "quantizer.inner.gradient=diveq can't be",
    "quantizer=multiscale quantizer.inner.gradient=rotation": "quantizer.inner.gradient=rotation can't be in multiscale",
    "quantizer=multiscale quantizer@quantizer.inner=gumbel quantizer.shared=false": "its codes learn by the decoder's gradient",
    "quantizer=multiscale quantizer@quantizer.inner=fsq quantizer.dim=null": "quantizer.shared=true needs learned codes",
    "quantizer=multiscale quantizer.scales=[4,2]": "quantizer.scales=[4,2] must not shrink: 2 comes after 4",
    "quantizer=multiscale quantizer.scales=8": "quantizer.scales=8 must be the sides of the grids, smallest first",
    "quantizer=multiscale quantizer.convolutions=-1": "quantizer.convolutions=-1 must be a whole number of at least 0",
    "quantizer=multiscale quantizer.strength=2": "quantizer.strength=2 must be a number from 0 to 1",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_an_impossible_bottleneck_is_refused_with_the_rule_and_the_way_out(overrides: str) -> None:
    settings = read_settings(overrides.removeprefix("quantizer="))
    with pytest.raises(Exception, match=re.escape(REFUSED[overrides])):
        instantiate(settings)


@pytest.mark.parametrize("variant", [*VARIANTS, EXAMPLE])
@torch.no_grad()
def test_how_codes_learn_changes_nothing_of_what_they_are(variant: str) -> None:
    quantizer = build(variant).eval()
    settings = read_settings(f"{variant} quantizer.K=16" if quantizer.K else variant)
    numbers = {
        name: 0.5 * settings[name] + 0.1
        for name in quantizer.training_settings
        if isinstance(settings.get(name), float)
    }
    other: Quantizer = instantiate(settings | numbers).eval()
    other.bind((4, 4))
    other.load_state_dict(quantizer.state_dict())
    z_e = make_z_e(quantizer)
    q, others = quantizer(z_e), other(z_e)
    assert torch.equal(q.z_q, others.z_q)
    if q.indices is not None:
        assert torch.equal(q.indices, others.indices)


@pytest.mark.parametrize("K", [2, 4, 64, 128, 256, 512, 1024, 4096, 16384])
@pytest.mark.parametrize("name", ["vq", "ema", "gumbel", "fsq", "lfq", "bsq", "simvq", "ibq"])
def test_a_sweep_over_k_needs_no_special_cases(name: str, K: int) -> None:
    narrow = "" if name in ("fsq", "lfq", "bsq") else "quantizer.dim=4"
    quantizer = instantiate(read_settings(f"{name} quantizer.K={K} {narrow}"))
    published = {256: 240, 1024: 1000, 4096: 4375, 16384: 15360} if name == "fsq" else {}
    assert published.get(K, K) == quantizer.K
