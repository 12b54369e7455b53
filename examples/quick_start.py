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
# # From a folder of photos to samples
#
# Two models. A *tokenizer* turns an image into a small grid of codes and back. A *prior* learns which codes go
# together, and draws new grids, which the tokenizer decodes into new images.
#
# With these settings the notebook takes a quarter of an hour. It uses a GPU if there is one, and two CPU cores are
# enough.

# %% tags=["install"]
# %pip install --quiet codegrid

# %%
from pathlib import Path

from IPython.display import Image as Picture
from PIL import Image

from codegrid.data.shapes import draw_shapes
from prior import Prior
from vqgan import Tokenizer, train


def tile(pictures, columns):
    """Pictures of one size in rows of `columns`."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + 2), i // columns * (height + 2)))
    return sheet


# %% [markdown]
# ## Images
#
# Put your images into the folder `photos`, a few hundred at least; folders inside it are classes. Without one, the
# next cells fill it with built-in pictures.

# %% tags=["parameters"]
photos = Path("photos")
num_shapes = 4000  # pictures that fill the folder if there is none
data_settings = ["data.image_size=64", "data.n_val=200"]  # 200 images are held out to validate
tokenizer_settings = ["loss=vqvae", "trainer.max_minutes=6", "trainer.max_steps=null"]
prior_settings = ["prior/size=tiny", "trainer.max_minutes=5", "trainer.max_steps=null"]

# %%
if not photos.exists():
    photos.mkdir()
    for i, image in enumerate(draw_shapes(0, "train", range(num_shapes))[0]):
        Image.fromarray(image.transpose(1, 2, 0)).save(photos / f"{i:05}.png")
files = sorted(file for file in photos.rglob("*") if file.is_file())
len(files)

# %% [markdown]
# ## The tokenizer
#
# `train` takes the settings of the command `codegrid stage=vqgan ...` and returns the run's folder and figures. Each
# image becomes 8x8 codes out of 512, or 576 bits. PSNR says how close the decoded images are to the originals, in dB,
# and perplexity how many codes are in good use.
#
# Interrupt the kernel to stop early: the run is saved, and the last line says how to resume it.

# %%
tokenizer_run = train(
    "stage=vqgan",
    "data=folder",
    f"data.root={photos}",
    *data_settings,
    *tokenizer_settings,
)
print(f"PSNR {tokenizer_run.metrics['psnr']:.2f} dB")
print(f"perplexity {tokenizer_run.metrics['perplexity']:.0f} of {tokenizer_run.metrics['K']} codes")

# %% [markdown]
# Held-out images above, what their codes decode to below:

# %%
Picture(tokenizer_run.pictures[0])

# %% [markdown]
# Images to codes and back, in Python:

# %%
tokenizer = Tokenizer.from_pretrained(tokenizer_run.folder)
codes = tokenizer.encode_images(files[:8])
print(codes.shape)
print(codes[0])
tile(tokenizer.decode_codes(codes), columns=8)

# %% [markdown]
# ## The prior
#
# It learns the codes of all images. Its figure is nats per token: how surprised it is by the codes of held-out
# images. Compare it with the unigram, which knows how frequent each code is, and with the bigram, which knows the
# code before it too.

# %%
prior_run = train("stage=prior", f"ckpt={tokenizer_run.folder}", *prior_settings)
for name in ("nats_per_token", "bigram_nats_per_token", "unigram_nats_per_token"):
    print(f"{name:24}{prior_run.metrics[name]:.2f}")

# %% [markdown]
# ## Samples
#
# New images, drawn code by code. A smaller `top_p` leaves unlikely codes out: cleaner images, fewer kinds.

# %%
prior = Prior.from_pretrained(prior_run.folder)
tile(prior.sample(32, seed=0, top_p=0.9), columns=8)

# %% [markdown]
# The upper half of an image, completed eight times:

# %%
half = prior.grid[0] // 2
tile(prior.complete(files[0], rows=half, n=8, seed=0, top_p=0.9), columns=8)

# %% [markdown]
# Which images does the prior find the least likely? `nats` is the negative logarithm of the probability of an image's
# codes.

# %%
nats = prior.nats(files[:200])
order = nats.argsort(descending=True)[:8]
tile([Image.open(files[i]).convert("RGB").resize((64, 64)) for i in order], columns=8)

# %% [markdown]
# ## Elsewhere
#
# An export is a folder for other programs: weights as safetensors, the model card, and `decoder.py`, which needs
# torch and safetensors alone.

# %%
export = train("stage=export", f"ckpt={tokenizer_run.folder}", "format=safetensors")
sorted(file.name for file in export.folder.iterdir())
