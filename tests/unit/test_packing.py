"""Packed documents: cuts, order, rows and state. CPU, no processes; a second.

    python -m pytest tests/unit/test_packing.py
"""

import json

import numpy as np
import pytest
import torch
from helpers import write_dataset, write_shard

from nanosync.dataloader import DataLoader, Split, epoch_messages, evaluation_batches, open_dataset
from nanosync.errors import UserError
from nanosync.packing import Grid, PackedSplit
from nanosync.tokenizers import end_of_text

CPU = torch.device("cpu")
EOT = 999
T = 64  # slack 2, spacing 62


def documents(seed: int, n_tokens: int, mean: float, dtype="<u2") -> np.ndarray:
    """Tokens below 900 with an end-of-text token every `mean` tokens."""
    random = np.random.RandomState(seed)
    tokens = random.randint(900, size=n_tokens).astype(dtype)
    tokens[random.rand(n_tokens) < 1 / mean] = EOT
    return tokens


def dataset(folder, kind: str, *files: np.ndarray, end_of_text: int | None = EOT):
    """Open a data set of the given train files; all formats have a val file of 300 tokens."""
    folder.mkdir()
    dtype = files[0].dtype
    named = {f"x_train_{i}": tokens for i, tokens in enumerate(files)}
    for name, tokens in (named | {"x_val_0": documents(9, 300, 20).astype(dtype)}).items():
        if kind == "bin":
            tokens.tofile(folder / f"{name.split('_')[1]}.bin")
        elif kind == "shards":
            write_shard(folder / f"{name}.bin", tokens)
        else:
            np.save(folder / f"{name}.npy", tokens)
    meta = {"vocab_size": 1000, "tokenizer": "own", "dtype": dtype.name, "end_of_text": end_of_text}
    (folder / "meta.json").write_text(json.dumps(meta))
    return open_dataset(str(folder), T, train_split=PackedSplit)


def kinds(tmp_path):
    """Data sets of all formats, dtypes and lengths of documents."""
    yield dataset(tmp_path / "a", "bin", documents(0, 1000, 15)).train
    yield dataset(tmp_path / "b", "shards", documents(1, 500, 200), documents(2, 1, 5), documents(3, 40, 9),
                  documents(4, T + 1, 9), documents(5, 130, 3)).train
    yield dataset(tmp_path / "c", "npy", documents(6, 700, 1e9, "<u4"), documents(7, 333, 2, "<u4")).train
    yield dataset(tmp_path / "d", "bin", documents(0, 777, 15), end_of_text=None).train
    yield dataset(tmp_path / "e", "bin", np.full(400, EOT, "<u2")).train


def epoch_of(split, epoch: int, seed: int = 3) -> np.ndarray:
    return split.order(seed).places(epoch * split.n_windows, split.n_windows)


def test_every_length_has_valid_cuts():
    """For all short files and rows, every offset: sequences of 1 to T inputs, wherever the cuts move."""
    for T in [*range(1, 12), 31, 32, 33, 64, 100]:
        for n_tokens in range(1, 6 * T + 3):
            grid = Grid(n_tokens, T)
            least, most = grid.offsets
            assert least <= most and grid.sequences <= 2 + n_tokens // grid.spacing
            assert (grid.sequences == 1) == (1 <= n_tokens - 1 <= T)
            for offset in {least, most}:
                cuts = [grid.cut(np.zeros(n_tokens), None, i, offset) for i in range(grid.sequences + 1)]
                lengths = np.diff(cuts)
                assert cuts[0] == 0 and cuts[-1] == (n_tokens - 1 if grid.sequences else 0)
                assert all(0 < n <= T for n in lengths), (T, n_tokens, offset, lengths)
                moved = [grid.slack * (0 < i <= grid.cuts) for i in range(len(cuts))]
                assert all(n + further <= T and n - here > 0
                           for n, here, further in zip(lengths, moved, moved[1:]))
                if grid.sequences > 1:
                    assert min(lengths) >= grid.spacing // 4


