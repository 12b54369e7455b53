"""Codes that a prior draws for a decoder that learns them: their law, the training on them, and the decoder's use afterwards."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from codegrid.engine.checkpoint import load_plain
from codegrid.engine.errors import InputError
from codegrid.engine.folder import LAST, METRICS, PREVIOUS
from prior import Prior
from prior.conditioning.vectors import VectorCondition
from prior.decoding.sampling import Numbers, Sampler, make_sampler
from prior.load import load_prior
from prior.models.base import Autoregressive
from prior.models.masked import Masked
from prior.redrawing import Redraw, redraw_codes
from tests.helpers.commands import TINY, Command, lightning_warnings, read_mistake
from tests.helpers.priors import PRIORS, make_prior, record_runs
from tests.helpers.runs import save_prior_run, save_tokenizer_run
from tests.helpers.shared import share_tiny_runs
from tests.helpers.stage1 import fit, make_module, make_tokenizer
from vqgan.learning import LEARNERS
from vqgan.load import load_tokenizer
from vqgan.losses.groups import group_code_losses
from vqgan.quantizers.base import Quantized
from vqgan.tokenizer import Tokenizer

pytestmark = lightning_warnings

CAUSAL = [name for name, case in PRIORS.items() if issubclass(case.kind, Autoregressive)]
K = 5


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7, "top_k": 3}, {"top_p": 0.8}], ids=str
)
def test_as_many_passes_as_codes_draw_what_fill_draws_code_by_code(
    name: str, settings: dict[str, float]
) -> None:
    model, sampler = make_prior(name), make_sampler(**settings)
    codes = torch.randint(K, (6, model.L))
    known = torch.arange(model.L) % 3 == 1
    uniform = Numbers(3, range(6)).uniform(model.L)
    expected = model.fill(codes, known, Numbers(3, range(6)), sampler, None)
    is_drawn = (~known).expand(6, -1)
    with torch.no_grad():
        drawn = redraw_codes(model, codes, is_drawn, uniform, model.L, sampler)
        once = redraw_codes(model, codes, is_drawn, uniform, 1, sampler)
    assert torch.equal(drawn, expected)
    if name in ("gpt", "rar") and not settings:  # whose codes depend on each other enough
        assert not torch.equal(once, expected)


@pytest.mark.parametrize("name", ["gpt", "rq"])
@torch.no_grad()
def test_one_pass_draws_each_code_by_the_priors_law_given_the_true_codes_before(name: str) -> None:
    model = make_prior(name)
    codes = torch.randint(K, (1, model.L)).expand(4000, -1)
    drawn = model.redraw(codes, None, torch.rand(codes.shape), Sampler.unmodified())
    p = model.judge(codes[:1], None).logits[0].softmax(-1)
    for t in range(model.L):
        expected = 4000 * p[t]
        counts = torch.bincount(drawn[:, t], minlength=K)
        assert ((counts - expected) ** 2 / expected.clamp(min=1e-3)).sum() < 23.5  # 1 in 10,000


@torch.no_grad()
def test_a_masked_prior_draws_given_sets_of_codes_and_given_the_rest() -> None:
    """Every code is drawn, half of them in each of two runs on average, and from what is not masked."""
    model = make_prior("maskgit")
    codes = torch.randint(K, (1, model.L)).expand(500, -1)
    assert isinstance(model, Masked)
    runs = record_runs(model)
    drawn = model.redraw(codes, None, torch.rand(codes.shape), Sampler.unmodified())
    assert drawn.shape == codes.shape
    sizes = [masked.sum(1) for _, masked in runs]
    assert len(sizes) == 2
    assert set((sizes[0] + sizes[1]).tolist()) == {model.L}
    assert set(sizes[0].tolist()) == set(range(1, model.L + 1))


@pytest.fixture(scope="module")
def prior_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prior")
    save_prior_run(folder, classes=["oak", "beech"])
    return folder


def make_redraw(ckpt: Path, share: float = 0.5, passes: int = 1, **draws: float) -> Redraw:
    return Redraw(
        str(ckpt), share, passes, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **draws}
    )


def redraw(change: Redraw, tokenizer: Tokenizer, n: int, labels: Tensor | None = None) -> Tensor:
    """The new codes of one grid, n times."""
    indices = torch.zeros(n, *tokenizer.code_shape, dtype=torch.int64)
    q = Quantized(torch.empty(0), torch.empty(0), indices, torch.zeros(()))
    return change(tokenizer.quantizer, q, indices, labels)


def test_each_image_has_its_own_share_of_new_codes(prior_run: Path) -> None:
    tokenizer, _ = load_tokenizer(prior_run / "tokenizer")
    assert not redraw(make_redraw(prior_run, share=0.0), tokenizer, 20).any()
    shares = (redraw(make_redraw(prior_run, 1.0), tokenizer, 400) != 0).float().mean((1, 2))
    assert shares.mean() < 0.6  # half of the codes on average, of which some are what they were
    assert shares.min() < 0.1
    assert shares.max() > 0.7


def test_top_1_draws_the_most_likely_codes(prior_run: Path) -> None:
    tokenizer, _ = load_tokenizer(prior_run / "tokenizer")
    change = make_redraw(prior_run, 1.0, top_k=1)
    drawn = redraw(change, tokenizer, 50).flatten(1)
    likeliest = change.model.judge(torch.zeros(1, 16, dtype=torch.int64), None).logits.argmax(-1)
    assert ((drawn == 0) | (drawn == likeliest)).all()


def test_labels_of_the_data_become_the_priors_classes(prior_run: Path) -> None:
    change = make_redraw(prior_run)
    change._labels = torch.tensor([-1, 3, 70])  # the classes 0 and 1
    numbers = change.number_labels(torch.tensor([3, 70, -1, 4, 71, 0]))
    assert numbers is not None
    assert numbers.tolist() == [0, 1, -1, -1, -1, -1]
    tokenizer, _ = load_tokenizer(prior_run / "tokenizer")
    drawn = []
    for label in (3, 70):
        torch.manual_seed(0)
        drawn.append(redraw(change, tokenizer, 50, torch.full((50,), label)))
    assert not torch.equal(*drawn)
    change.has_classes = False
    assert change.number_labels(torch.tensor([3])) is None


def test_the_decoder_learns_and_the_prior_is_no_part_of_the_run(prior_run: Path) -> None:
    tokenizer, _ = load_tokenizer(prior_run / "tokenizer")
    change = make_redraw(prior_run)
    before = [p.clone() for p in change.model.parameters()]
    codes = tokenizer.fingerprint_codes()
    learners = LEARNERS["decoder"]
    on_codes = group_code_losses(tokenizer, learners, change, perturb=0.1, perturb_nearest=2)
    assert on_codes.changes[0] is change
    module = make_module(steps=3, tokenizer=tokenizer.train(), learners=learners, on_codes=on_codes)
    weights = module.tokenizer.fingerprint()
    fit(module)
    assert module.tokenizer.fingerprint_codes() == codes
    assert module.tokenizer.fingerprint() != weights
    assert all(torch.equal(a, b) for a, b in zip(before, change.model.parameters(), strict=True))
    assert not [name for name in module.state_dict() if "prior" in name or "change" in name]


@pytest.mark.parametrize("learn", ["all", "decoder_and_codes", "discriminator"])
def test_codes_that_learn_are_refused(prior_run: Path, learn: str) -> None:
    tokenizer, _ = load_tokenizer(prior_run / "tokenizer")
    with pytest.raises(InputError, match="have to stay as they are .* add learn=decoder"):
        group_code_losses(tokenizer, LEARNERS[learn], make_redraw(prior_run))


def test_other_codes_than_the_priors_are_refused(prior_run: Path) -> None:
    tokenizer, _ = load_tokenizer(prior_run / "tokenizer")
    change = make_redraw(prior_run)
    change.check_codes(tokenizer)
    tokenizer.decoder.last.weight.data += 1  # another decoder
    change.check_codes(tokenizer)
    tokenizer.into.weight.data += 1
    with pytest.raises(InputError, match="learned the codes of another tokenizer"):
        change.check_codes(tokenizer)
    for other, sentence in (
        (make_tokenizer(channels=1), r"images of 3 channels.* use data\.channels=3"),
        (
            make_tokenizer(size=24, grid=6),
            "draws 4x4 codes an image, and the images of this run have 6x6",
        ),
    ):
        with pytest.raises(InputError, match=sentence):
            change.check(other, LEARNERS["decoder"])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"share": 1.5}, r"redraw\.share=1\.5 must be a number from 0 to 1"),
        ({"passes": 0}, r"redraw\.passes=0 must be a whole number of at least 1"),
        ({"temperature": 0.0}, r"sampler\.temperature=0\.0 must be above 0"),
    ],
)
def test_impossible_draws_are_refused(
    prior_run: Path, settings: dict[str, float], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        make_redraw(prior_run, **settings)  # type: ignore[arg-type]


def test_a_prior_of_vectors_is_refused(prior_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = load_prior(prior_run)
    prior.condition = VectorCondition([], of_columns=True)
    monkeypatch.setattr("prior.redrawing.load_prior", lambda ckpt: prior)
    with pytest.raises(InputError, match="is a prior of vectors .* name a prior of no condition"):
        make_redraw(prior_run)


def test_a_prior_decodes_by_another_decoder_of_the_same_codes_alone(
    prior_run: Path, tmp_path: Path
) -> None:
    prior = Prior.from_pretrained(prior_run)
    before = prior.sample(3, output="tensor")
    codes = prior.sample(3, output="codes")
    other, _ = load_tokenizer(prior_run / "tokenizer")
    other.decoder.last.weight.data += 0.1
    assert prior.use_decoder(other) is prior
    assert torch.equal(prior.sample(3, output="codes"), codes)
    after = prior.sample(3, output="tensor")
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, other.decode_codes(codes, output="tensor"), atol=0.1, rtol=0)
    other.encoder.image_size = (32, 32)  # its networks serve both
    with pytest.raises(InputError, match=r"images of 32 pixels.*give a run of data.image_size=16"):
        load_prior(prior_run).use_decoder(other)
    other.quantizer.codebook += 1  # type: ignore[operator]
    with pytest.raises(InputError, match="this tokenizer has other codes than those"):
        load_prior(prior_run).use_decoder(other)


@pytest.mark.slow
def test_a_decoder_trains_on_a_priors_codes_resumes_to_the_bit_and_draws_its_samples(
    command: Command,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(share_tiny_runs(tmp_path_factory), tmp_path, dirs_exist_ok=True)
    runs = tmp_path / "runs"
    vqvae = ["stage=vqgan", *TINY, "loss=vqvae", "trainer.val_every=6"]
    same = [word for word in vqvae if not word.startswith(("model.", "quantizer."))]
    tune = [*same, "init=runs/vqgan/shapes", "codes=runs/prior/shapes", "redraw.passes=2"]
    capsys.readouterr()
    assert command(*tune, "run_dir=runs/refused") != 0
    assert "add learn=decoder" in read_mistake(capsys)
    assert not (runs / "refused").exists()
    tune += ["learn=decoder", "loss.perturb=0.1"]
    assert command(*tune, "run_dir=runs/tuned") == 0
    assert "| codes | runs/prior/shapes |" in (runs / "tuned" / "card.md").read_text()

    resumed = shutil.copytree(runs / "tuned", runs / "resumed")
    shutil.copy(resumed / PREVIOUS, resumed / LAST)  # of step 4
    (resumed / METRICS).unlink()
    assert command("stage=vqgan", "resume=runs/resumed") == 0
    expected, weights = (
        load_plain(runs / name / LAST)["state_dict"] for name in ("tuned", "resumed")
    )
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name

    draw = ["stage=sample", "ckpt=runs/prior/shapes", "n=4", "save=[npz]", "accelerator=cpu"]
    assert command(*draw, "decoder=runs/tuned", "run_dir=runs/samples") == 0
    assert command(*draw, "run_dir=runs/plain") == 0
    drawn = [
        torch.load(runs / name / "codes.pt", weights_only=True) for name in ("samples", "plain")
    ]
    assert torch.equal(drawn[0]["codes"], drawn[1]["codes"])
    capsys.readouterr()
    save_tokenizer_run(runs / "other")
    assert command(*draw, "decoder=runs/other", "run_dir=runs/more") != 0
    assert "decoder=runs/other has other codes than those that the prior" in read_mistake(capsys)
    assert command("stage=sample", "ckpt=runs/vqgan/shapes", "decoder=runs/tuned") != 0
    assert "leave decoder out" in read_mistake(capsys)
    judge = ["stage=evaluate", "ckpt=runs/prior/shapes", "decoder=runs/tuned", "accelerator=cpu"]
    assert command(*judge, "proxy=2", "fetch=false", "run_dir=runs/judged") == 0
    result = json.loads((runs / "judged" / METRICS).read_text())
    tuned = json.loads((runs / "tuned" / METRICS).read_text())
    assert result["tokenizer_of"] == tuned["id"]


@pytest.mark.slow
def test_codes_that_cost_and_change_resume_to_the_bit(command: Command, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    words = ["loss=vqvae", "loss.code_cost=0.1", "loss.code_model.width=8", "loss.perturb=0.2"]
    line = ["stage=vqgan", *TINY, *words, "trainer.accumulate=2"]
    assert command(*line, "run_dir=runs/first") == 0
    resumed = shutil.copytree(runs / "first", runs / "resumed")
    shutil.copy(resumed / PREVIOUS, resumed / LAST)  # of step 4
    (resumed / METRICS).unlink()
    assert command("stage=vqgan", "resume=runs/resumed") == 0
    expected, weights = (load_plain(runs / name / LAST) for name in ("first", "resumed"))
    assert any(name.startswith("code_cost.") for name in expected["state_dict"])
    for name, value in expected["state_dict"].items():
        assert torch.equal(weights["state_dict"][name], value), name
