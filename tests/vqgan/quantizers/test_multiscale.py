"""The multi-scale quantizer against VAR's algorithm written out, and what keeps its coarse scales alive."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from codegrid.engine.errors import InputError
from tests.helpers.parts import make
from tests.helpers.stage1 import make_tokenizer
from vqgan.callbacks.doctor import find_narrow_scale
from vqgan.quantizers.base import Quantized
from vqgan.quantizers.codebook import draw_rows
from vqgan.quantizers.ema import EMA
from vqgan.quantizers.multiscale import MultiScaleResidual
from vqgan.quantizers.vq import VQ

K, DIM = 16, 4


def inner(kind: Any, **settings: Any) -> Any:
    return lambda K, dim: make(kind, K, dim, **settings)


def make_quantizer(kind: Any = EMA, **settings: Any) -> MultiScaleResidual:
    torch.manual_seed(0)
    of_inner = settings.pop("inner", {})
    defaults = {"scales": [1, 2, 4], "shared": True, "convolutions": 2, "strength": 0.5}
    quantizer = MultiScaleResidual(inner(kind, **of_inner), K, DIM, **{**defaults, **settings})
    quantizer.bind((4, 4))
    return quantizer


def randomise(quantizer: MultiScaleResidual) -> MultiScaleResidual:
    with torch.no_grad():
        for p in quantizer.scales.parameters():
            p += 0.2 * torch.randn_like(p)
    return quantizer


def encode_slowly(quantizer: MultiScaleResidual, z: Tensor) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of VAR, one image and one position at a time: codes (B, L) and z_hat."""
    table, rows, maps = quantizer.codebooks()[0], [], []
    for f in z:
        rest, total, codes = f.clone(), torch.zeros_like(f), []
        for k, (h, w) in enumerate(quantizer.scales.sizes):
            small = F.interpolate(rest[None], (h, w), mode="area")[0]
            chosen = torch.zeros(DIM, h, w)
            for i in range(h):
                for j in range(w):
                    best = int((table - small[:, i, j]).square().sum(1).argmin())
                    codes.append(best)
                    chosen[:, i, j] = table[best]
            large = F.interpolate(chosen[None], f.shape[1:], mode="bicubic")
            i = quantizer.scales.convolution_of(k)
            phi = F.conv2d(
                large,
                quantizer.scales.get_parameter(f"kernel_{i}"),
                quantizer.scales.get_parameter(f"bias_{i}"),
                padding=1,
            )
            step = (0.5 * large + 0.5 * phi)[0].detach()
            total, rest = total + step, rest - step
        rows.append(torch.tensor(codes))
        maps.append(total)
    return torch.stack(rows), torch.stack(maps)


def test_codes_and_map_are_those_of_the_algorithm() -> None:
    quantizer = randomise(make_quantizer()).eval()
    z = torch.randn(3, DIM, 4, 4)
    q = quantizer(z)
    codes, z_hat = encode_slowly(quantizer, z)
    assert torch.equal(q.indices[:, 0], codes)
    torch.testing.assert_close(q.z_q, z_hat, atol=1e-5, rtol=1e-5)


def test_the_first_scales_alone_are_decoded_and_each_brings_the_map_nearer() -> None:
    quantizer = make_quantizer(convolutions=0).eval()
    z = torch.randn(400, DIM, 4, 4) + 3 * torch.randn(400, DIM, 1, 1)
    quantizer.initialise_maps(z, 10_000)
    indices = quantizer(z).indices
    assert quantizer.prefixes == [1, 5, 21]
    errors = [
        float((quantizer.lookup(indices[..., :n]) - z).square().mean()) for n in quantizer.prefixes
    ]
    assert errors[0] > errors[1] > errors[2]
    with pytest.raises(InputError, match="a row of 6 codes is none of this tokenizer"):
        quantizer.lookup(indices[..., :6])


def test_two_scales_with_a_codebook_each_keep_them_apart() -> None:
    quantizer = make_quantizer(scales=[2, 4], shared=False, convolutions=0)
    assert len(quantizer.inner) == 2
    assert quantizer.codebooks().shape == (2, K, DIM)
    z = torch.randn(8, DIM, 4, 4)
    before = [codebook.codes().clone() for codebook in quantizer.inner]
    q = quantizer.train()(z)
    q.parts[1].indices.zero_()  # the second alone changes its codes otherwise
    quantizer.update(q)
    coarse = make_quantizer(scales=[2, 4], shared=False, convolutions=0)
    coarse.update(coarse.train()(z))
    assert torch.equal(quantizer.inner[0].codes(), coarse.inner[0].codes())
    assert not torch.equal(quantizer.inner[1].codes(), coarse.inner[1].codes())
    assert not torch.equal(quantizer.inner[0].codes(), before[0])


