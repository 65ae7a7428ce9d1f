"""Matches of the tokens before a position, against a search token by token. CPU; seconds.

    python -m pytest tests/unit/test_ngram_features.py
"""

import pytest
import torch

from kernels.interval_attention import first_visible
from models.modeling_nanosync import hashed
from models.modeling_nanosync import suffix_matches as exported_matches
from nanosync.ngram_features import LEVELS, SuffixMatch, ngram_rows, suffix_matches

EOT = 0


def searched(sequence: list[int], end_of_text: int | None) -> list[tuple[int, int]]:
    """Return (token after the longest match, its level) of each position."""
    found, begin = [], 0
    for t, token in enumerate(sequence):
        begin = t if token == end_of_text else begin
        best = (0, 0)
        for level in range(1, LEVELS + 1):
            n = 2 ** (level - 1)
            if t - n + 1 >= begin:
                ends = [s for s in range(begin + n - 1, t)
                        if sequence[s - n + 1:s + 1] == sequence[t - n + 1:t + 1]]
                best = (sequence[ends[-1] + 1], level) if ends else best
        found.append(best)
    return found


def repeated(seed: int, T: int) -> torch.Tensor:
    """Three sequences: of few tokens, with copies of up to 40 tokens, and periodic."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randint(0, 3, (T,), generator=generator)
    copies = torch.randint(0, 50, (T,), generator=generator)
    for _ in range(T // 20):
        n, a, b = (int(torch.randint(1, high, (1,), generator=generator)) for high in (41, T, T))
        n = min(n, T - max(a, b))
        copies[b:b + n] = copies[a:a + n].clone()
    return torch.stack((few, copies, torch.arange(T) % 7 + 1))


@pytest.mark.parametrize("end_of_text", [EOT, None])
@pytest.mark.parametrize("seed, T", [(0, 1), (1, 2), (2, 33), (3, 70), (4, 200), (5, 200)])
def test_matches_against_a_search(seed, T, end_of_text):
    idx = repeated(seed, T)
    expected = torch.tensor([searched(sequence, end_of_text) for sequence in idx.tolist()])
    for function, ids in ((suffix_matches, idx), (suffix_matches, idx.int()), (exported_matches, idx)):
        found = torch.stack(function(ids, first_visible(ids, end_of_text)), dim=-1)
        assert torch.equal(found, expected)
    if T == 200:
        assert set(expected[..., 1].unique().tolist()) == set(range(LEVELS + 1))  # all levels occur


def test_matches_of_large_ids_do_not_depend_on_later_tokens():
    """Ids as large as a vocabulary can have; a prefix has the same matches."""
    idx = repeated(6, 150) * 2**30
    whole = suffix_matches(idx, first_visible(idx, None))
    for T in (1, 40, 149):
        part = suffix_matches(idx[:, :T], first_visible(idx[:, :T], None))
        assert all(torch.equal(a, b[:, :T]) for a, b in zip(part, whole))


def test_keys_of_long_sequences_do_not_wrap():
    """Keys are below T^2. In 32 bits the key of the last two tokens would be that of the tokens 9 and 10."""
    T, before, last = 70002, 64597, 61364
    assert (last * T + before) % 2**32 == 10 * T + 9
    idx = torch.cat((torch.arange(T - 2), torch.tensor([before, last])))[None]
    token, level = suffix_matches(idx, first_visible(idx, None))
    assert not level[0, :-2].any() and level[0, -2:].tolist() == [1, 1]
    assert token[0, -2:].tolist() == [before + 1, last + 1]


def test_rows_and_shares_of_a_match():
    torch.manual_seed(0)
    match, embedding = SuffixMatch(2, 8), torch.nn.Embedding(9, 8)
    with torch.no_grad():
        for p in match.parameters():
            p.normal_()
    idx = torch.tensor([[1, 2, 1, 2]])
    rows, shares = match(idx, first_visible(idx, None), embedding, 0, torch.float32)
    assert torch.equal(shares[0, :2], torch.zeros(2, 2))  # no match
    for t, token, level in ((2, 2, 1), (3, 1, 2)):
        unit = embedding.weight[token] / embedding.weight[token].square().mean().sqrt()
        assert torch.allclose(rows[0, t], match.rows[level - 1] + unit, atol=1e-4)
        assert torch.allclose(shares[0, t], match.shares[:, level - 1])
    tail = match(idx, first_visible(idx, None), embedding, 3, torch.float32)
    assert torch.equal(tail[0], rows[:, 3:]) and torch.equal(tail[1], shares[:, 3:])


def test_rows_of_pairs():
    """In a document of one token, at the beginning of the sequence, and of a document: the last row."""
    idx = torch.tensor([[5, 6, EOT, EOT, 5, 6]])
    rows = ngram_rows(idx, idx == EOT, 2, 1000)
    pair = (36313 * 6 ^ 27191 * 5) % 999
    assert rows.tolist() == [[999, pair, 999, 999, (36313 * 5) % 999, pair]]


def test_rows_of_triples():
    """The last row also for the second token of a document, and of the sequence."""
    idx = torch.tensor([[5, 6, 4, EOT, 5, 6, EOT, 3], [2, EOT, 1, 2, 3, EOT, EOT, 4]])
    rows = ngram_rows(idx, idx == EOT, 3, 1000)

    def row(before_last, last, token):
        return (36313 * token ^ 27191 * last ^ 50591 * before_last) % 999

    assert rows.tolist() == [[999, 999, row(5, 6, 4), 999, 999, row(EOT, 5, 6), 999, 999],
                             [999, 999, 999, row(EOT, 1, 2), row(1, 2, 3), 999, 999, 999]]
    for T in (1, 2, 3):
        assert torch.equal(ngram_rows(idx[:, :T], idx[:, :T] == EOT, 3, 1000), rows[:, :T])


@pytest.mark.parametrize("n", [2, 3])
def test_rows_of_an_exported_model_and_of_int32_ids(n):
    """Ids of GPT-2's vocabulary times the hash's factors exceed int32."""
    idx = torch.randint(0, 50257, (3, 64), generator=torch.Generator().manual_seed(1))
    idx[:, ::7] = EOT
    for T in (1, 2, 3, 64):
        ids, begins = idx[:, :T], idx[:, :T] == EOT
        rows = ngram_rows(ids, begins, n, 251520)
        for found in (ngram_rows(ids.int(), begins, n, 251520), hashed(ids, begins, n, 251520),
                      hashed(ids.int(), begins, n, 251520)):
            assert torch.equal(found, rows)
