"""Token files: formats, malformed files, tokenizers, what a TokenWriter publishes and deletes. CPU; seconds.

    python -m pytest tests/unit/test_token_files.py

Tests with GPT-2's tokenizer need its files in ../shared and skip where those are not.
"""

import json
import os
import sys

import numpy as np
import pytest
from helpers import needs_gpt2_tokenizer, write_shard

from data.token_writer import (
    TokenWriter,
    check_out,
    check_space,
    dataset_writers,
    is_published,
    publish_dataset,
)
from nanosync import tokenizers
from nanosync.dataloader import open_dataset
from nanosync.errors import UserError
from nanosync.files import decode_text
from nanosync.token_files import dtype_for, open_tokens, read_meta, split_files


def test_three_formats_read_the_same_tokens(tmp_path):
    tokens = np.arange(50, dtype=np.uint16) * 7
    for kind in ("bin", "shards", "npy"):
        (tmp_path / kind).mkdir()
    tokens.tofile(tmp_path / "bin" / "train.bin")
    write_shard(tmp_path / "shards" / "x_train_000001.bin", tokens[30:])
    write_shard(tmp_path / "shards" / "x_train_000000.bin", tokens[:30])
    np.save(tmp_path / "npy" / "x_train_000000.npy", tokens)
    for kind in ("bin", "shards", "npy"):
        found, paths = split_files(str(tmp_path / kind), "train")
        assert found == kind
        assert np.array_equal(np.concatenate([open_tokens(p, kind) for p in paths]), tokens)


@pytest.mark.parametrize("make, words", [
    (lambda p: p.write_bytes(b""), "truncated"),
    (lambda p: p.write_bytes(b"abc"), "3 bytes"),
])
def test_malformed_flat_files(tmp_path, make, words):
    make(tmp_path / "train.bin")
    with pytest.raises(UserError, match=words):
        open_tokens(str(tmp_path / "train.bin"), "bin")


@pytest.mark.parametrize("kind", ["bin", "shards", "npy"])
def test_folder_in_the_place_of_a_file(tmp_path, kind):
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        open_tokens(str(tmp_path), kind)


@pytest.mark.parametrize("options, words", [
    (dict(magic=1), "is not a token shard: its first number is 1"),
    (dict(version=2), "version 2"),
    (dict(count=11), "says 11 tokens, and the file has 10"),
    (dict(count=9), "says 9 tokens, and the file has 10"),
    (dict(count=-1), "says -1 tokens"),
])
def test_malformed_shards(tmp_path, options, words):
    write_shard(tmp_path / "x_train_000000.bin", range(10), **options)
    with pytest.raises(UserError, match=words):
        open_tokens(str(tmp_path / "x_train_000000.bin"), "shards")


@pytest.mark.parametrize("size", [0, 3, 12, 1023])
def test_shard_shorter_than_its_header(tmp_path, size):
    path = tmp_path / "x_train_000000.bin"
    write_shard(path, range(10))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="is not a token shard"):
        open_tokens(str(path), "shards")


def test_malformed_npy(tmp_path):
    path = tmp_path / "x_train_0.npy"
    for array, words in ((np.zeros((2, 2), np.uint16), "shape"), (np.zeros(4), "float64")):
        np.save(path, array)
        with pytest.raises(UserError, match=words):
            open_tokens(str(path), "npy")
    np.save(path, np.zeros(0, np.uint16))
    with pytest.raises(UserError, match="at least one"):
        open_tokens(str(path), "npy")
    path.write_bytes(b"")
    with pytest.raises(UserError, match="not a readable"):
        open_tokens(str(path), "npy")
    with open(path, "wb") as f:
        np.savez(f, np.zeros(3, np.uint16))
    with pytest.raises(UserError, match="npz"):
        open_tokens(str(path), "npy")
    np.save(path, np.array([print], dtype=object), allow_pickle=True)  # would have to be unpickled
    with pytest.raises(UserError, match="not a readable"):
        open_tokens(str(path), "npy")


