"""Every mistake has its message: one sentence, exit code 2, nothing written over and nothing left behind."""

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

from codegrid.engine.version import FORMAT
from tests.helpers.commands import (
    QUICK,
    TINY,
    TINY_PRIOR,
    Command,
    lightning_warnings,
    read_mistake,
)

pytestmark = lightning_warnings

WORDS = {
    "": "no stage is chosen",
    "stage=vqgam": "stage=vqgam does not exist, did you mean vqgan",
    "stage=vqgan quantiser=ema": "quantiser is not a setting of this stage, did you mean quantizer",
    "stage=vqgan foo": "foo is not a setting, which is written key=value",
    "stage=": "stage= does not exist; there is",
    "+stage=vqgan": "stage is chosen already",
    "stage=vqgan --cfg=both": "--cfg=both must be one of job, hydra, all",
    "stage=vqgan logger=[csv,wandbb]": "logger=wandbb does not exist, did you mean wandb?",
    "stage=vqgan logger=[csv,größe]": "logger=größe does not exist; there is csv",
    "stage=vqgan quantizer.K=8,16": "quantizer.K=8,16 has several values",
    "stage=vqgan optimizer.lr=range(1,2)": "optimizer.lr=range(1,2) has several values",
    "stage=vqgan quantizer=ema,vq": "quantizer=ema,vq has several values",
    "stage=vqgan data..crop=random": "can't be the name of a setting",
    "stage=vqgan optimizer.lr=1e-3(": "optimizer.lr=1e-3( must be a number",
    "stage=pipeline stage2.logger=csv": "logger=csv can't be set inside a part; say logger=csv for the whole command",
    "stage=vqgan logger=null": "a group such as logger, loss or quantizer can't be null",
    "stage=vqgan ckpt=foo": "ckpt is not a setting of this stage",
    "stage=vqgan seed=abc": "seed=abc must be a whole number from 0",
    "stage=vqgan seed=-1": "seed=-1 must be a whole number from 0",
    "stage=vqgan resume=nowhere": "resume=nowhere is not a run folder",
    "stage=vqgan run_dir=broken data.n_train=64 data.n_val=8": "run_dir=broken is not empty",
    "stage=vqgan cache_dir=/proc/x": "can't write the cache folder /proc/x",
    "stage=vqgan experiment=nothing": "experiment=nothing does not exist; there is",
    "stage=vqgan quantizer=emma": "quantizer=emma does not exist, did you mean ema",
    "stage=vqgan quantizer.k=512": "quantizer.k is not a setting of this stage, did you mean quantizer.K",
    "stage=vqgan quantizer.K=1": "quantizer.K=1 must be a whole number of at least 2",
    "stage=vqgan quantizer.K=many": "quantizer.K=many must be a whole number",
    "stage=vqgan quantizer=kl quantizer.K=16": "quantizer.K is not a setting of this stage",
    "stage=vqgan quantizer.K=-5": "quantizer.K=-5 must be a whole number of at least 2",
    "stage=vqgan quantizer.K=2.5": "quantizer.K=2.5 must be a whole number",
    "stage=vqgan quantizer.K=[1,2]": "quantizer.K=[1, 2] must be a whole number",
    "stage=vqgan quantizer.beta=x": "quantizer.beta=x must be a number",
    "stage=vqgan quantizer.decay=2": "quantizer.decay=2 must be a number from 0 to 1",
    "stage=vqgan quantizer.revive=-1": "quantizer.revive=-1 must be a number from 0 to 1",
    "stage=vqgan model.grid=7": "is not model.grid=7 times one whole number; use model.grid=8 or data.image_size=63",
    "stage=vqgan model.start=fresh": "model.start=fresh must be null or one of patches, random",
    "stage=vqgan model.width=-8": "model.width=-8 must be a whole number of at least 1 channel",
    "stage=vqgan model.width=wide": "model.width=wide must be a whole number of at least 1 channel",
    "stage=vqgan model.grid=-4": "model.grid=-4 must be at least 1 code a side: one whole number, or [rows,columns]",
    "stage=vqgan model.encoder.depth=-1": "model.encoder.depth=-1 must be a whole number of at least 0",
    "stage=vqgan model.decoder.depth=deep": "model.decoder.depth=deep must be a whole number of at least 0",
    "stage=vqgan data=folder": "add data.root=",
    "stage=vqgan data=folder data.root=nowhere": "data.root=nowhere is not a folder",
    "stage=vqgan data=folder data.root=empty": "empty holds no image",
    "stage=vqgan data=folder data.root=broken data.n_val=1": "can't be read as an image",
    "stage=vqgan data.batch_size=0": "data.batch_size=0 must be at least 1",
    "stage=vqgan data.crop=left": "data.crop=left must be one of centre, random",
    "stage=vqgan data.tiles=32": "data.tiles=32 is smaller than the 64 pixels",
    "stage=vqgan data.tiles=64": "data.tiles cuts image files into tiles, and these images are none",
    "stage=vqgan data.cache=tape": "data.cache=tape must be one of none, ram, disk",
    "stage=vqgan data.resize=32": "data.resize=32 must be at least data.image_size=64",
    "stage=vqgan data.image_size=-64": "data.image_size=-64 must be at least 1 pixel",
    "stage=vqgan data.image_size=abc": "data.image_size=abc must be at least 1 pixel",
    "stage=vqgan data.n_train=-1": "data.n_train=-1 and data.n_val=1000 must be at least 1",
    "stage=vqgan data.batch_size=many": "data.batch_size=many must be at least 1",
    "stage=vqgan data.num_workers=-1": "data.num_workers=-1 must be a whole number of at least 0",
    "stage=vqgan data.channels=17": "data.channels=17 must be a whole number from 1 to 16",
    "stage=vqgan data.on_error=ignore": "data.on_error=ignore must be one of stop, skip",
    "stage=vqgan data.n_train=4 data.batch_size=32": "4 training samples don't fill one batch of 32",
    "stage=vqgan loss.gate.start=2.5": "fractions 0 to 1",
    "stage=vqgan loss=gan": "loss=gan does not exist, did you mean vqgan?",
    "stage=vqgan loss.discriminator_optimizer.lr=x": "loss.discriminator_optimizer.lr=x must be a number",
    "stage=vqgan optimizer.lr=-1": "optimizer.lr=-1 must be a number of at least 0",
    "stage=vqgan optimizer.lr=fast": "optimizer.lr=fast must be a number of at least 0",
    "stage=vqgan schedule.warmup=-5": "schedule.warmup=-5 must be a whole number of at least 0 step",
    "stage=vqgan schedule.floor=7": "schedule.floor=7 must be a number from 0 to 1",
    "stage=vqgan callbacks.average.decay=2": "callbacks.average.decay=2 must be a number from 0 to 1",
    "stage=vqgan trainer.max_steps=0": "trainer.max_steps=0 must be a number above 0",
    "stage=vqgan trainer.max_steps=null": "a run needs an end",
    "stage=vqgan trainer.accelerator=tpu": "accelerator=tpu must be auto, cpu or gpu",
    "stage=vqgan trainer.precision=int8": "trainer.precision=int8 must be one of auto, 32-true, bf16-mixed, 16-mixed",
    "stage=vqgan trainer.val_every=0": "trainer.val_every=0 must be a whole number",
    "stage=vqgan trainer.max_step=5": "did you mean trainer.max_steps?",
    "stage=vqgan trainer.devices=0": "trainer.devices=0 must be a whole number of at least 1",
    "stage=vqgan trainer.devices=two": "trainer.devices=two must be a whole number of at least 1",
    "stage=vqgan trainer.num_nodes=0": "trainer.num_nodes=0 must be a whole number of at least 1",
    "stage=vqgan trainer.num_nodes=2": "trainer.num_nodes=2 needs torchrun or srun",
    "stage=prior ckpt=x trainer.strategy=deepspeed": "trainer.strategy=deepspeed must be auto, ddp or fsdp2",
    "stage=vqgan trainer.strategy=fsdp2": "shards the weights of stage=prior alone",
    "stage=pipeline trainer.strategy=fsdp2": "shards the weights of stage=prior alone",
    "stage=prior ckpt=x trainer.strategy=fsdp2 trainer.precision=16-mixed": "use bf16-mixed or 32-true",
    "stage=vqgan trainer.clip=-1": "trainer.clip=-1 must be a number at least 0",
    "stage=vqgan trainer.accumulate=0": "trainer.accumulate=0 must be a whole number of at least 1",
    "stage=vqgan trainer.accumulate=64": "trainer.accumulate=64 micro-batches need more than a batch of 32",
    "stage=vqgan trainer.save_every=x": "trainer.save_every=x must be a whole number",
    "stage=vqgan trainer.max_minutes=-1": "trainer.max_minutes=-1 must be a number above 0",
    "stage=vqgan trainer.max_steps=ten": "trainer.max_steps=ten must be a number above 0",
    "stage=vqgan logger=wandbb": "did you mean wandb?",
    "stage=distill": "add ckpt=<run folder of stage=vqgan>",
    "stage=distill ckpt=nowhere": "ckpt=nowhere has no checkpoint",
    "stage=distill student=large": "student=large does not exist; there is small, tiny",
    "stage=extract": "add ckpt=<run folder of stage=vqgan>",
    "stage=extract ckpt=x export=csv": "export=csv must be one of npz, safetensors",
    "stage=extract ckpt=x batch_size=0": "batch_size=0 must be a whole number of at least 1",
    "stage=extract ckpt=x accelerator=tpu": "accelerator=tpu must be auto, cpu or gpu",
    "stage=extract ckpt=x resume=broken": "stage=extract resumes by itself",
    "stage=prior": "add ckpt=<run folder of stage=vqgan>",
    "stage=prior ckpt=nowhere": "ckpt=nowhere has no checkpoint",
    "stage=prior ckpt=broken/1.png": "is damaged or no checkpoint",
    "stage=prior prior=gpt2": "did you mean gpt?",
    "stage=prior prior=lstm prior/size=tiny": "prior/size is not a setting of this stage; add --cfg job",
    "stage=prior prior=lstm experiment=demo_prior": "experiment=demo_prior chooses prior/size, and with the rest of this command",
    "stage=compress files=x": "add ckpt=<run folder of stage=prior>",
    "stage=compress ckpt=x": "add files=<a folder of images>",
    "stage=compress ckpt=x files=nowhere": "files=nowhere is not there; give a folder of images, a file, or a list",
    "stage=compress ckpt=x files=broken compare=gif": "compare=gif must be one of jpeg, webp, avif, several, or null",
    "stage=compress ckpt=x files=broken batch_size=0": "batch_size=0 must be a whole number of at least 1",
    "stage=compress ckpt=x files=broken verify=twice": "verify=twice must be true or false",
    "stage=decompress ckpt=x": "add files=<a folder of .cgz files>",
    "stage=decompress ckpt=x files=broken": "files=broken holds no .cgz files",
    "stage=sample": "add ckpt=<run folder of stage=prior, or of a KL-VAE>",
    "stage=sample ckpt=nowhere sampler.top_p=2": "sampler.top_p=2 must be above 0",
    "stage=sample ckpt=x resume=broken": "resume=broken is not a run folder",
    "stage=sample ckpt=x n=0": "n=0 must be a whole number of at least 1",
    "stage=sample ckpt=x save=[grid,jpg]": "save=jpg must be one of grid, png, npz, npy, shards, neighbours, or several",
    "stage=sample ckpt=x save=shards shard_size=0": "shard_size=0 must be a whole number of at least 1",
    "stage=sample ckpt=x accelerator=tpu": "accelerator=tpu must be auto, cpu or gpu",
    "stage=sample ckpt=x sampler.grid=16y": "sampler.grid=16y must be rows x columns of codes, such as 16x24",
    "stage=sample ckpt=x sampler.rows=4": "name that image with sampler.init_image=<file>",
    "stage=sample ckpt=x sampler.init_image=broken/1.png": "sampler.init_image=broken/1.png needs sampler.rows=4",
    "stage=sample ckpt=x sampler.temperature=-1": "sampler.temperature=-1 must be above 0",
    "stage=sample ckpt=x sampler.top_k=-2": "sampler.top_k=-2 must be at least 0",
    "stage=sample ckpt=x sampler.top_k=x": "sampler.top_k=x must be a whole number",
    "stage=sample ckpt=x batch_size=0": "batch_size=0 must be a whole number of at least 1",
    "stage=evaluate": "add ckpt=<run folder of stage=vqgan or stage=prior>",
    "stage=evaluate ckpt=nowhere": "ckpt=nowhere has no checkpoint",
    "stage=evaluate ckpt=x split=test": "split=test must be one of val, train",
    "stage=evaluate ckpt=x precision=bf16": "precision=bf16 must be one of 32-true, auto",
    "stage=evaluate ckpt=x lpips=resnet": "lpips=resnet must be one of vgg, alex, squeeze, or null for none",
    "stage=evaluate ckpt=x proxy=-1": "proxy=-1 must be a whole number of at least 0 steps",
    "stage=evaluate ckpt=x samples=-1": "samples=-1 must be a whole number of at least 0 samples",
    "stage=evaluate ckpt=x samples=many": "samples=many is not there; give an .npz of images, or a run folder of stage=sample",
    "stage=evaluate ckpt=x show=0": "show=0 must be a whole number of at least 1 image",
    "stage=evaluate ckpt=x accelerator=tpu": "accelerator=tpu must be auto, cpu or gpu",
    "stage=evaluate ckpt=x resume=broken": "stage=evaluate has nothing to resume",
    "stage=explore": "add ckpt=<run folder of stage=vqgan, or of stage=prior>",
    "stage=explore ckpt=nowhere": "ckpt=nowhere has no checkpoint",
    "stage=explore ckpt=x pictures=0": "pictures=0 must be a whole number of at least 1",
    "stage=explore ckpt=x serve=perhaps": "serve=perhaps must be true or false",
    "stage=explore ckpt=x port=80": "port=80 is the server's; add serve=true, or leave port out",
    "stage=explore ckpt=x resume=broken": "stage=explore has nothing to resume",
    "stage=report": "add runs=<a run folder, or one that has some below>",
    "stage=report runs=nowhere": "runs=nowhere is not a folder",
    "stage=report runs=empty": "runs=empty has no finished run",
    "stage=report runs=broken resume=broken": "stage=report has nothing to resume",
    "stage=pipeline trainer.devices=2 trainer.accelerator=cpu": "stage=pipeline has one",
    "stage=pipeline quantizer=kl": "a tokenizer whose codes a prior can learn",
    "-m stage=vqgan run_dir=x": "run_dir=x is for a single run",
    "-m stage=vqgan trainer.devices=2": "trainer.devices=2 in a sweep",
    "-m stage=vqgan seed=chioce(1,2)": "seed=chioce(1,2) calls chioce, which is no function of Hydra's, did you mean choice?",
    "-m stage=vqgan seed=1,": "seed=1, has nothing before or after one of its commas",
}  # fmt: skip


