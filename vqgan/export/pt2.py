"""format=pt2: both directions as programs of torch.export, which run without the code of this one."""

import io
from pathlib import Path
from typing import Any

import torch
from torch.export import load, save

from vqgan.export.base import Example, Exporter, compare_graphs
from vqgan.export.graphs import export_graphs, select_examples
from vqgan.tokenizer import Tokenizer


class PT2Exporter(Exporter):
    name = "pt2"
    usage = """\
`encoder.pt2` and `decoder.pt2` are programs of `torch.export`:

```python
import torch

encode = torch.export.load("encoder.pt2").module()
decode = torch.export.load("decoder.pt2").module()
indices = encode(images)     # float32 (B, C, H, W) in [-1, 1] -> int64 (B, h, w), or (B, h, w, num_codebooks)
pictures = decode(indices)   # -> float32 (B, C, H, W) in [-1, 1]
```

h and w are at least 2, unless the tokenizer's own grid has fewer."""

    def check(self, tokenizer: Tokenizer) -> None:
        """Every tokenizer can be traced."""

    def encode_files(self, tokenizer: Tokenizer) -> dict[str, bytes]:
        files = {}
        for name, program in export_graphs(tokenizer).items():
            content = io.BytesIO()
            save(program, content)
            files[f"{name}.pt2"] = content.getvalue()
        return files

    @torch.no_grad()
    def verify(self, tokenizer: Tokenizer, folder: Path, examples: list[Example]) -> dict[str, Any]:
        encode, decode = (load(folder / f"{name}.pt2").module() for name in ("encoder", "decoder"))
        return compare_graphs(self.name, encode, decode, select_examples(tokenizer, examples))
