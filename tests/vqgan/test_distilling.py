"""A student learns to decode as its teacher does, and its run has the teacher's codes."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from codegrid.engine.checkpoint import AVERAGE, read_checkpoint
from codegrid.engine.errors import InputError
from codegrid.engine.folder import LAST, PREVIOUS
from tests.helpers.commands import (
    TINY,
    TINY_PRIOR,
    Command,
    lightning_warnings,
    read_mistake,
)
from tests.helpers.configs import compose_plain
from tests.helpers.runs import save_tokenizer_run
from tests.helpers.stage1 import fit, make_module, make_noise, make_tokenizer
from vqgan.distilling import (
    STUDENT_LEARNS,
    Distillation,
    Teacher,
    TeacherStart,
    count_decoder,
    mix_places,
    replace_decoder,
)
from vqgan.load import build_tokenizer, load_tokenizer
from vqgan.losses.gate import Gate
from vqgan.losses.micro_batch import MicroBatch
from vqgan.networks.decoder import Decoder
from vqgan.tokenizer import Tokenizer

pytestmark = lightning_warnings

STEPS = [word for word in TINY if word.startswith(("trainer.", "logger"))]


def make_teacher() -> Tokenizer:
    """A tokenizer whose every weight is off its start, as after a training."""
    torch.manual_seed(1)
    tokenizer = make_tokenizer()
    x = make_noise().augment(torch.from_numpy(make_noise().samples("train").values))
    tokenizer.initialise(x)
    with torch.no_grad():
        for p in tokenizer.parameters():
            p += 0.05 * torch.randn_like(p)
    return tokenizer.eval()


def make_student(teacher: Tokenizer) -> Tokenizer:
    """A tokenizer with the teacher's encoder and codes, and a narrower decoder that starts anew."""
    torch.manual_seed(2)
    parts = {"depth": 1, "stem": 4, "max_width_mult": 4}
    decoder = Decoder(image_size=16, channels=3, grid=4, width=4, **parts)
    student = Tokenizer(make_tokenizer().encoder, make_tokenizer().quantizer, decoder, "patches")
    TeacherStart(Teacher(teacher, 1.0, 0.0), None, resumes=False).fill(student, make_noise())
    return student


def make_distillation(
    teacher: Tokenizer, student: Tokenizer, share: float = 1.0, mix: float = 0.0, **settings: Any
) -> Distillation:
    kind = partial(Distillation, teacher=Teacher(teacher, share, mix))
    module = make_module(tokenizer=student, learners=STUDENT_LEARNS, kind=kind, **settings)
    assert isinstance(module, Distillation)
    return module


def begin_update(module: Distillation) -> MicroBatch:
    """An update's images, with their codes and what the student makes of them."""
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    part = MicroBatch(x, 1.0, torch.zeros(4))
    part.q = module.tokenizer.encode(x)
    return part


def test_codes_stay_to_the_bit_and_the_decoder_learns() -> None:
    teacher = make_teacher()
    student = make_student(teacher)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    assert student.fingerprint_codes() == teacher.fingerprint_codes()
    module = make_distillation(teacher, student, mix=0.5)
    fit(module)
    assert student.fingerprint_codes() == teacher.fingerprint_codes()
    moved = {
        name.split(".")[0]
        for name, value in student.state_dict().items()
        if not value.equal(before[name])
    }
    assert moved == {"decoder", "out", "patches"}
    assert count_decoder(student) < count_decoder(teacher)


def test_a_student_comes_nearer_to_its_teacher() -> None:
    teacher = make_teacher()
    student = make_student(teacher)
    module = make_distillation(teacher, student, steps=16)
    part = begin_update(module)
    target = teacher.decode(part.q.z_q)
    before = (student.decode(part.q.z_q) - target).square().mean()
    fit(module)
    after = (student.decode(part.q.z_q) - target).square().mean()
    assert after < 0.9 * before


def test_the_teacher_is_in_no_checkpoint() -> None:
    teacher = make_teacher()
    module = make_distillation(teacher, make_student(teacher))
    assert not [name for name in module.state_dict() if "teacher" in name]
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_the_target_is_what_the_teacher_makes_of_the_codes_that_the_student_decodes(
    mix: float,
) -> None:
    teacher = make_teacher()
    module = make_distillation(teacher, make_student(teacher), mix=mix)
    part = begin_update(module)
    torch.manual_seed(3)
    z_q = module.choose_latents(part)
    assert z_q.equal(part.q.z_q) == (mix == 0)
    x_hat = module.tokenizer.decode(z_q)
    part.x_hat = x_hat.detach()
    [(name, term)] = module.compare(part, z_q).items()
    target = teacher.decode(z_q).clamp(-1, 1)
    assert (name, term.weight) == ("rec_to_teacher", 1.0)
    torch.testing.assert_close(term.loss, (x_hat - target).square().mean())
    unmixed = (x_hat - teacher.decode(part.q.z_q).clamp(-1, 1)).square().mean()
    assert torch.isclose(term.loss, unmixed) == (mix == 0)  # the mistake that this would catch


