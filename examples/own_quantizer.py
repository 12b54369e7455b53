# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own quantizer
#
# A bottleneck of your own is one class and one file of settings. This one replaces the error of quantization by noise
# of the same length, so that gradients reach encoder and codes without a straight-through estimator and without a
# commitment loss (NSVQ, Vali and Bäckström 2022). A sweep compares it with `ema`, the default, over three seeds, and
# a report says which differences are clear.
#
# With these settings the notebook takes ten minutes. It uses a GPU if there is one, and two CPU cores are enough.

# %% tags=["install"]
# %pip install --quiet codegrid

# %%
from pathlib import Path

import torch
from IPython.display import Image as Picture
from IPython.display import display

from vqgan import train

# %% [markdown]
# ## The class
#
# `forward` takes the encoder's output z_e (B, dim, h, w). It returns the decoder's input z_q and the indices of the
# codes. `lookup` turns indices into z_q, and `initialise` places the codes before the first step. The class lies in a
# file, since every run of the sweep is a process that imports it.

# %%
# %%writefile my_quantizers.py
import torch
import torch.nn.functional as F
from torch import nn

from codegrid.engine.collectives import broadcast
from vqgan.quantizers.base import Quantized, Quantizer
from vqgan.quantizers.kmeans import kmeans
from vqgan.quantizers.precision import float32
from vqgan.quantizers.search import flatten, nearest, unflatten


class NSVQ(Quantizer):
    """Noise substitution in vector quantization (Vali and Bäckström 2022)."""

    def __init__(self, K, dim):
        super().__init__(K, dim)
        self.codebook = nn.Parameter(torch.randn(K, dim))

    @float32
    def forward(self, z_e):
        z = flatten(z_e.float())  # (B * h * w, dim)
        indices = nearest(z.detach(), self.codebook.detach())
        z_q = self.codebook[indices]
        if self.training:
            error = (z - z_q).norm(dim=1, keepdim=True)
            z_q = z + error * F.normalize(torch.randn_like(z), dim=1)
        grid = indices.view(len(z_e), *z_e.shape[2:])
        return Quantized(z_e.float(), unflatten(z_q, z_e), grid, loss=z.new_zeros(()))

    def lookup(self, indices):
        return F.embedding(indices, self.codebook).movedim(-1, 1)

    @torch.no_grad()
    def initialise(self, z):
        self.codebook.copy_(broadcast(kmeans(z.float(), self.K)[0]))


# %% [markdown]
# Its settings, with their defaults, are a file that `quantizer=nsvq` selects:

# %%
folder = Path("my_conf/quantizer")
folder.mkdir(parents=True, exist_ok=True)
(folder / "nsvq.yaml").write_text("""\
_target_: my_quantizers.NSVQ
K: 512
dim: 64
""")

# %% [markdown]
# The contract, checked before anything is trained: indices look up what `forward` returns in eval mode, and gradients
# reach the encoder and the codes in training.

# %%
from my_quantizers import NSVQ

z_e = torch.randn(2, 4, 8, 8, requires_grad=True)
quantizer = NSVQ(K=16, dim=4)
quantizer(z_e).z_q.square().sum().backward()
assert z_e.grad.abs().sum() > 0
assert quantizer.codebook.grad.abs().sum() > 0
q = quantizer.eval()(z_e)
assert q.z_q.equal(quantizer.lookup(q.indices))

# %% [markdown]
# ## The comparison
#
# Every quantizer with every seed, each run with the same budget. A sweep is a command, so that each run has a folder
# of its own, and the same cell again continues where it was interrupted.

# %% tags=["parameters"]
settings = "loss=vqvae trainer.max_minutes=1.5 trainer.max_steps=null"
seeds = "0,1,2"

# %%
# !PYTHONPATH=. codegrid -m --config-dir=my_conf stage=vqgan quantizer=ema,nsvq seed={seeds} data.seed=0 sweep=own {settings}

# %% [markdown]
# ## The report
#
# Runs that differ in their seed alone are one configuration. The difference of two configurations is taken seed by
# seed.

# %%
report = train("stage=report", "runs=runs/sweeps/own")
for chart in report.metrics["charts"]:
    display(Picture(chart))

# %% [markdown]
# `report.html` in the report's folder is the whole page. What a run of your own class leaves names that class, and a
# later command imports it only if you say so:

# %%
[first, *_] = sorted(Path("runs/sweeps/own").glob("*nsvq*"))
evaluation = train(
    "stage=evaluate",
    f"ckpt={first}",
    "trust=[my_quantizers.NSVQ]",
    "proxy=0",  # PSNR and SSIM are enough here
    "inception=false",
    "lpips=null",
)
