"""Hashes of the 13-grams of words of many texts at once, by which an overlap of two texts is found.

A word is a run of letters and digits of ASCII, in lower case, or of bytes beyond ASCII. So case, punctuation
and white space make no difference, and the tokenizer does not either. A hash is a polynomial in an odd number
modulo 2**64; prefix sums give the hashes of all words, and of all n-grams of words, without a loop.
"""

from collections.abc import Iterable, Iterator

import numpy as np

N = 13  # words of an n-gram, as in the report on GPT-3's data (arXiv 2005.14165)
BLOCK = 1 << 16  # bytes of text at a time, which stay in the processor's cache
_LETTERS = np.array([c if c >= 128 or chr(c).isalnum() else 0 for c in range(256)], np.uint8)
_LETTERS[65:91] = np.arange(97, 123)  # upper case -> lower case
_BASE = 0x9E3779B97F4A7C15
_powers = np.zeros(0, np.uint64)  # of _BASE
_inverse_powers = np.zeros(0, np.uint64)


def hashes_of_ngrams(texts: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of all n-grams, and the number of the text of each. No n-gram crosses two texts."""
    found, some, numbers, size = [(np.zeros(0, np.uint64), np.zeros(0, np.int64))], [], [], 0
    for number, text in enumerate(texts):
        for part in _parts(text):
            if size + len(part) > BLOCK:
                found.append(_hashes_of_block(some, np.array(numbers)))
                some, numbers, size = [], [], 0
            some.append(part)
            numbers.append(number)
            size += len(part)
    found.append(_hashes_of_block(some, np.array(numbers)))
    hashes, of_text = map(np.concatenate, zip(*found))
    return hashes, of_text


def _parts(text: bytes) -> Iterator[bytes]:
    """Yield parts of up to BLOCK bytes. Each n-gram is in one of them: a part begins with the last N - 1
    words of the part before it."""
    while len(text) > BLOCK:
        starts, ends = _words(_LETTERS[np.frombuffer(text[:BLOCK], np.uint8)])
        if len(starts) > N and ends[-1] == BLOCK:
            starts, ends = starts[:-1], ends[:-1]  # the part may end inside this word
        whole = len(starts) > N and starts[1 - N] > 0
        yield text[:ends[-1] if whole else BLOCK]
        text = text[starts[1 - N] if whole else BLOCK:]
    yield text


def _words(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the starts and ends of the words."""
    inside = np.concatenate(([False], codes > 0, [False]))
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    return edges[::2], edges[1::2]


def _hashes_of_block(texts: list[bytes], numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return hashes and text numbers of the n-grams of texts with these numbers."""
    codes = _LETTERS[np.frombuffer(b" ".join(texts), np.uint8)]
    starts, ends = _words(codes)
    if len(starts) < N:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    words = _hashes_of_ranges(codes.astype(np.uint64), starts, ends)
    first = np.arange(len(words) - N + 1)
    hashes = _hashes_of_ranges(words, first, first + N)
    of_word = np.searchsorted(np.cumsum([len(text) + 1 for text in texts]), starts, side="right")
    whole = of_word[:-N + 1] == of_word[N - 1:]
    return hashes[whole], numbers[of_word[:-N + 1][whole]]


def _hashes_of_ranges(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return a hash of values[start:end] for each range: (n,) uint64."""
    powers, inverse_powers = _tables(len(values))
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * powers, out=sums[1:])
    hashes = (sums[ends] - sums[starts]) * inverse_powers[starts]
    hashes ^= hashes >> np.uint64(31)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    return hashes ^ hashes >> np.uint64(29)


def _tables(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first n powers of _BASE and of its inverse modulo 2**64."""
    global _powers, _inverse_powers
    if len(_powers) < n:
        both = np.array([[_BASE], [pow(_BASE, -1, 2**64)]], np.uint64).repeat(2 * n, axis=1)
        both[:, 0] = 1
        _powers, _inverse_powers = np.multiply.accumulate(both, axis=1)
    return _powers[:n], _inverse_powers[:n]