def test_a_share_of_the_loss_compares_with_the_images() -> None:
    teacher = make_teacher()
    module = make_distillation(teacher, make_student(teacher), share=0.75)
    part = begin_update(module)
    part.x_hat = module.tokenizer.decode(part.q.z_q).detach()
    terms = module.compare(part, part.q.z_q)
    weighted = sum(term.weight * term.loss for term in terms.values())
    to_teacher = (part.x_hat - teacher.decode(part.q.z_q).clamp(-1, 1)).square().mean()
    to_images = (part.x_hat - part.x).square().mean()
    torch.testing.assert_close(weighted, 0.75 * to_teacher + 0.25 * to_images)
    alone = make_distillation(teacher, make_student(teacher), share=0.0)
    assert list(alone.compare(part, part.q.z_q)) == ["rec"]


def test_mixed_places_come_from_the_image_before() -> None:
    z_q = torch.arange(3.0)[:, None, None, None].expand(3, 2, 20, 20).contiguous()
    torch.manual_seed(0)
    mixed = mix_places(z_q, 0.5)
    assert mixed[:, 0].equal(mixed[:, 1])  # whole vectors
    for i in range(3):
        own, other = mixed[i, 0] == i, mixed[i, 0] == (i - 1) % 3
        assert (own | other).all()
        assert 0 < other.float().mean() < 0.6
    assert mix_places(z_q, 0.0) is z_q


def test_validation_measures_student_and_teacher() -> None:
    teacher = make_teacher()
    student = make_student(teacher)
    module = make_distillation(teacher, student, steps=4)
    trainer = fit(module)
    [figures] = trainer.validate(module, make_noise(), verbose=False)
    x = make_noise().preprocess(torch.from_numpy(make_noise().samples("val").values))

    def psnr(one: Tensor, other: Tensor) -> float:
        levels = [((each.clamp(-1, 1) + 1) * 127.5).round() for each in (one, other)]
        errors = (levels[0] - levels[1]).square().flatten(1).mean(1)
        return float((10 * (255**2 / errors).log10()).mean())

    with torch.no_grad():
        z_q = student.encode(x).z_q
        decoded, taught = student.decode(z_q), teacher.decode(z_q)
    assert figures["val/psnr_to_teacher"] == pytest.approx(psnr(decoded, taught), abs=1e-3)
    assert figures["val/teacher_psnr"] == pytest.approx(psnr(taught, x), abs=1e-3)
    assert figures["val/psnr"] == pytest.approx(psnr(decoded, x), abs=1e-3)
    assert [len(each) for each in module.show_versions(x[:2])] == [2, 2, 2]


TEACHERS = {
    "several codebooks": ["quantizer=product"],
    "several scales": ["quantizer=multiscale"],
    "no codes": ["quantizer=kl"],
    "pixels of [0, 1]": ["model=pyramid", "model.width=32", "model.z_channels=8", "+model.pixels=[0,1]"],
    "a rectangle": ["model.grid=[4,2]", "data.image_size=[16,8]"],
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "several scales" else pytest.mark.slow)
        for name in TEACHERS
    ],
)
def test_any_tokenizer_of_a_grid_can_teach(tmp_path: Path, name: str) -> None:
    teacher, described = save_tokenizer_run(tmp_path / "run", *TEACHERS[name])
    described_student = {**compose_plain("stage=distill")["student"], "width": 4}
    model = replace_decoder(teacher, described["model"], described_student, "ckpt=x")
    student = build_tokenizer(model, described["quantizer"])
    TeacherStart(Teacher(teacher, 1.0, 0.5), None, resumes=False).fill(student, make_noise())
    assert student.fingerprint_codes() == teacher.fingerprint_codes()
    x = torch.rand(2, 3, *teacher.encoder.image_size) * 2 - 1
    with torch.no_grad():
        z_q = mix_places(student.eval().encode(x).z_q, 0.5)
        assert student.decode(z_q).shape == teacher.decode(z_q).shape == x.shape


