"""Parts of large files that were read last, shared by all that read tiles in a process."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from numpy.typing import NDArray

from codegrid.data.values import UnreadableImage

Piece = NDArray[Any] | UnreadableImage

HELD_BYTES = 2**27  # of each process that reads: parts of pictures, and whole ones


class PieceCache:
    """The arrays that were loaded last, up to `limit` bytes together; the very last stays whatever its size.

    So memory has a bound, which is the limit or the largest array. Threads that want the same array wait for one to load it.
    An array that can't be loaded is remembered too, so that a broken picture is not tried for each of its tiles.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.clear()

    def clear(self) -> None:
        """Forget everything, locks too: a fork has those of the threads of its parent."""
        self._pieces: OrderedDict[Hashable, Piece] = OrderedDict()
        self._loading: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()
        self.num_bytes = 0

    def get(self, key: Hashable, load: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """The array of this key, from `load` if it is not held. Raises UnreadableImage."""
        with self._lock:
            piece = self._find(key)
            loading = self._loading.setdefault(key, threading.Lock()) if piece is None else None
        if loading is not None:
            with loading:
                with self._lock:
                    piece = self._find(key)
                if piece is None:
                    piece = self._load(key, load)
        if isinstance(piece, UnreadableImage):
            raise piece
        assert piece is not None
        return piece

    def _find(self, key: Hashable) -> Piece | None:
        if key in self._pieces:
            self._pieces.move_to_end(key)
        return self._pieces.get(key)

    def _load(self, key: Hashable, load: Callable[[], NDArray[Any]]) -> Piece:
        piece: Piece
        try:
            piece = load()
        except UnreadableImage as error:
            piece = error
        with self._lock:
            self._loading.pop(key, None)
            self._pieces[key] = piece
            self.num_bytes += count_bytes(piece)
            while self.num_bytes > self.limit and len(self._pieces) > 1:
                self.num_bytes -= count_bytes(self._pieces.popitem(last=False)[1])
        return piece


def count_bytes(piece: Piece) -> int:
    """What a piece takes in memory; an error takes next to nothing."""
    return 0 if isinstance(piece, UnreadableImage) else int(piece.nbytes)


held_pieces = PieceCache(HELD_BYTES)
os.register_at_fork(after_in_child=held_pieces.clear)
