"""The codes of another image, which a prior reads before its own."""

import torch
from torch import Tensor, nn

from prior.models.inputs import CodeEmbedding
from prior.models.transformer import rotary


class Front(nn.Module):
    """Codes of another image as a sequence in front of the prior's own (VQGAN, Esser et al. 2021, section 3.2).

    Several codes of a position are summed. Each position has a vector of its own, and its rotary angles are those of the place
    in the prior's grid that shows the same part of the picture. Without a label, every position reads one learned vector.
    """

    angles: Tensor

    def __init__(
        self,
        codebook: Tensor,
        grid: tuple[int, int],
        width: int,
        inputs: str,
        angles: Tensor,
    ) -> None:
        """codebook (num_codebooks, K, dim) and grid of the other image's tokenizer; inputs as in CodeEmbedding; angles as from
        `scaled_rotary`, empty (T, 0) for a prior without attention."""
        super().__init__()
        self.num_codebooks, self.K = codebook.shape[:2]
        self.grid, self.T = grid, grid[0] * grid[1]
        self.read = nn.ModuleList(CodeEmbedding(vectors, width, inputs) for vectors in codebook)
        self.blank = nn.Parameter(torch.zeros(width))
        self.place = nn.Parameter(0.02 * torch.randn(self.T, width))
        self.register_buffer("angles", angles, persistent=False)

    @property
    def L(self) -> int:
        """The length of a label: the codes of one image."""
        return self.T * self.num_codebooks

    def forward(self, n: int, labels: Tensor | None) -> Tensor:
        """labels (n, L) int64, a position's codebooks one after the other, -1 for no image; or None -> (n, T, width)."""
        if labels is None:
            return (self.blank + self.place).expand(n, -1, -1)
        codes = labels.unflatten(1, (self.T, self.num_codebooks))
        by_book = codes.clamp(min=0).unbind(2)
        vectors = [read(code) for read, code in zip(self.read, by_book, strict=True)]
        summed = torch.stack(vectors).sum(0)
        return torch.where(codes[..., :1] < 0, self.blank, summed) + self.place


def scaled_rotary(grid: tuple[int, int], own: tuple[int, int], size: int) -> Tensor:
    """Rotary angles of a grid that shows the same picture as the grid `own`, in units of the latter's positions: (h*w, 1, 1,
    size / 2)."""
    angles = rotary(grid, size)
    columns = size // 2 // 2  # channel pairs that turn with the column, by `rotary`
    rows = size // 2 - columns
    scale = torch.tensor([own[0] / grid[0]] * rows + [own[1] / grid[1]] * columns)
    return angles * scale


def join_angles(front: Tensor, angles: Tensor) -> Tensor:
    """Angles (..., T, 1 or 2, 1, size / 2) of the prior's own steps after those of the front (F, 1, 1, size / 2)."""
    before = front.expand(*angles.shape[:-4], len(front), *angles.shape[-3:])
    return torch.cat([before, angles], -4)