def test_what_can_not_be_distilled_is_refused(tmp_path: Path) -> None:
    teacher = make_teacher()
    with pytest.raises(InputError, match="this loss has a discriminator; use loss=vqvae"):
        make_distillation(teacher, make_student(teacher), gate=Gate(0, 1, 0))
    with pytest.raises(InputError, match="use mix=0 or teacher_share=1"):
        Teacher(teacher, 0.5, 0.5)
    for share, mix in ((1.5, 0.0), (1.0, -0.1)):
        with pytest.raises(InputError, match="must be a number from 0 to 1"):
            Teacher(teacher, share, mix)
    sequence, described = save_tokenizer_run(
        tmp_path / "titok", "model=vit", "model.tokens=4", "model.width=16", "model.depth=1"
    )
    with pytest.raises(InputError, match="ckpt=x has codes that are a sequence without places"):
        replace_decoder(sequence, described["model"], {}, "ckpt=x")


DISTILL = ["stage=distill", "student.width=4", *STEPS]
IMAGES = [word for word in TINY if word.startswith("data.")]


@pytest.mark.slow
def test_a_students_run_is_a_tokenizers_run(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("stage=vqgan", *TINY, "run_dir=teacher") == 0
    assert command("stage=prior", "ckpt=teacher", *TINY_PRIOR, "run_dir=prior") == 0
    capsys.readouterr()
    assert command(*DISTILL, "ckpt=teacher") == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert figures["run"] == "runs/distill/shapes"
    assert figures["decoder_parameters"] < figures["teacher_parameters"]
    assert {"psnr", "psnr_to_teacher", "teacher_psnr", "K", "grid"} <= figures.keys()
    student, config = load_tokenizer("runs/distill/shapes")
    teacher, described = load_tokenizer("teacher")
    assert figures["of"] == described["id"]
    assert student.fingerprint_codes() == teacher.fingerprint_codes()
    assert config["data"] == described["data"]
    quick = ["accelerator=cpu", "run_dir=samples"]
    assert command("stage=sample", "ckpt=prior", "decoder=runs/distill/shapes", "n=2", *quick) == 0
    assert command("stage=export", "ckpt=runs/distill/shapes", "run_dir=exported") == 0
    assert command("stage=report", "runs=[teacher,runs/distill]", "run_dir=report") == 0
    # It goes on as any other run of a tokenizer.
    further = ["init=runs/distill/shapes", "learn=decoder", "run_dir=further"]
    assert command("stage=vqgan", *IMAGES, *STEPS, *further) == 0


@pytest.mark.slow
def test_a_resumed_student_equals_an_uninterrupted_one(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tokenizer_run(tmp_path / "teacher", *IMAGES)
    assert command(*DISTILL, "ckpt=teacher", "run_dir=whole") == 0
    shutil.copytree("whole", "part")
    Path("part", PREVIOUS).replace(Path("part", LAST))
    Path("part", "metrics.json").unlink()
    assert read_checkpoint("part", "vqgan")["clock"]["step"] < 6
    (tmp_path / "teacher").rename(tmp_path / "moved")
    capsys.readouterr()
    words = ["stage=distill", "resume=part"]
    assert command(*words, "ckpt=whole") != 0
    assert "other weights than the tokenizer that part learned from" in read_mistake(capsys)
    assert command(*words, "ckpt=moved", "student.width=8") != 0
    assert "resume continues part as it was" in read_mistake(capsys)
    assert command(*words, "ckpt=moved") == 0
    whole, part = (read_checkpoint(name, "vqgan") for name in ("whole", "part"))
    assert part["clock"]["step"] == 6
    for key in ("state_dict", AVERAGE):
        assert all(value.equal(part[key][name]) for name, value in whole[key].items())


@pytest.mark.slow
def test_a_sweep_of_students_is_resumed_by_the_same_command(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tokenizer_run(tmp_path / "teacher", *IMAGES)
    words = [
        "-m",
        "stage=distill",
        "ckpt=teacher",
        "student.width=4,8",
        "sweep=widths",
        *STEPS,
        "trainer.max_steps=2",
    ]
    assert command(*words) == 0
    folders = sorted(path.name for path in Path("runs/sweeps/widths").glob("[0-9]*"))
    assert folders == ["0_student.width-4", "1_student.width-8"]
    (Path("runs/sweeps/widths") / folders[1] / "metrics.json").unlink()
    capsys.readouterr()
    assert command(*words) == 0
    lines = capsys.readouterr().out.splitlines()
    results = [json.loads(line) for line in lines if line.startswith("{")]
    assert [(Path(result["run"]).name, result["steps"]) for result in results] == [(folders[1], 2)]
