"""Codes to bytes: against a decoder that is written from docs/codec.md alone."""

import math

import numpy as np
import pytest

from prior.coding.coder import CodeReader, CodeWriter, read_codes, split_codes
from prior.coding.frequencies import TOP_WEIGHT, IntArray, digit_base


def decode_slowly(payload: bytes, frequencies: list[list[int]]) -> list[int]:
    """Symbols by range coding in whole numbers, with words of 32 bits, a state of 64, and frequencies that add up to 2^24."""
    stream = payload + bytes(64)
    lower, width, position = 0, 2**64 - 1, 8
    point = int.from_bytes(stream[:8])
    symbols = []
    for row in frequencies:
        scale = width >> 24
        place = (point - lower) % 2**64 // scale
        before, symbol = 0, 0
        while before + row[symbol] <= place:
            before, symbol = before + row[symbol], symbol + 1
        symbols.append(symbol)
        lower, width = (lower + scale * before) % 2**64, scale * row[symbol]
        if width < 2**32:
            word = int.from_bytes(stream[position : position + 4])
            point = (point << 32 | word) % 2**64
            lower, width, position = (lower << 32) % 2**64, width << 32, position + 4
    return symbols


def draw_message(K: int, T: int, seed: int) -> tuple[IntArray, IntArray]:
    """Codes (T,) and weights (T, K), of which some are very small."""
    rng = np.random.default_rng(seed)
    weights = np.exp2(rng.uniform(0, 28, (T, K)) * rng.uniform(0, 1, (T, 1))).astype(np.int64)
    return rng.integers(0, K, T), np.clip(weights, 1, TOP_WEIGHT)


def write(codes: IntArray, weights: IntArray) -> bytes:
    writer = CodeWriter()
    writer.write(codes, weights)
    return writer.finish()


def count_bits(codes: IntArray, weights: IntArray) -> float:
    """What a message costs by its frequencies."""
    symbols, shares = split_codes(codes, weights)
    return sum(24 - math.log2(row[symbol] + 1) for row, symbol in zip(shares, symbols, strict=True))


@pytest.mark.parametrize("K", [2, 3, 40, 1500])
def test_a_decoder_written_from_the_description_reads_the_bytes(K: int) -> None:
    for seed in range(20):
        codes, weights = draw_message(K, 1 + seed, seed)
        symbols, shares = split_codes(codes, weights)
        assert decode_slowly(write(codes, weights), (shares + 1).tolist()) == symbols.tolist()


@pytest.mark.parametrize("K", [2, 3, 40, 1500])
def test_codes_are_read_as_they_were_written(K: int) -> None:
    messages = [draw_message(K, 30, seed) for seed in range(10)]
    readers: list[CodeReader | None] = [CodeReader(write(*message)) for message in messages]
    for t in range(30):
        weights = np.stack([weights[t] for _, weights in messages])
        assert read_codes(readers, weights).tolist() == [codes[t] for codes, _ in messages]


@pytest.mark.parametrize("K", [2, 300, 5000])
def test_the_end_costs_less_than_two_bytes(K: int) -> None:
    """The sealed words of the coder alone would cost up to eight."""
    for seed in range(40):
        codes, weights = draw_message(K, 1 + seed // 4, seed)
        writer = CodeWriter()
        writer.write(codes, weights)
        assert writer.bits == pytest.approx(count_bits(codes, weights))
        assert -1 <= len(writer.finish()) - writer.bits / 8 < 1.2


def test_codes_may_be_written_in_parts() -> None:
    codes, weights = draw_message(40, 12, 0)
    writer = CodeWriter()
    writer.write(codes[:5], weights[:5])
    writer.write(codes[5:], weights[5:])
    assert writer.finish() == write(codes, weights)


def test_the_bytes_of_a_message_never_change() -> None:
    """Or files that are there could not be read; a new version of constriction has to pass this."""
    codes, weights = np.arange(12), np.arange(1, 12 * 16 + 1, dtype=np.int64).reshape(12, 16) ** 3
    assert write(codes, weights).hex() == "000012a22d4e1e"


def test_any_bytes_are_read_as_codes_or_as_damage() -> None:
    rng = np.random.default_rng(0)
    _, weights = draw_message(1500, 20, 0)
    for _ in range(20):
        readers: list[CodeReader | None] = [CodeReader(rng.bytes(int(rng.integers(0, 30))))]
        for row in weights:
            [code] = read_codes(readers, row[None])
            assert 0 <= code < 1500


@pytest.mark.parametrize(
    ("K", "base"), [(2, 2), (1024, 1024), (1025, 64), (4096, 64), (2**18, 512)]
)
def test_many_codes_are_two_symbols_of_one_size(K: int, base: int) -> None:
    assert digit_base(K) == base