def test_each_token_is_an_input_once_an_epoch(tmp_path):
    for split in kinds(tmp_path):
        epochs = []
        for epoch in range(4):
            places = epoch_of(split, epoch)
            count = [np.zeros(len(f), int) for f in split.files]
            for file, start, first, end in places:
                assert start == max(0, end - T) and start <= first < end <= start + T
                count[file][first:end] += 1
            assert all((c[:-1] == 1).all() and c[-1] == 0 for c in count)
            epochs.append(tuple(map(tuple, places)))
        assert len(set(epochs)) == 4
        assert split.n_windows * (T - 4) <= split.n_tokens + T * len(split.files) * 2


def test_rows_are_the_file_and_context_has_no_targets(tmp_path):
    for split in kinds(tmp_path):
        order, n = split.order(5), split.n_windows
        for sample in range(2 * n):
            (file, start, first, end), = places = order.places(sample, 1)
            loader = DataLoader.__new__(DataLoader)  # without its thread
            loader.split, loader.order, loader.batch_size = split, order, 1
            loader.device, loader.vocab_size = CPU, 1000
            x, y = (t[0].numpy() for t in loader._batch(sample))
            tokens = split.files[file].astype(int)
            rows = np.arange(start, start + T)
            inside = rows < len(tokens)
            assert x.dtype == y.dtype == np.int64 and x.shape == y.shape == (T,)
            assert (x[inside] == tokens[rows[inside]]).all()
            assert (x[~inside] == (split.end_of_text or 0)).all()
            counted = (rows >= first) & (rows < end)
            assert (y[~counted] == -1).all() and (y[counted] == tokens[rows[counted] + 1]).all()
            assert split.gather(places).dtype == split.dtype


def test_cuts_are_at_the_first_document_start_within_the_slack(tmp_path):
    split = dataset(tmp_path / "a", "bin", documents(0, 20_000, 15)).train
    tokens, at_start, moved = split.files[0], 0, 0
    for epoch in range(3):
        order = split.order(3)
        firsts = sorted(order.places(epoch * split.n_windows, split.n_windows)[:, 2])
        grid, offset, _ = order._grid(epoch, 0)
        for number, first in enumerate(firsts[1:]):
            place = offset + number * grid.spacing
            near = tokens[place:place + grid.slack + 1].tolist()
            assert first == place + (near.index(EOT) if EOT in near else 0)
            at_start += tokens[first] == EOT
            moved += first > place
    assert at_start > 100 and moved > 50


def test_end_of_text_at_the_ends(tmp_path):
    """Every token ends a text, in a file of all lengths about T."""
    for n in (2, 3, T - 1, T, T + 1, T + 2, 2 * T, 2 * T + 1, 3 * T):
        tokens = np.arange(n, dtype="<u2")
        tokens[[0, -1]] = EOT
        split = dataset(tmp_path / str(n), "bin", tokens).train
        for epoch in range(5):
            places = epoch_of(split, epoch)
            assert (places[:, 3] - places[:, 2]).sum() == n - 1 and (places[:, 2] < places[:, 3]).all()