def test_each_scale_counts_as_much_as_every_other() -> None:
    """Running means by the definition: every code the weighted mean of its outputs, those of a scale weigh 1 together."""
    decay = 0.9
    quantizer = make_quantizer(inner={"decay": decay, "revive": 0.0}, convolutions=0).train()
    [codebook] = quantizer.inner
    sums, counts = codebook.sums.clone(), codebook.counts.clone()
    q = quantizer(torch.randn(5, DIM, 4, 4))
    new_sums, new_counts = torch.zeros_like(sums), torch.zeros_like(counts)
    for part in q.parts:
        rows = part.z_e.movedim(1, -1).reshape(-1, DIM)
        for z, code in zip(rows, part.indices.flatten().tolist(), strict=True):
            weight = K / len(rows) / len(q.parts)
            new_sums[code] += weight * z
            new_counts[code] += weight
    quantizer.update(q)
    expected = decay * counts + (1 - decay) * new_counts
    torch.testing.assert_close(codebook.counts, expected)
    torch.testing.assert_close(codebook.sums, decay * sums + (1 - decay) * new_sums)
    assert quantizer.updates == codebook.updates == 1


def test_rows_are_drawn_from_all_parts_alike() -> None:
    torch.manual_seed(0)
    rows = draw_rows(30_000, [3, 1, 1000], torch.device("cpu"))
    shares = torch.histc(rows.float(), bins=3, min=0, max=3) / len(rows)
    assert rows.max() < 1004
    assert float((rows < 3).float().mean()) == pytest.approx(1 / 3, abs=0.01)
    assert float((rows == 3).float().mean()) == pytest.approx(1 / 3, abs=0.01)
    assert float(shares[0]) == pytest.approx(1 / 9, abs=0.01)


def count_coarse_codes(by_scale: bool) -> int:
    """Train a codebook by coarse outputs of which there are few, far from the many fine ones; how many codes the coarse ones
    choose in the end. Every code starts among the fine ones."""
    torch.manual_seed(0)
    codebook = make(EMA, 32, DIM, kmeans=False, decay=0.9)
    for _ in range(150):
        coarse = 4 * torch.randn(1, DIM, 8, 1) + 20
        fine = torch.randn(1, DIM, 32, 32)
        parts = [codebook(coarse), codebook(fine)]
        if by_scale:
            codebook.update_from(parts)
        else:
            rows = [q.z_e.flatten(2) for q in parts]
            joined = torch.cat(rows, 2)[..., None]
            codes = torch.cat([q.indices.flatten() for q in parts])[None, :, None]
            codebook.update(Quantized(joined, joined, codes, joined.sum()))
    coarse = 4 * torch.randn(1, DIM, 500, 1) + 20
    return len(codebook(coarse).indices.unique())


def test_revival_by_scale_keeps_the_coarse_scales_alive_and_revival_by_output_does_not() -> None:
    alive, collapsed = count_coarse_codes(by_scale=True), count_coarse_codes(by_scale=False)
    assert alive >= 8
    assert collapsed <= alive / 2


def test_every_scale_starts_with_a_share_of_a_shared_codebook() -> None:
    quantizer = make_quantizer(VQ, convolutions=0).eval()
    z = torch.randn(300, DIM, 4, 4) + 2 * torch.randn(300, DIM, 1, 1)
    quantizer.initialise_maps(z, 10_000)
    use = quantizer.make_code_use()
    use.update(quantizer(z).indices)
    assert all(perplexity > 3 for perplexity, _ in use.count_perplexities())
    assert use.compute()["usage"] == 1
    assert quantizer.inner[0].counts.mean() == pytest.approx(1, abs=0.2)