def npy(header: str | bytes, data: bytes = bytes(100), version=b"\1\0") -> bytes:
    """An .npy file with any text as its header."""
    header = header.encode() if isinstance(header, str) else header
    size = len(header).to_bytes(2 if version[0] == 1 else 4, "little")
    return b"\x93NUMPY" + version + size + header + data


def header(shape="(50,)", descr="'<u2'", order="False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


@pytest.mark.parametrize("content", [
    npy(header("(4611686018427387904,)")), npy(header("(-1,)")), npy(header("(True,)")),
    npy(header("(50.0,)")),
    npy(header("50")), npy(header("()")), npy(header("(5, 10)")), npy(header("(49,)")), npy(header("(51,)")),
    npy(header("(" * 5000)), npy(header("[" * 2000)), npy(header("-" * 3000 + "1")),
    npy(header("(" + "9" * 4000)),
    npy(header(descr="'|O'")), npy(header(descr="'<f8'")), npy(header(descr="'>u2'")), npy(header(descr="3")),
    npy(header(descr="[('a', '<u2')]")), npy(header(descr="'<u2, <u2'")), npy(header(descr="'x' * 3")),
    npy("{}"), npy("3"), npy("{1: 2}"), npy(b"\xff\0" * 20), npy(""), npy("{'descr': {}}"), npy(" " * 60000),
    npy(header(), version=b"\4\0"), npy(header(), version=b"\0\0"), npy(header(), data=b""), b"\x93NUMPY",
    b"\x93NUMPY\1\0\xff\xff", b"\x93NUMPY\2\0\xff\xff\xff\xff", b"PK\3\4" + bytes(500), b"", b"\x80\4."],
    ids=lambda content: repr(content[8:60]))
def test_npy_headers_malformed_in_any_way(tmp_path, content):
    path = tmp_path / "x_train_0.npy"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        open_tokens(str(path), "npy")
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_npy_headers_of_all_versions(tmp_path):
    path, tokens = tmp_path / "x_train_0.npy", np.arange(50, dtype="<u2")
    for version in (b"\1\0", b"\2\0", b"\3\0"):
        path.write_bytes(npy(header(), tokens.tobytes(), version))
        assert np.array_equal(open_tokens(str(path), "npy"), tokens)


WIDE = np.arange(300, dtype="<u4") * 7 + 1
BEYOND = WIDE * 400  # up to 119,600


def test_uint32_tokens_in_three_formats(tmp_path):
    """As llm.c writes them for Llama 3, and with a dtype in meta.json."""
    (tmp_path / "meta.json").write_text('{"vocab_size": 128256, "tokenizer": "own", "dtype": "uint32"}')
    assert read_meta(str(tmp_path))["vocab_size"] == 128256
    for tokens in (WIDE, BEYOND):
        tokens.tofile(tmp_path / "train.bin")
        np.save(tmp_path / "x_train_0.npy", tokens)
        head = np.zeros(256, "<i4")
        head[:3] = 20240801, 7, len(tokens)
        (tmp_path / "x_train_0.bin").write_bytes(head.tobytes() + tokens.tobytes())
        for name, kind in (("train.bin", "bin"), ("x_train_0.bin", "shards"), ("x_train_0.npy", "npy")):
            found = open_tokens(str(tmp_path / name), kind, "uint32")
            assert np.array_equal(found, tokens) and found.dtype == np.uint32
            if kind != "bin":
                assert np.array_equal(open_tokens(str(tmp_path / name), kind), tokens)
                with pytest.raises(UserError, match=r"holds uint32 tokens, .* meta\.json says uint16"):
                    open_tokens(str(tmp_path / name), kind, "uint16")
    write_shard(tmp_path / "x_train_0.bin", range(10))
    with pytest.raises(UserError, match=r"holds uint16 tokens, and its folder's meta\.json says uint32"):
        open_tokens(str(tmp_path / "x_train_0.bin"), "shards", "uint32")
    (tmp_path / "train.bin").write_bytes(bytes(6))
    with pytest.raises(UserError, match="6 bytes, and uint32 tokens need a positive multiple of 4"):
        open_tokens(str(tmp_path / "train.bin"), "bin", "uint32")


@pytest.mark.parametrize("dtype, name", [
    ("<u4", "uint32"), ("<i4", "uint32"), (">u4", "uint32"), ("<i8", "int64"), ("<u8", "int64")])
def test_tokens_of_a_wider_dtype(tmp_path, dtype, name):
    """They would be read as uint16, every second or fourth of which is a token."""
    path = tmp_path / "train.bin"
    WIDE.astype(dtype).tofile(path)
    with pytest.raises(UserError, match=f"train.bin holds {name} tokens and would be read as uint16"):
        open_tokens(str(path), "bin")
    path.write_bytes(bytes(10**5) + path.read_bytes() * 500)  # zeros at the beginning show nothing
    with pytest.raises(UserError, match=f"holds {name} tokens"):
        open_tokens(str(path), "bin")
    WIDE.astype("<u8").tofile(path)
    with pytest.raises(UserError, match="holds uint64 tokens and would be read as uint32"):
        open_tokens(str(path), "bin", "uint32")


def test_tokens_that_only_look_wider(tmp_path):
    path = tmp_path / "train.bin"
    for tokens in (np.zeros(200), np.arange(200) % 2, np.arange(20) * 2 % 3, np.arange(5000) % 26,
                   np.append(np.repeat([1, 0], 99), 5)):
        tokens.astype("<u2").tofile(path)
        assert np.array_equal(open_tokens(str(path), "bin"), tokens)


@pytest.mark.parametrize("name, kind", [
    ("train.bin", "bin"), ("x_train_0.bin", "shards"), ("x_train_0.npy", "npy")])
def test_only_regular_files_are_opened(tmp_path, name, kind):
    """A pipe would block, /dev/zero never end."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="it is not a regular file"):
        open_tokens(str(tmp_path / name), kind)
    assert split_files(str(tmp_path), "train")[0] == kind
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match="it is not a regular file"):
        open_tokens(str(tmp_path / name), kind)
    for special in ("/dev/zero", "pipe"):
        (tmp_path / "meta.json").symlink_to(special)
        if special == "pipe":
            os.mkfifo(tmp_path / "pipe")
        with pytest.raises(UserError, match=r"meta\.json: it is not a regular file"):
            read_meta(str(tmp_path))
        (tmp_path / "meta.json").unlink()


@pytest.mark.parametrize("text", [
    "", "{", "[]", '{"vocab_size": 3}', '{"vocab_size": "3", "tokenizer": "char"}',
    '{"vocab_size": 0, "tokenizer": "char"}', '{"vocab_size": 3, "tokenizer": "char", "dtype": "int64"}',
    '{"vocab_size": 65537, "tokenizer": "char"}',
    '{"vocab_size": 2147483649, "tokenizer": "own", "dtype": "uint32"}', '{"vocab_size": 3, "vocab_size": 3}',
    '{"vocab_size": 3, "tokenizer": "a\\u0000"}', '{"vocab_size": 3, "tokenizer": "a\\ud800"}',
    '{"vocab_size": 3, "tokenizer": "own", "x": NaN}', '{"vocab_size": 3, "tokenizer": "own", "x": 1e999}',
    '{"vocab_size": 3, "tokenizer": "own", "x": ' + "[" * 10**5,
    '{"vocab_size": 3, "tokenizer": "own", "x": ' + "[" * 60 + "]" * 60 + "}",
    '{"vocab_size": 1' + "0" * 5000 + "}"])
def test_malformed_meta(tmp_path, text):
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(UserError):
        read_meta(str(tmp_path))
    (tmp_path / "meta.json").write_text('{"vocab_size": 65536, "tokenizer": "own"}')
    assert read_meta(str(tmp_path))["vocab_size"] == 65536


def test_char_tokenizer():
    tokenizer = tokenizers.CharTokenizer("ab é")
    assert tokenizer.decode(tokenizer.encode("é ba")) == "é ba"
    with pytest.raises(UserError, match="'x'"):
        tokenizer.encode("axb")
    lenient = tokenizers.CharTokenizer("ab" + tokenizers.UNKNOWN)
    assert lenient.encode("axb\U0001f600").tolist() == [0, 2, 1, 2]
    assert tokenizers.from_meta(tokenizer.meta()).chars == "ab é"


def test_token_ids_of_an_unknown_tokenizer():
    tokenizer = tokenizers.from_meta({"tokenizer": "own", "vocab_size": 300})
    assert isinstance(tokenizer, tokenizers.TokenIds) and tokenizer.vocab_size == 300
    for text, ids in (("\n", [0]), ("12 7,99\n", [12, 7, 99]), ("", [])):
        assert tokenizer.encode(text).tolist() == ids
    assert tokenizer.decode([1, 22]) == "1 22 " == "".join(map(tokenizer.stream(), [1, 22]))
    for text in ("ROMEO:", "1 -2", "1.5", "9" * 5000):
        with pytest.raises(UserError, match=r"is unknown here and cannot encode .*: give token ids"):
            tokenizer.encode(text)
    for meta in ({"tokenizer": "char", "vocab_size": 3, "chars": "ab"}, {"vocab_size": 3}):
        with pytest.raises(UserError, match="is unknown or incomplete"):
            tokenizers.from_meta(meta)


@pytest.mark.parametrize("content, text", [
    (b"\xef\xbb\xbfab", "ab"), (b"a\r\nb\rc\n", "a\nb\nc\n"), (b"", ""), ("é".encode(), "é"),
    ("ab".encode("utf-16"), None), ("ab".encode("utf-16-be"), None), (b"\xfe\xff", None),
    (("ab" * 9000).encode("utf-16-le"), None), ("é".encode("latin-1"), None),
])
def test_decoding_of_texts(content, text):
    if text is not None:
        assert decode_text(content, "my.txt") == text
    else:
        with pytest.raises(UserError, match=r"my\.txt is UTF-16, .* iconv|my\.txt: byte 0 is not UTF-8"):
            decode_text(content, "my.txt")


def test_gpt2_tokenizer_streams_whole_characters():
    needs_gpt2_tokenizer()
    tokenizer = tokenizers.GPT2Tokenizer()
    text = "def f(x):\n    return 'h\N{SNOWMAN}\U0001f600llo'<|endoftext|>"
    ids = tokenizer.encode(text)
    assert ids[-1] == tokenizer.eot_token and tokenizer.encode_ordinary(text)[-1] != tokenizer.eot_token
    to_text = tokenizer.stream()
    assert "".join(to_text(int(i)) for i in ids) == text == tokenizer.decode(ids)


def test_writer_splits_into_shards_and_publishes_at_the_end(tmp_path):
    train, val = TokenWriter(str(tmp_path), "train", "x", 10), TokenWriter(str(tmp_path), "val", "x", 10)
    for part in (range(4), range(4, 17), range(17, 30)):
        train.write(np.array(part))
    val.write(np.arange(3))
    assert all(name.endswith(".tmp") for name in os.listdir(tmp_path))
    publish_dataset(str(tmp_path), {"vocab_size": 30, "tokenizer": "none"}, train, val)
    kind, paths = split_files(str(tmp_path), "train")
    assert kind == "shards" and [len(open_tokens(p, kind)) for p in paths] == [10, 10, 10]
    assert np.concatenate([open_tokens(p, kind) for p in paths]).tolist() == list(range(30))
    assert is_published(str(tmp_path), vocab_size=30) and not is_published(str(tmp_path), vocab_size=31)
    # a smaller data set in its place leaves nothing of the larger one
    train, val = TokenWriter(str(tmp_path), "train", "x", 10), TokenWriter(str(tmp_path), "val", "x", 10)
    train.write(np.arange(5))
    val.write(np.arange(3))
    publish_dataset(str(tmp_path), {"vocab_size": 30, "tokenizer": "none"}, train, val)
    assert sorted(os.listdir(tmp_path)) == ["meta.json", "x_train_000000.bin", "x_val_000000.bin"]


@pytest.mark.parametrize("shard_tokens", [None, 100])
def test_writer_of_a_large_vocabulary(tmp_path, shard_tokens):
    """Ids above 65,535 are uint32, in the files and in meta.json; a writer of uint16 does not cut them."""
    tokens, size = np.arange(70000, 70300), 70300
    with dataset_writers(str(tmp_path), "x", shard_tokens, dtype_for(size)) as (train, val):
        train.write(tokens)
        val.write(tokens[:80])
        publish_dataset(str(tmp_path), {"vocab_size": size, "tokenizer": "own"}, train, val)
    assert read_meta(str(tmp_path))["dtype"] == "uint32" and is_published(str(tmp_path), vocab_size=size)
    data = open_dataset(str(tmp_path), 16)
    assert np.concatenate(data.train.files).tolist() == tokens.tolist() and data.val.n_tokens == 80
    assert [dtype_for(size) for size in (1, 65536, 65537)] == ["uint16", "uint16", "uint32"]
    for wrong in ([65536], [-1]):
        with pytest.raises(AssertionError, match="uint16 cannot hold"):
            TokenWriter(str(tmp_path), "train").write(np.array(wrong))


def publish_shards(folder, train_tokens, val_tokens=3):
    with dataset_writers(str(folder), "x", 10) as (train, val):
        train.write(np.arange(train_tokens))
        val.write(np.arange(val_tokens))
        publish_dataset(str(folder), {"vocab_size": 30, "tokenizer": "none"}, train, val)


def test_shards_that_a_killed_run_left_are_deleted_by_the_next(tmp_path):
    publish_shards(tmp_path, 25)
    whole = sorted(os.listdir(tmp_path))
    for name in ("x_train_000003.bin", "x_val_000001.bin", "x_train_000007.bin.tmp"):
        write_shard(tmp_path / name, range(5))  # of a larger data set that meta.json no longer lists
    (tmp_path / "notes_train_1.bin").write_text("not ours")
    assert not is_published(str(tmp_path), vocab_size=30)
    publish_shards(tmp_path, 25)
    assert sorted(os.listdir(tmp_path)) == sorted([*whole, "notes_train_1.bin"])
    (tmp_path / "notes_train_1.bin").unlink()
    assert is_published(str(tmp_path), vocab_size=30)


def test_killed_between_the_names_and_the_deletion(tmp_path, monkeypatch):
    publish_shards(tmp_path, 25)

    def kill(path):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(os, "remove", kill)
        with pytest.raises(SystemExit):
            publish_shards(tmp_path, 12)
    assert "x_train_000002.bin" in os.listdir(tmp_path) and not is_published(str(tmp_path))
    publish_shards(tmp_path, 12)
    assert sorted(os.listdir(tmp_path)) == ["meta.json", "x_train_000000.bin", "x_train_000001.bin",
                                            "x_val_000000.bin"]


@pytest.mark.parametrize("text", ["{", "[]", "", '{"sha256": ["a"], "vocab_size": 3, "tokenizer": "none"}'])
def test_broken_meta_does_not_stop_preparing(tmp_path, text):
    (tmp_path / "meta.json").write_text(text)
    assert not is_published(str(tmp_path), vocab_size=30)
    publish_shards(tmp_path, 12)
    assert is_published(str(tmp_path), vocab_size=30)


def test_earlier_meta_cannot_name_other_files_for_deletion(tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    names = {"keep.txt": "", "meta.json": "", "../keep.bin": "", "old_train_000000.bin": ""}
    (tmp_path / "meta.json").write_text(json.dumps({"vocab_size": 3, "tokenizer": "none", "sha256": names}))
    write_shard(tmp_path / "old_train_000000.bin", range(5))
    publish_shards(tmp_path, 5)
    assert sorted(os.listdir(tmp_path)) == ["keep.txt", "meta.json", "x_train_000000.bin", "x_val_000000.bin"]


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_a_failed_run_leaves_nothing(tmp_path, error):
    for folder in (tmp_path / "new" / "er", tmp_path):
        with pytest.raises(error), dataset_writers(str(folder), "x", 10) as (train, _):
            train.write(np.arange(25))
            raise error
    assert os.listdir(tmp_path) == []


def test_full_disk(tmp_path):
    with pytest.raises(UserError, match=r"cannot write to .*: No space left on device"):
        with dataset_writers(str(tmp_path)) as (train, _):
            os.symlink("/dev/full", tmp_path / "train.bin.tmp")
            train.write(np.zeros(10**6))
            train.close()
    with pytest.raises(UserError, match=r"needs about 1,000,000,000,000 MB and has .* free: choose another"):
        check_space(str(tmp_path / "not" / "there"), 1e18)


def test_out_must_be_a_folder_that_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for out, words in ((tmp_path / "file", "is not a folder"), (tmp_path / "file" / "x", "is not a folder"),
                       ("/proc/x/y", "cannot write to /proc"), ("", "is not a folder")):
        with pytest.raises(UserError, match=words):
            check_out(str(out), "x", "char", "bin")
    check_out(str(tmp_path / "new" / "er"), "x", "char", "bin")
    assert os.listdir(tmp_path) == ["file"]


def test_out_must_not_hold_another_data_set(tmp_path):
    out = str(tmp_path)
    publish_shards(tmp_path, 5)
    check_out(out, "x", "none", "shards")
    for name, tokenizer, kind in (("x", "char", "shards"), ("x", "none", "bin"), ("y", "none", "shards")):
        with pytest.raises(UserError, match="choose another folder with --out"):
            check_out(out, name, tokenizer, kind)
    (tmp_path / "meta.json").unlink()
    check_out(out, "x", "char", "shards")
    check_out(out, "x", "char", "bin")  # which is read, and not the shards
    with pytest.raises(UserError, match=r"x_train_000000.bin would be read with"):
        check_out(out, "y", "char", "shards")
    (tmp_path / "val.bin").write_bytes(b"ab")
    with pytest.raises(UserError, match=r"val.bin would be read with the new shards or in their place"):
        check_out(out, "x", "none", "shards")
    with pytest.raises(UserError, match=r"val.bin would be overwritten, and no meta.json says"):
        check_out(out, "x", "none", "bin")
    (tmp_path / "meta.json").write_text("{")  # damaged: the folder was prepared, and is prepared again
    check_out(out, "x", "none", "bin")


@pytest.mark.parametrize("name", ["train.bin", "val.idx", "report.json"])
def test_files_that_no_script_wrote_are_not_overwritten(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} would be overwritten"):
        check_out(str(tmp_path), "x", "char", "bin")
    if name != "train.bin":
        with pytest.raises(UserError, match=f"{name} would be overwritten"):
            check_out(str(tmp_path), "x", "char", "shards")


def test_fineweb_downloads_what_is_missing_or_broken(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    import data.cached_fineweb10B as fineweb

    fetched = []

    def download(repo_id, repo_type, filename, local_dir, force_download):
        fetched.append(filename)
        write_shard(os.path.join(local_dir, filename), range(100))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(sys, "argv", ["cached_fineweb10B.py", "2", f"--out={tmp_path}"])
    fineweb.main()
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert fetched == names and json.loads((tmp_path / "meta.json").read_text())["vocab_size"] == 50257
    (tmp_path / names[1]).write_bytes((tmp_path / names[1]).read_bytes()[:-1])
    fineweb.main()
    assert fetched == names + names[1:2] and "1 to download" in capsys.readouterr().out

    part = b""

    def fail(local_dir, **_):
        """As huggingface_hub does, which keeps locks, and parts of files to go on with."""
        cache = os.path.join(local_dir, ".cache", "huggingface", "download")
        os.makedirs(cache)
        for name, content in (("x.lock", b""), ("x.incomplete", part)):
            with open(os.path.join(cache, name), "wb") as f:
                f.write(content)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    (tmp_path / names[2]).unlink()
    with pytest.raises(UserError, match="copy the shards"):
        fineweb.main()
    assert sorted(os.listdir(tmp_path)) == sorted([*names[:2], "meta.json"])
    part = b"some of it"
    with pytest.raises(UserError, match="copy the shards"):
        fineweb.main()
    assert ".cache" in os.listdir(tmp_path)
    part = b""
    monkeypatch.setattr(sys, "argv", ["cached_fineweb10B.py", "2", f"--out={tmp_path / 'new' / 'er'}"])
    with pytest.raises(UserError, match="copy the shards"):
        fineweb.main()
    assert not (tmp_path / "new").exists()
