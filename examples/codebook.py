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
# # Explore a codebook
#
# What has a tokenizer put into its codes? Five ways to look: how often each code is used, what each decodes to, what
# one code changes in an image, codes swapped for others, and the way from one image to another.
#
# With these settings the notebook takes six minutes. It uses a GPU if there is one, and two CPU cores are enough.

# %% tags=["install"]
# %pip install --quiet codegrid

# %%
import matplotlib.pyplot as plt
import torch
from PIL import Image

from codegrid.data.shapes import draw_shapes
from vqgan import Tokenizer, train
from vqgan.callbacks.codes import draw_atlas
from vqgan.pictures import to_pictures


def tile(pictures, columns):
    """Pictures of one size in rows of `columns`."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + 2), i // columns * (height + 2)))
    return sheet


# %% [markdown]
# ## A tokenizer
#
# `run_folder` may name a run of yours, trained or imported, with one codebook. Otherwise the next cell trains one on
# the built-in shapes.

# %% tags=["parameters"]
run_folder = None
settings = ["loss=vqvae", "trainer.max_minutes=5", "trainer.max_steps=null"]
num_images = 1000

# %%
if run_folder is None:
    run_folder = train("stage=vqgan", *settings).folder
tokenizer = Tokenizer.from_pretrained(run_folder)
K, (h, w) = tokenizer.K, tokenizer.grid
pixels, _ = draw_shapes(1, "val", range(num_images), size=h * tokenizer.f)
images = [Image.fromarray(image.transpose(1, 2, 0)) for image in pixels]  # or paths of your own
codes = tokenizer.encode_images(images)
print(f"{h}x{w} codes out of {K}: {tuple(codes.shape)}")
tile(images[:8] + tokenizer.decode_codes(codes[:8]), columns=8)

# %% [markdown]
# ## Usage
#
# Perplexity is the number of equally frequent codes that have the entropy of these. The scale is logarithmic, because
# one code, the black background of the shapes, is far more frequent than any other.

# %%
counts = codes.flatten().bincount(minlength=K)
p = counts / counts.sum()
perplexity = torch.xlogy(p, p).sum().neg().exp()
plt.figure(figsize=(8, 2))
plt.bar(range(K), counts.sort(descending=True).values, width=1)
plt.yscale("log")
plt.xlabel("codes, the most frequent first")
plt.ylabel("times")
plt.title(f"{(counts > 0).sum()} of {K} codes in use, perplexity {perplexity:.0f}")
plt.show()

# %% [markdown]
# ## Atlas
#
# What each code decodes to in a grid that holds nothing else: from dark to bright, and within a row from blue to red.
# Unused codes follow, faded.

# %%
atlas = draw_atlas(tokenizer, counts[None])
Image.fromarray(atlas.movedim(0, -1).numpy())

# %% [markdown]
# ## One code
#
# The code in the middle of an image, replaced by sixteen others. More than its own patch changes, because the decoder
# reads a code together with its neighbours.

# %%
changed = codes[:1].repeat(16, 1, 1)
changed[:, h // 2, w // 2] = torch.linspace(0, K - 1, 16).long()
tile(tokenizer.decode_codes(changed), columns=8)

# %% [markdown]
# ## Swaps
#
# First row: eight images from their codes. Second row: each code replaced by the one nearest to it in the codebook.
# Third row: by a random one. The second row shows whether codes that lie near each other mean similar things.

# %%
codebook = tokenizer.quantizer.codebooks()[0]  # (K, dim)
distances = torch.cdist(codebook, codebook).fill_diagonal_(torch.inf)
neighbour = distances.argmin(1)
shuffled = torch.randperm(K, generator=torch.Generator().manual_seed(0))
rows = torch.cat([codes[:8], neighbour[codes[:8]], shuffled[codes[:8]]])
tile(tokenizer.decode_codes(rows), columns=8)

# %% [markdown]
# The upper half of one image on the lower half of the next:

# %%
mixed = codes[:8].clone()
mixed[:, h // 2 :] = codes[1:9, h // 2 :]
tile(tokenizer.decode_codes(mixed), columns=8)

# %% [markdown]
# ## From one image to another
#
# Straight lines between the codes' vectors of two images. First row: decoded as they are. Second row: the nearest
# codes, decoded. Do shapes move, or does one image fade into the other?

# %%
with torch.no_grad():
    start, end = tokenizer.quantizer.lookup(codes[:2])  # (dim, h, w) each
    steps = torch.linspace(0, 1, 8)[:, None, None, None]
    between = torch.lerp(start, end, steps)
    nearest = tokenizer.quantizer(between).indices
    continuous = to_pictures(tokenizer.decode(between))
tile(continuous + tokenizer.decode_codes(nearest), columns=8)
