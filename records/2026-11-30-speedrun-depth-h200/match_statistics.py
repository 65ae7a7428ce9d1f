"""How often the token after the longest match comes next: python match_statistics.py data/python_source

The first 524,288 val tokens of shards in GPT-2's tokens. A match is that of nanosync/ngram_features.py. Two
of a length agree if the same token follows both.
"""

import glob
import sys
from collections import Counter

import numpy as np

END_OF_TEXT, LENGTHS, FAR = 50256, (1, 2, 4, 8, 16, 32), 2560


def documents(tokens: list[int]) -> list[list[int]]:
    starts = [t for t, token in enumerate(tokens) if t == 0 or token == END_OF_TEXT]
    return [tokens[a:b] for a, b in zip(starts, [*starts[1:], len(tokens)])]


def matches(ids: list[int], n: int) -> list[list[int]]:
    """Return the last two earlier positions, or fewer, up to which n tokens are those up to each position."""
    seen, found = {}, []
    for t in range(len(ids)):
        key = tuple(ids[t - n + 1:t + 1]) if t >= n - 1 else None
        found.append(seen.get(key, []))
        if key is not None:
            seen[key] = [t, *found[-1][:1]]
    return found


def main() -> None:
    path = sorted(glob.glob(f"{sys.argv[1]}/*_val_*.bin"))[0]
    found = documents(np.fromfile(path, np.uint16)[512:][:524288].tolist())
    kinds, far, total = Counter(), 0, sum(map(len, found))
    for ids in found:
        by_length = {n: matches(ids, n) for n in LENGTHS}
        for t, target in enumerate(ids[1:]):
            n = max((n for n in LENGTHS if by_length[n][t]), default=0)
            after = [ids[p + 1] for p in by_length[n][t]] if n else []
            kind = "" if len(after) < 2 else "agree" if after[0] == after[1] else "differ"
            kinds[n, kind, after[:1] == [target]] += 1
        far += sum(bool(at) and t - at[0] > FAR and ids[at[0] + 1] == ids[t + 1]
                   for t, at in enumerate(matches(ids, 5)[:-1]))
    long = sum(len(ids) for ids in found if len(ids) > 8192)
    print(f"{len(found)} documents, {long / total:.2f} of the tokens in those of more than 8,192")
    for n in (0, *LENGTHS):
        for kind in (None, "", "differ", "agree"):
            wrong, right = (sum(count for (length, name, hit), count in kinds.items()
                                if length == n and kind in (None, name) and hit == value)
                            for value in (False, True))
            if wrong + right:
                print(f"longest match {n:2} {'all' if kind is None else kind or 'single':6}: "
                      f"{(wrong + right) / total:.3f} of the tokens, right in {right / (wrong + right):.2f}")
    right = sum(count for (_, _, hit), count in kinds.items() if hit)
    print(f"right in {right / total:.3f} of the tokens; five tokens' match is right and over {FAR} tokens "
          f"away in {far / total:.3f}")


if __name__ == "__main__":
    main()
