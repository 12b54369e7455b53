"""Symbols to bytes and back by range coding (Martin 1979), by constriction's coder (Bamler 2022)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegrid.engine.errors import InputError
from prior.coding.frequencies import (
    TOTAL_FREQUENCY,
    IntArray,
    digit_base,
    group_weights,
    share_out,
)

WORD, STATE = 4, 8  # bytes of a word of the coder and of its state


class DamagedCode(Exception):
    """Bytes that no encoder wrote for these frequencies."""


def import_constriction() -> Any:
    """The package constriction. Raises InputError if it is missing."""
    try:
        import constriction
    except ImportError as error:
        raise InputError("the entropy coder is missing: pip install codegrid[codec]") from error
    return constriction


def categorical(stream: Any) -> Any:
    """The family of distributions whose frequencies are whole numbers.

    constriction turns D numbers that add up to TOTAL_FREQUENCY - D into frequencies that are greater by 1: its own scale is then
    exactly 1, and each of its sums is a whole number of at most 24 bits, which float32 holds.
    """
    return stream.model.Categorical(perfect=False)


class CodeWriter:
    """Codes of one image, one after the other, to bytes; `bits` is what they cost by their frequencies."""

    def __init__(self) -> None:
        self.bits = 0.0
        self.stream = import_constriction().stream
        self.encoder = self.stream.queue.RangeEncoder()
        self.family = categorical(self.stream)

    def write(self, codes: IntArray, weights: IntArray) -> None:
        """Add codes (m,) with the weights (m, K) of all codes."""
        symbols, frequencies = split_codes(codes, weights)
        self.encoder.encode(symbols.astype(np.int32), self.family, frequencies.astype(np.float32))
        own = frequencies[np.arange(len(symbols)), symbols] + 1
        self.bits -= float(np.log2(own / TOTAL_FREQUENCY).sum())

    def finish(self) -> bytes:
        """As few bytes as tell the codes apart, for a reader that adds zeros."""
        words: NDArray[np.uint32] = self.encoder.get_compressed()
        num_words, (lower, width) = self.encoder.pos()
        size = WORD * num_words + STATE  # of a number whose last bytes are the coder's state
        value = int.from_bytes(words.astype(">u4").tobytes().ljust(size, b"\0")[:size])
        # Every number from `first` on, `width` of them, is read as these codes.
        first = value - (value - lower) % 2 ** (8 * STATE)
        zeros = size
        while (shortest := -(-first >> 8 * zeros) << 8 * zeros) >= first + width:
            zeros -= 1
        return shortest.to_bytes(size)[: size - zeros]


class CodeReader:
    """Codes of one image from the bytes of a `CodeWriter`."""

    def __init__(self, payload: bytes) -> None:
        stream = import_constriction().stream
        size = -(-len(payload) // WORD) * WORD + 2 * STATE
        words = np.frombuffer(payload.ljust(size, b"\0"), ">u4").astype(np.uint32)
        self.decoder = stream.queue.RangeDecoder(words)
        self.family = categorical(stream)

    def read_symbol(self, frequencies: IntArray) -> int:
        """The next symbol, by what `share_out` returns for it, (D,)."""
        try:
            [symbol] = self.decoder.decode(self.family, frequencies[None].astype(np.float32))
        except AssertionError as error:  # a point beyond all frequencies
            raise DamagedCode(str(error)) from error
        return int(symbol)


def split_codes(codes: IntArray, weights: IntArray) -> tuple[IntArray, IntArray]:
    """Codes (m,) and the weights (m, K) of all codes -> the symbols (n,) that stand for them and their frequencies (n, D)."""
    K = weights.shape[1]
    base = digit_base(K)
    if base == K:
        return codes, share_out(weights)
    grouped = group_weights(weights)
    rows = np.arange(len(codes))
    first = codes // base
    symbols = np.stack([first, codes % base], 1).flatten()
    shares = np.stack([share_out(grouped.sum(2)), share_out(grouped[rows, first])], 1)
    return symbols, shares.reshape(-1, base)


def read_codes(readers: list[CodeReader | None], weights: IntArray) -> IntArray:
    """The next code (n,) of each image, by the weights (n, K) of all codes; 0 for those without a reader.

    A reader that meets damage is replaced by None.
    """
    n, K = weights.shape
    base = digit_base(K)

    def read(frequencies: IntArray) -> IntArray:
        symbols = np.zeros(n, dtype=np.int64)
        for i, reader in enumerate(readers):
            if reader is None:
                continue
            try:
                symbols[i] = reader.read_symbol(frequencies[i])
            except DamagedCode:
                readers[i] = None
        return symbols

    if base == K:
        return read(share_out(weights))
    grouped = group_weights(weights)
    first = read(share_out(grouped.sum(2)))
    is_code = first * base < K  # of damaged files it may be none
    first = np.where(is_code, first, 0)
    return np.minimum(first * base + read(share_out(grouped[np.arange(n), first])), K - 1)
