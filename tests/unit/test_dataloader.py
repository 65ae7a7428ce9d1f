"""Order, slices, state and evaluation windows of the data loader. CPU, no processes; seconds.

    python -m pytest tests/unit/test_dataloader.py
"""

import json

import numpy as np
import pytest
import torch
from helpers import write_dataset, write_shard

from nanosync import dataloader, token_files
from nanosync.dataloader import DataLoader, Split, WindowOrder, evaluate, evaluation_batches, open_dataset
from nanosync.errors import UserError

CPU = torch.device("cpu")
T = 8


@pytest.fixture
def flat(tmp_path):
    """A flat data set in which token i is i, so a window shows where it starts."""
    write_dataset(tmp_path / "flat", np.arange(500), np.arange(100), 500, chars="")
    return tmp_path / "flat"


@pytest.fixture
def shards(tmp_path):
    """Three shards of 100, 60 and 41 tokens, which together count up."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for i, (a, b) in enumerate([(0, 100), (100, 160), (160, 201)]):
        write_shard(folder / f"x_train_{i:06d}.bin", range(a, b))
    write_shard(folder / "x_val_000000.bin", range(60))
    return folder


def starts(split, seed, first, count):
    """First token of each window; in these data sets that is its place."""
    return split.gather(WindowOrder(split, seed).places(first, count))[:, 0].tolist()


@pytest.mark.parametrize("kind", ["flat", "shards"])
def test_every_window_once_an_epoch(kind, request):
    split = Split(str(request.getfixturevalue(kind)), "train", T)
    n = split.n_windows
    epochs = [starts(split, 3, e * n, n) for e in range(4)]
    for epoch in epochs:
        ordered = np.sort(epoch)
        assert len(set(epoch)) == n and (np.diff(ordered) >= T).all()  # side by side: no token twice
        assert n * T >= split.n_tokens - 2 * T * len(split.files)
    assert len(set(map(tuple, epochs))) == 4
    windows = split.gather(WindowOrder(split, 3).places(0, n))
    assert (np.diff(windows.astype(int), axis=1) == 1).all()


def test_flat_files_are_shuffled_and_shifted_in_every_epoch(flat):
    split = Split(str(flat), "train", T)
    epochs = [starts(split, 3, e * split.n_windows, split.n_windows) for e in range(20)]
    assert all(epoch != sorted(epoch) for epoch in epochs)
    assert {min(epoch) for epoch in epochs} == set(range(T))  # every offset of the grid comes up


def test_shards_keep_their_order_in_epoch_0_only(shards):
    split = Split(str(shards), "train", T)
    n = split.n_windows
    assert split.windows == [11, 6, 4]
    assert starts(split, 3, 0, n) == [8 * i for i in range(11)] + [100 + 8 * i for i in range(6)] + [
        160 + 8 * i for i in range(4)]
    orders = [WindowOrder(split, 3).shard_order(e).tolist() for e in range(6)]
    assert orders[0] == [0, 1, 2] and len(set(map(tuple, orders))) > 2
    for epoch in range(1, 6):  # within an epoch a shard is read to its end before the next begins
        of_shard = np.digitize(starts(split, 3, epoch * n, n), [100, 160])
        assert [s for s, _ in zip(of_shard, [None, *of_shard]) if s != _] == orders[epoch]


@pytest.mark.parametrize("kind", ["flat", "shards"])
def test_order_is_a_pure_function(kind, request):
    split = Split(str(request.getfixturevalue(kind)), "train", T)
    whole = starts(split, 5, 0, 150)
    order = WindowOrder(split, 5)
    jumps = [117, 3, 149, 60, 61, 0, 20]  # one object, asked back and forth across epochs
    assert [split.gather(order.places(i, 1))[0, 0] for i in jumps] == [whole[i] for i in jumps]
    assert starts(split, 6, 0, 150) != whole


def test_order_does_not_change_between_versions(flat):
    """Golden: a resumed run must see the order that it began with, whatever numpy or this code has become."""
    split = Split(str(flat), "train", T)
    assert starts(split, 1337, 0, 6) == [485, 205, 149, 349, 109, 357]
    assert starts(split, 1337, 100, 6) == [257, 81, 457, 225, 121, 25]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_global_batches_are_the_same_for_any_number_of_ranks(flat, world_size):
    split = Split(str(flat), "train", T)
    accumulation, B = 8 // world_size, 2
    loaders = [DataLoader(split, B, accumulation, 500, 11, CPU, rank, world_size)
               for rank in range(world_size)]
    for update in range(8):  # into the third epoch
        rows = [x[i, 0].item() for loader in loaders for _ in range(accumulation)
                for x, y in [loader.next()] for i in range(B)]
        assert rows == starts(split, 11, update * 16, 16)
        assert {loader.sample for loader in loaders} == {(update + 1) * 16}
    for loader in loaders:
        loader.close()
        assert not loader._thread.is_alive()


def test_resumes_anywhere(flat):
    split = Split(str(flat), "train", T)
    one = DataLoader(split, 4, 3, 500, 11, CPU)
    for _ in range(3 * 7):
        one.next()
    two = DataLoader(split, 4, 3, 500, 11, CPU, sample=one.sample)
    assert (one.epoch, one.sample) == (two.epoch, two.sample) == (84 // split.n_windows, 84)
    for _ in range(20):
        for a, b in zip(one.next(), two.next()):
            assert torch.equal(a, b)
    one.close()
    two.close()


def test_targets_are_one_further(shards):
    loader = DataLoader(Split(str(shards), "train", T), 4, 1, 500, 0, CPU)
    for _ in range(10):
        x, y = loader.next()
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (4, T) and torch.equal(y, x + 1)
    loader.close()


def test_token_beyond_the_vocabulary(flat):
    split = Split(str(flat), "train", T)
    with pytest.raises(UserError, match="has token 400 at position 400, but the vocabulary has 400"):
        split.check_tokens(400)
    split.check_tokens(500)
    loader = DataLoader(split, 4, 1, 400, 0, CPU)  # also where the first check did not look
    with pytest.raises(UserError, match="has token 4"):
        for _ in range(40):
            loader.next()
    loader.close()


@pytest.mark.parametrize("tokens, windows", [(T + 1, 1), (2 * T, 1), (2 * T + 1, 1), (3 * T, 2)])
def test_small_files(tmp_path, tokens, windows):
    write_dataset(tmp_path / "small", np.arange(tokens), np.arange(tokens), 500, chars="")
    split = Split(str(tmp_path / "small"), "train", T)
    assert split.n_windows == windows
    for e in range(10):
        places = starts(split, e, e * windows, windows)
        assert min(places) >= 0 and max(places) + T < tokens


def test_block_size_longer_than_the_data(tmp_path):
    write_dataset(tmp_path / "small", np.arange(T), np.arange(T), 500, chars="")
    with pytest.raises(UserError, match="block_size=8 needs 9 tokens"):
        Split(str(tmp_path / "small"), "train", T)


def test_nanogpt_folder_without_meta(tmp_path, monkeypatch):
    folder = write_dataset(tmp_path / "data" / "mine", np.arange(99), np.arange(99), 500, chars="")
    (folder / "meta.json").unlink()
    monkeypatch.chdir(tmp_path)
    data = open_dataset("mine", T)
    assert data.meta is None and data.train.n_tokens == 99
    (folder / "meta.pkl").write_bytes(b"not to be read")  # it would be taken for GPT-2's tokens
    with pytest.raises(UserError, match=r'meta.pkl, a pickle.*"tokenizer": "char", "vocab_size": 3, "chars"'):
        open_dataset("mine", T)
    (folder / "meta.json").write_text('{"tokenizer": "char", "vocab_size": 3, "chars": "abc"}')
    assert open_dataset("mine", T).meta["chars"] == "abc"
    with pytest.raises(UserError, match="no data set 'yours'"):
        open_dataset("yours", T)
    (tmp_path / "data" / "cached_yours.py").touch()
    monkeypatch.setattr(dataloader, "ROOT", str(tmp_path))
    with pytest.raises(UserError, match=r"there is no folder data/yours \(run python data/cached_yours.py\)"):
        open_dataset("yours", T)
    with pytest.raises(UserError, match=r"prepare\.py --roots=stdlib,site-packages --tokenizer=gpt2"):
        open_dataset(str(tmp_path / "python_source_gpt2"), T)
    with pytest.raises(UserError, match=r"has no val tokens .*: run python .*--tokenizer=gpt2"):
        token_files.split_files(str(tmp_path / "python_source_gpt2"), "val")


def test_other_files_than_meta_counts(shards):
    """As a prepare.py leaves them that was killed before it deleted shards of an earlier, larger data set."""
    meta = {"vocab_size": 500, "tokenizer": "char"}
    (shards / "meta.json").write_text(json.dumps(meta))
    assert open_dataset(str(shards), T).meta == meta  # as FineWeb's: it counts nothing
    (shards / "meta.json").write_text(json.dumps({**meta, "train_tokens": 201, "val_tokens": 60}))
    assert open_dataset(str(shards), T).train.n_tokens == 201
    for stale, words in (("x_train_000003.bin", "201 train tokens and the files have 241"),
                         ("x_val_000001.bin", "60 val tokens and the files have 100")):
        write_shard(shards / stale, range(40))
        with pytest.raises(UserError, match=f"says {words}.*prepare the data set again"):
            open_dataset(str(shards), T)
        (shards / stale).unlink()


@pytest.mark.parametrize("n_windows", [5, 8, 16, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_windows_are_fixed_and_spread(shards, n_windows, world_size):
    split = Split(str(shards), "train", T)
    seen, batches = [], []
    for rank in range(world_size):
        parts = list(evaluation_batches(split, n_windows, 3, CPU, rank, world_size))
        batches.append(len(parts))
        assert all(x.shape == y.shape == (3, T) for x, y in parts)
        seen += [row[0].item() for x, y in parts for row, target in zip(x, y) if target[0] != -1]
    assert len(set(batches)) == 1  # every rank enters the model as often
    alone = [row[0].item() for x, y in evaluation_batches(split, n_windows, 1, CPU) for row in x]
    assert seen == alone and len(seen) == min(n_windows, sum(split.eval_windows)) == len(set(seen))
    assert max(seen) > 150 or n_windows == 5  # to the end of the split


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_evaluation_is_a_mean_over_targets(shards, batch_size):
    def model(x, y):
        """Its loss at a target is the target."""
        return None, y[y != -1].double().mean()

    split = Split(str(shards), "train", T)
    targets = [y for _, row in evaluation_batches(split, 100, 1, CPU) for y in row[0].tolist()]
    loss = evaluate(model, evaluation_batches(split, 100, batch_size, CPU))
    assert loss == pytest.approx(np.mean(targets), rel=1e-12) and len(targets) == (12 + 7 + 5) * T


@pytest.mark.parametrize("tokens, targets", [(T + 1, T), (2 * T, T), (2 * T + 1, 2 * T), (5 * T, 4 * T)])
def test_evaluation_leaves_out_less_than_a_window(tmp_path, tokens, targets):
    write_dataset(tmp_path / "small", np.arange(tokens), np.arange(tokens), 500, chars="")
    split = Split(str(tmp_path / "small"), "val", T)
    seen = [t for _, y in evaluation_batches(split, 100, 1, CPU) for t in y[0].tolist()]
    assert seen == list(range(1, targets + 1))


def test_uint32_batches(tmp_path):
    """Tokens above 65,535, and shards of both dtypes in one data set."""
    (tmp_path / "wide").mkdir()
    tokens = np.arange(70000, 70400)
    tokens.astype("<u4").tofile(tmp_path / "wide" / "train.bin")
    tokens.astype("<u4").tofile(tmp_path / "wide" / "val.bin")
    (tmp_path / "wide" / "meta.json").write_text(json.dumps(
        {"vocab_size": 70400, "tokenizer": "own", "dtype": "uint32"}))
    data = open_dataset(str(tmp_path / "wide"), T)
    loader = DataLoader(data.train, 2, 1, 70400, 0, CPU)
    x, y = loader.next()
    loader.close()
    assert x.dtype == torch.int64 and x.min() >= 70000 and torch.equal(x + 1, y)
    with pytest.raises(UserError, match="has token 70300 at position 300, but the vocabulary has 70300"):
        data.check_tokens(70300)
    write_shard(tmp_path / "wide" / "x_train_0.bin", range(100))
    (tmp_path / "wide" / "train.bin").unlink()
    head = np.zeros(256, "<i4")
    head[:3] = 20240801, 7, len(tokens)
    (tmp_path / "wide" / "x_train_1.bin").write_bytes(head.tobytes() + tokens.astype("<u4").tobytes())
    split = Split(str(tmp_path / "wide"), "train", T)
    assert split.dtype == np.uint32
    assert split.gather(np.array([[0, 3], [1, 5]]))[:, 0].tolist() == [3, 70005]
