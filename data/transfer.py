"""Batches on their way to a GPU, while it still computes."""

from collections.abc import Callable

import torch

from codegrid.data.readers import Batch


class CopyStream:
    """A stream of a GPU that copies batches while the GPU computes an earlier update.

    The host runs ahead of the GPU, and on the stream of the updates a copy would begin only after the update before. From
    pinned memory (data/loading.py) the host does not wait for a copy either.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def copy(self, batch: Batch, to_device: Callable[[Batch], Batch]) -> Batch:
        """The batch as `to_device` copies it; what is computed from it from now on waits for the copy, the host does not."""
        updates = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            copied = to_device(batch)
        updates.wait_stream(self.stream)
        for part in copied:
            part.record_stream(updates)  # or its memory might be filled again while it is read
        return copied
