"""Each bottleneck trains."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

OVERRIDES = {
    "none": "", "kl": "", "vq": "", "ema": "", "gumbel": "", "fsq": "", "lfq": "", "bsq": "", "simvq": "", "ibq": "",
    "residual": "quantizer.num_codebooks=2", "product": "",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OVERRIDES)
def test_300_steps_on_shapes_end_without_collapse(
    name: str, command: Callable[..., int], tmp_path: Path
) -> None:
    size = [] if name in ("none", "kl") else ["quantizer.K=64"]
    code = command(
        "stage=vqgan", "loss=vqvae", f"quantizer={name}", *size, *OVERRIDES[name].split(), "data.n_train=2000", "data.n_val=500",
        "data.image_size=32", "model.grid=4", "model.width=16", "trainer.accelerator=cpu", "trainer.max_steps=300",
        "trainer.val_every=300", "trainer.save_every=300", "logger=csv", "run_dir=run",
    )  # fmt: skip
    assert code == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["psnr"] > 13  # the mean image has 9
    if size:
        assert found["usage"] > 0.9