@pytest.mark.parametrize("line", WORDS)
def test_every_wrong_word_gets_one_sentence_and_leaves_nothing_behind(
    command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for i in range(4):
        (tmp_path / "broken" / f"{i}.png").write_text(f"no picture {i}")
    assert command(*line.split()) == 2
    if line.startswith("-m"):  # a sweep has a folder, and lists the failures once more at its end
        message = capsys.readouterr().err
        assert "Traceback" not in message
        assert WORDS[line] in message
    else:
        assert WORDS[line] in read_mistake(capsys)
        assert not (tmp_path / "runs").exists()
    assert sorted(p.name for p in (tmp_path / "broken").iterdir()) == [
        "0.png",
        "1.png",
        "2.png",
        "3.png",
    ]


def test_no_suggestion_is_the_word_itself(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    command("stage=vqgan", "quantizer=kl", "quantizer.K=16")
    message = read_mistake(capsys)
    assert "did you mean quantizer.K?" not in message
    assert "add --cfg job to the command to see them all" in message


def test_a_missing_gpu_is_reported(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert command("stage=vqgan", "trainer.devices=2", "trainer.accelerator=gpu") == 2
    assert "there is no usable GPU; use auto or cpu" in read_mistake(capsys)


def shorter(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def newer(file: Path) -> None:
    content = torch.load(file, weights_only=True)
    content["codegrid"]["format"] = FORMAT + 1
    torch.save(content, file)


def other_K(file: Path) -> None:
    content = torch.load(file, weights_only=True)
    content["codegrid"]["config"]["quantizer"]["K"] = 32
    torch.save(content, file)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def no_yaml(file: Path) -> None:
    file.write_text("stage: [vqgan\n  x: }")


EVALUATE = ["stage=evaluate", "ckpt=runs/vqgan/shapes", *QUICK]
RESUME = ["stage=vqgan", "resume=runs/vqgan/shapes", "trainer.max_steps=9"]
DAMAGE: list[tuple[Callable[[Path], None], str, list[str], str]] = [
    (shorter, "checkpoints/last.ckpt", EVALUATE, "is damaged or no checkpoint"),
    (empty, "checkpoints/last.ckpt", EVALUATE, "is damaged or no checkpoint"),
    (newer, "checkpoints/last.ckpt", EVALUATE, f"has format {FORMAT + 1}, this program reads up to {FORMAT}; update Codegrid"),
    (Path.unlink, "checkpoints/last.ckpt", EVALUATE, "has no checkpoint"),
    (Path.unlink, "checkpoints/last.ckpt", RESUME, "has no checkpoint"),
    (other_K, "checkpoints/last.ckpt", EVALUATE, "its weights are not those of its config"),
    (no_yaml, "config.yaml", RESUME, "config.yaml is damaged"),
    (empty, "config.yaml", RESUME, "config.yaml is damaged or no config of a run"),
    (Path.unlink, "config.yaml", RESUME, "is not a run folder"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "name", "line", "says"),
    DAMAGE,
    ids=[f"{d[0].__name__}-{d[1]}-{d[2][0]}" for d in DAMAGE],
)
def test_every_damaged_file_gets_one_sentence_and_nothing_is_written_over(
    command: Command,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    name: str,
    line: list[str],
    says: str,
) -> None:
    command("stage=vqgan", *TINY)
    folder = Path("runs/vqgan/shapes")
    (folder / "checkpoints" / "previous.ckpt").unlink()  # which would be used instead
    damage(folder / name)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert command(*line) == 2
    assert says in read_mistake(capsys)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert not Path("runs/evaluate").exists()


@pytest.mark.slow
def test_the_wrong_stage_and_a_setting_that_can_not_change_are_reported(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    command("stage=vqgan", *TINY)
    for line, says in {
        "stage=prior resume=runs/vqgan/shapes": "is a run of stage=vqgan; say stage=vqgan resume=...",
        "stage=vqgan resume=runs/vqgan/shapes quantizer.K=32": "quantizer.K=32 can't change",
        "stage=sample ckpt=runs/vqgan/shapes": "only a tokenizer with quantizer=kl",
    }.items():
        capsys.readouterr()
        assert command(*line.split()) == 2
        assert says in read_mistake(capsys)


@pytest.mark.slow
def test_an_empty_metrics_file_in_a_sweep_fails_its_point_alone(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        "-m",
        "stage=vqgan",
        "sweep=s",
        *(word for word in TINY if "quantizer.K" not in word),
        "quantizer.K=8,16",
    ]
    assert command(*line) == 0
    [file] = Path("runs/sweeps/s").glob("0_*/metrics.json")
    file.write_text("")
    capsys.readouterr()
    assert command(*line) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert f"{file} is damaged" in message
    assert "1 point(s) failed" in message
    file.write_text(json.dumps({"psnr": 1.0}))
    assert command(*line) == 0


def test_extras_that_are_missing_are_named(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("codegrid.engine.settings.find_spec", lambda name: None)
    assert command("stage=vqgan", "logger=tensorboard") == 2
    assert 'pip install "codegrid[tensorboard]"' in read_mistake(capsys)
    assert metadata.version("hydra-core")


def test_a_full_disk_is_reported(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    assert command("stage=vqgan", *TINY) == 2
    assert "no room for" in read_mistake(capsys)
    assert not Path("runs").exists()


@pytest.mark.slow
def test_an_impossible_prior_is_refused_before_its_folder_is_made(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    command("stage=vqgan", *TINY)
    for word in (
        "prior.depth=-1",
        "prior.width=0",
        "prior.heads=3",
        "label_drop=2",
        "crops=0",
        "batch_size=0",
        "crops=2",
    ):
        capsys.readouterr()
        assert command("stage=prior", "ckpt=runs/vqgan/shapes", *TINY_PRIOR, word) == 2, word
        assert word.split("=")[0].split(".")[-1] in read_mistake(capsys)
        assert not Path("runs/prior").exists()