def test_the_use_of_codes_is_counted_for_each_scale() -> None:
    quantizer = make_quantizer()
    use = quantizer.make_code_use()
    rows = torch.zeros(10, 1, 21, dtype=torch.int64)
    rows[:, 0, 5:] = torch.arange(16)
    use.update(rows)
    assert use.counts.shape == (3, K)
    figures = use.compute()
    assert figures["codes_used"] == 16  # the codebook is shared
    assert float(figures["entropy_bits"]) == pytest.approx(4 * 16 / 21)
    assert find_narrow_scale(use) is None  # ten codes are too few to judge
    for _ in range(10):
        use.update(rows)
    sign = find_narrow_scale(use)
    assert sign is not None
    assert sign.observation.startswith("scale 1 of 3 has collapsed")


@pytest.fixture(scope="module")
def fitted() -> tuple[MultiScaleResidual, Tensor]:
    quantizer = make_quantizer(convolutions=0).eval()
    z = torch.randn(200, DIM, 4, 4) + 2 * torch.randn(200, DIM, 1, 1)
    quantizer.initialise_maps(z, 10_000)
    return quantizer, z


def test_what_is_not_known_leaves_no_trace_in_the_codes(
    fitted: tuple[MultiScaleResidual, Tensor],
) -> None:
    quantizer, z = fitted
    known = torch.zeros(4, 4, dtype=torch.bool)
    known[:2] = True
    one = quantizer(z[:20]).indices
    other = one.clone()
    # The last scale alone, whose codes lie in one place each: the rest of the images stays what it is.
    other[:, 0, 5 + 8 :] = torch.randint(K, (20, 8))
    touched = torch.cat([part.flatten() for part in quantizer.scales.touched(known)])
    ones, others = (quantizer.restrict(codes, known)[:, 0, touched] for codes in (one, other))
    assert torch.equal(ones, others)


def test_the_known_part_of_a_picture_stays_near_whatever_is_drawn_beside_it(
    fitted: tuple[MultiScaleResidual, Tensor],
) -> None:
    quantizer, z = fitted
    known = torch.ones(4, 4, dtype=torch.bool)
    known[1:3, 1:3] = False
    codes = quantizer(z).indices
    target = quantizer.lookup(codes)
    touched = torch.cat([part.flatten() for part in quantizer.scales.touched(known)])
    restricted = quantizer.restrict(codes, known)
    drawn = torch.where(touched, restricted, torch.randint(K, restricted.shape))

    def miss(codes: Tensor) -> float:
        return float((quantizer.lookup(codes) - target)[..., known].square().mean())

    assert miss(drawn) < 0.5 * float(target.var())
    assert miss(restricted) < miss(torch.randint(K, codes.shape)) / 4
    assert torch.equal(quantizer.restrict(codes, torch.ones(4, 4, dtype=torch.bool)), codes)


@pytest.mark.parametrize("start", ["patches", "random"])
def test_a_tokenizer_of_several_scales_takes_images_of_other_sizes(start: str) -> None:
    quantizer = make_quantizer(scales=None)
    tokenizer = make_tokenizer(dim=DIM, quantizer=quantizer, start=start).eval()
    tokenizer.initialise(torch.randn(32, 3, 16, 16))
    assert tokenizer.code_shape == (1, 1 + 4 + 9 + 16)
    assert not tokenizer.is_gridded
    assert quantizer.bits * 16 == pytest.approx(4 * 30)
    images = torch.rand(2, 3, 24, 32) * 2 - 1
    codes = tokenizer.encode_images(images, size="own")
    assert codes.shape == (2, 1, sum(h * w for h, w in quantizer.scales.sizes_on((6, 8))))
    x_hat = tokenizer.decode_codes(codes, "tensor", size=(24, 32))
    expected = tokenizer.decode(tokenizer.encode(images).z_q).clamp(-1, 1)
    torch.testing.assert_close(x_hat, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="is none of this tokenizer"):
        tokenizer.decode_codes(codes)
    own = tokenizer.encode_images(torch.rand(2, 3, 16, 16) * 2 - 1)
    assert tokenizer.decode_codes(own[..., :5], "tensor").shape == (2, 3, 16, 16)
    with pytest.raises(InputError, match=r"shape \[2, 2, 15\] must be \(B, 1, n\)"):
        tokenizer.decode_codes(own.view(2, 2, 15))


def test_codes_without_places_have_no_scales() -> None:
    with pytest.raises(InputError, match="quantizer=multiscale needs codes with places"):
        make_quantizer().bind(None)