def test_only_tokens_near_cuts_are_read(tmp_path):
    """Places of a few sequences of a long file read at most slack + 1 tokens for each cut."""
    class Counting(np.ndarray):
        def __getitem__(self, key):
            read.append(key.stop - key.start)
            return np.asarray(self)[key]

    split, read = dataset(tmp_path / "a", "bin", documents(0, 50_000, 15)).train, []
    split.files[0] = split.files[0].view(Counting)
    split.order(3).places(100, 4)
    assert 4 <= len(read) <= 8 and max(read) <= T // 32 + 1


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_global_batches_are_the_same_for_any_number_of_ranks(tmp_path, world_size):
    for split in kinds(tmp_path):
        places = split.order(11).places(0, 64)
        windows = split.gather(places)[:, :-1].tolist()
        loaders = [DataLoader(split, 2, 8 // world_size, 1000, 11, CPU, rank, world_size)
                   for rank in range(world_size)]
        rows = [row for _ in range(4) for loader in loaders for _ in range(8 // world_size)
                for row in loader.next()[0].tolist()]
        assert rows == windows
        assert {loader.epoch for loader in loaders} == {64 // split.n_windows}
        for loader in loaders:
            loader.close()


def test_resumes_anywhere(tmp_path):
    for split in kinds(tmp_path):
        one = DataLoader(split, 2, 3, 1000, 11, CPU)
        for _ in range(3 * 5):
            one.next()
        two = DataLoader(split, 2, 3, 1000, 11, CPU, sample=one.sample)
        assert (one.epoch, one.sample) == (two.epoch, two.sample) == (30 // split.n_windows, 30)
        for _ in range(12):
            for a, b in zip(one.next(), two.next()):
                assert torch.equal(a, b)
        one.close()
        two.close()


def test_order_does_not_change_between_versions(tmp_path):
    """Golden: a resumed run must see the order that it began with."""
    split = dataset(tmp_path / "a", "bin", documents(0, 1000, 15)).train
    assert split.order(1337).places(0, 4)[:, 1:].tolist() == [
        [935, 982, 999], [794, 796, 858], [298, 300, 362], [50, 52, 114]]
    later = split.order(1337).places(5 * split.n_windows, 2)
    assert later[:, 1:].tolist() == [[935, 946, 999], [78, 78, 142]]


def test_shards_keep_their_order_in_epoch_0_only(tmp_path):
    split = dataset(tmp_path / "b", "shards", documents(1, 500, 50), documents(3, 300, 9)).train
    places = epoch_of(split, 0)
    assert (np.lexsort((places[:, 2], places[:, 0])) == np.arange(len(places))).all()
    later = epoch_of(split, 1)
    assert (np.lexsort((later[:, 2], later[:, 0])) != np.arange(len(later))).any()
    assert len(set(later[:-1, 0][np.diff(later[:, 0]) != 0])) == 1  # shard by shard
    assert epoch_messages(split, 0, 1)[1] == "Shuffled 2 training shards for epoch 1"


def test_evaluation_keeps_its_windows(tmp_path):
    data = dataset(tmp_path / "a", "shards", documents(0, 500, 15), documents(1, 30, 15))
    plain = Split(str(tmp_path / "a"), "train", T)
    assert type(data.val) is Split and data.train.eval_windows == plain.eval_windows == [7, 0]
    for ours, theirs in zip(evaluation_batches(data.train, 5, 2, CPU), evaluation_batches(plain, 5, 2, CPU)):
        assert all(map(torch.equal, ours, theirs))


def test_problems(tmp_path):
    """Tokens beyond the vocabulary, a split without a target, a wrong end_of_text."""
    tokens = documents(0, 300, 20)
    tokens[200] = 1500
    split = dataset(tmp_path / "a", "bin", tokens).train
    with pytest.raises(UserError, match="has token 1500 at position 200, but the vocabulary has 1000"):
        split.check_tokens(1000)
    loader = DataLoader(split, 2, 1, 1000, 0, CPU)
    with pytest.raises(UserError, match="has token 1500 at position 200, but the vocabulary has 1000"):
        for _ in range(10):
            loader.next()
    loader.close()
    with pytest.raises(UserError, match=r"block_size=64 needs 2 tokens .*at most 1: prepare more"):
        dataset(tmp_path / "b", "shards", documents(0, 1, 20), documents(1, 1, 20))
    folder = write_dataset(tmp_path / "c", tokens, tokens, 1000, chars="", end_of_text=1000)
    with pytest.raises(UserError, match="end_of_text=1000 is not a token of vocab_size=1000: correct it"):
        open_dataset(str(folder), T)
    for value, words in ((-1, "end_of_text=-1 is"), ("x", "no usable 'end_of_text'"), (True, "no usable")):
        (folder / "meta.json").write_text(json.dumps(
            {"vocab_size": 1000, "tokenizer": "own", "end_of_text": value}))
        with pytest.raises(UserError, match=words):
            open_dataset(str(folder), T)


@pytest.mark.parametrize("meta, token", [
    (None, 50256), ({"tokenizer": "gpt2", "vocab_size": 50257}, 50256),
    ({"tokenizer": "gpt2", "vocab_size": 9}, None), ({"tokenizer": "char", "vocab_size": 60000}, None),
    ({"tokenizer": "own", "vocab_size": 9}, None),
    ({"tokenizer": "own", "vocab_size": 9, "end_of_text": 0}, 0),
    ({"tokenizer": "gpt2", "vocab_size": 50257, "end_of_text": None}, 50256)])
def test_end_of_text_of_a_tokenizer(meta, token):
    assert end_of_text(meta) == token
