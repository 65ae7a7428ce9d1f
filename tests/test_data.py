"""Token files and the prepare scripts: formats, malformed files, what is written and when. CPU; seconds.

    python -m pytest tests/test_data.py

Tests with GPT-2's tokenizer or tiny Shakespeare need their files in ../shared and skip where those are not.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import NO_NETWORK, ROOT, needs_gpt2_tokenizer, tinyshakespeare

from data.token_writer import (
    TokenWriter,
    check_out,
    check_space,
    dataset_writers,
    is_published,
    publish_dataset,
)
from nanosync import tokenizers
from nanosync.errors import UserError
from nanosync.token_files import open_tokens, read_meta, split_files


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    with open(path, "wb") as f:
        header.tofile(f)
        np.asarray(tokens, "<u2").tofile(f)


def prepare(script, *args, env=None):
    return subprocess.run([sys.executable, str(ROOT / "data" / script), *map(str, args)], capture_output=True,
                          text=True, timeout=240, env=os.environ | (env or {}))


def script_module(script):
    """A prepare.py as a module, for what in it deserves a test of its own."""
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "data" / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_error(done, words):
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


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


@pytest.mark.parametrize("text", [
    "", "{", "[]", '{"vocab_size": 3}', '{"vocab_size": "3", "tokenizer": "char"}',
    '{"vocab_size": 0, "tokenizer": "char"}', '{"vocab_size": 3, "tokenizer": "char", "dtype": "uint32"}',
    '{"vocab_size": 65537, "tokenizer": "char"}'])
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
            train.write(np.arange(10**6))
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
    check_out(out, "x", "none", "bin")


@pytest.mark.parametrize("script", ["python_source/prepare.py", "shakespeare/prepare.py",
                                    "shakespeare_char/prepare.py", "openwebtext/prepare.py",
                                    "cached_fineweb10B.py"])
def test_out_is_checked_before_any_work(script, tmp_path):
    (tmp_path / "file").write_text("")
    env = NO_NETWORK | {"TIKTOKEN_CACHE_DIR": str(tmp_path)}
    check_error(prepare(script, f"--out={tmp_path / 'file' / 'x'}", env=env), "is not a folder")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "meta.json").write_text(json.dumps(
        {"vocab_size": 3, "tokenizer": "own", "format": "npy", "name": "mine"}))
    check_error(prepare(script, f"--out={tmp_path / 'other'}", env=env),
                "holds another data set, mine in own tokens (format npy): choose another folder with --out")
    check_error(prepare(script, f"--out={tmp_path}/\udcff", env=env), "not valid UTF-8")
    assert sorted(os.listdir(tmp_path)) == ["file", "other"]


def test_shakespeare_does_not_replace_another_data_set(sources, tmp_path):
    assert prepare("python_source/prepare.py", f"--roots={sources}", f"--out={tmp_path}").returncode == 0
    (tmp_path / "text.txt").write_text("some text " * 100)
    before = (tmp_path / "train.bin").read_bytes()
    done = prepare("shakespeare_char/prepare.py", f"--input={tmp_path / 'text.txt'}", f"--out={tmp_path}")
    check_error(done, "holds another data set, python_source in char tokens")
    assert (tmp_path / "train.bin").read_bytes() == before


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """60 Python files, two of them equal, one not UTF-8, one not Python."""
    folder = tmp_path_factory.mktemp("sources")
    for i in range(60):
        (folder / f"m{i}.py").write_text(f"def f{i}(x):\n\treturn x + {i}  # é\n" * (1 + i % 3))
    (folder / "copy.py").write_text((folder / "m3.py").read_text())
    (folder / "latin.py").write_bytes("x = 'é'".encode("latin-1"))
    (folder / "notes.txt").write_text("no code")
    return folder


def test_python_source_by_character(sources, tmp_path):
    out = tmp_path / "out"
    done = prepare("python_source/prepare.py", f"--roots={sources}", f"--out={out}", "--workers=2")
    assert done.returncode == 0, done.stderr
    assert "60 files" in done.stdout and "MB to write" in done.stdout
    meta = read_meta(str(out))
    assert meta["vocab_size"] == 98 == len(meta["chars"])
    tokenizer = tokenizers.from_meta(meta)
    texts = {split: tokenizer.decode(open_tokens(str(out / f"{split}.bin"), "bin"))
             for split in ("train", "val")}
    in_split = {split: {i for i in range(60) if f"def f{i}(" in text} for split, text in texts.items()}
    assert in_split["train"] | in_split["val"] == set(range(60)) and not in_split["train"] & in_split["val"]
    assert texts["train"].count("def f3(") + texts["val"].count("def f3(") == 1  # its copy was left out
    assert "no code" not in texts["train"] + texts["val"] and tokenizers.UNKNOWN in texts["train"]

    again = prepare("python_source/prepare.py", f"--roots={sources}", f"--out={out}", "--workers=2")
    assert again.returncode == 0 and "up to date" in again.stdout
    other = prepare("python_source/prepare.py", f"--roots={sources}", f"--out={out}", "--format=shards")
    assert other.returncode == 2 and "--out" in other.stderr and other.stderr.count("\n") == 1


def test_python_source_as_gpt2_shards(sources, tmp_path):
    needs_gpt2_tokenizer()
    done = prepare("python_source/prepare.py", f"--roots={sources}", f"--out={tmp_path}", "--tokenizer=gpt2",
                   "--format=shards", "--shard_tokens=500", "--workers=2")
    assert done.returncode == 0, done.stderr
    kind, paths = split_files(str(tmp_path), "train")
    assert kind == "shards" and len(paths) > 1
    assert [len(open_tokens(p, kind)) for p in paths[:-1]] == [500] * (len(paths) - 1)
    tokens = np.concatenate([open_tokens(p, kind) for p in paths])
    assert tokens[0] == 50256 and (tokens == 50256).sum() == 60 - (
        open_tokens(*split_files(str(tmp_path), "val")[1], kind) == 50256).sum()


def test_python_source_roots_of_the_same_name(sources, tmp_path):
    find_roots = script_module("python_source/prepare.py").find_roots
    for name in ("one/src", "two/src", "stdlib", "src"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / f"{name.replace('/', '_')}.py").write_text(f"# {name}\n" * 40)
    one, two, src, stdlib = (str(tmp_path / name) for name in ("one/src", "two/src", "src", "stdlib"))
    assert find_roots(one) == {"src": one}  # the name decides what is train and what val
    assert find_roots(f"{one},{one}/") == {"src": f"{one}/"}  # the same, once
    assert find_roots(f"{one},{two}") == {"one/src": one, "two/src": two}
    here = tmp_path.name
    found = find_roots(f"stdlib,{one},{two},{src},{stdlib}")
    assert os.path.isfile(os.path.join(found.pop("stdlib"), "dataclasses.py"))  # not the folder of that name
    assert found == {"one/src": one, "two/src": two, f"{here}/src": src, f"{here}/stdlib": stdlib}
    done = prepare("python_source/prepare.py", f"--roots={sources},{one},{two}", "--workers=1",
                   f"--out={tmp_path / 'out'}")
    assert done.returncode == 0 and "62 files" in done.stdout, done.stderr


def test_python_source_below_file_names_that_are_not_utf8(sources, tmp_path):
    folder = tmp_path / "src"
    folder.mkdir()
    for path in sources.glob("m*.py"):
        (folder / path.name).write_bytes(path.read_bytes())
    with open(os.path.join(os.fsencode(folder), b"\xff.py"), "w") as f:
        f.write("def odd():\n    return 'xyz'\n")
    done = prepare("python_source/prepare.py", f"--roots={folder}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 0 and "61 files" in done.stdout, done.stderr


def test_interrupted(tmp_path):
    """Ctrl-C goes to all processes of the terminal, the workers as well."""
    folder, out = tmp_path / "src", tmp_path / "new" / "out"
    folder.mkdir()
    for i in range(200):
        (folder / f"m{i}.py").write_text(f"x{i} = {'1' * 999}\n" * 500)
    command = [sys.executable, str(ROOT / "data" / "python_source" / "prepare.py"), "--workers=2",
               f"--roots={folder}", f"--out={out}"]
    for _ in range(5):  # on a busy machine it may be done before it is interrupted
        process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   start_new_session=True,  # a process group, which stands for the terminal
                                   # a shell's job in the background ignores it, and so do its children
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        while not list(out.glob("*.tmp")) and process.poll() is None:
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        if process.returncode != 0:
            break
        shutil.rmtree(tmp_path / "new")
    assert process.returncode == 130 and "Traceback" not in err, err
    assert [line for line in err.splitlines() if line and "batch" not in line] == ["interrupted"]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("args", [["--roots=/no/such/folder"], ["--roots="], ["--format=parquet"],
                                  ["--workers=0"], ["--shard_tokens=0"], ["--what"]])
def test_python_source_errors(args, tmp_path):
    done = prepare("python_source/prepare.py", *args, f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_shakespeare_by_character(tmp_path):
    done = prepare("shakespeare_char/prepare.py", f"--input={tinyshakespeare()}", f"--out={tmp_path}")
    assert "train has 1,003,854 tokens, val has 111,540 tokens, vocabulary 65" in done.stdout, done.stderr
    train = open_tokens(str(tmp_path / "train.bin"), "bin")
    text = tinyshakespeare().read_text()
    symbols = sorted(set(text))
    assert train[:1000].tolist() == [symbols.index(c) for c in text[:1000]]  # nanoGPT's ids
    assert "up to date" in prepare("shakespeare_char/prepare.py", f"--input={tinyshakespeare()}",
                                   f"--out={tmp_path}").stdout


def test_shakespeare_in_gpt2_tokens(tmp_path):
    needs_gpt2_tokenizer()
    done = prepare("shakespeare/prepare.py", f"--input={tinyshakespeare()}", f"--out={tmp_path}")
    assert "train has 301,966 tokens, val has 36,059 tokens" in done.stdout, done.stderr


def test_no_network_and_no_tokenizer_files(tmp_path):
    """Every name resolves to nothing through a proxy that is not there."""
    (tmp_path / "text.txt").write_text("some text " * 100)
    cases = [("shakespeare_char/prepare.py", [], "--input"),
             ("shakespeare/prepare.py", [f"--input={tmp_path / 'text.txt'}"], "TIKTOKEN_CACHE_DIR"),
             ("shakespeare_char/prepare.py", ["--input=/no/such/file"],
              "cannot read /no/such/file: No such file or directory\n")]
    for script, args, words in cases:
        env = NO_NETWORK | {"TIKTOKEN_CACHE_DIR": str(tmp_path)}
        done = prepare(script, *args, f"--out={tmp_path / 'out'}", env=env)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "out").exists()


def test_openwebtext_from_local_parquet(tmp_path):
    needs_gpt2_tokenizer()
    import datasets

    texts = [f"Document {i} says {'word ' * (i % 7)}." for i in range(40)]
    (tmp_path / "parquet").mkdir()
    documents = datasets.Dataset.from_dict({"text": texts, "url": texts})
    documents.to_parquet(str(tmp_path / "parquet" / "a.parquet"))
    args = (f"--parquet={tmp_path / 'parquet'}", f"--out={tmp_path / 'out'}", "--workers=2")
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_CACHE": str(tmp_path / "hf")}
    done = prepare("openwebtext/prepare.py", *args, env=env)
    assert done.returncode == 0, done.stderr
    train, val = (open_tokens(str(tmp_path / "out" / f"{split}.bin"), "bin") for split in ("train", "val"))
    tokenizer = tokenizers.GPT2Tokenizer()
    documents = [tokenizer.decode(part) for tokens in (train, val)
                 for part in np.split(tokens, np.flatnonzero(tokens == 50256) + 1) if len(part)]
    assert sorted(d.removesuffix("<|endoftext|>") for d in documents) == sorted(texts)
    assert "up to date" in prepare("openwebtext/prepare.py", *args, env=env).stdout

    texts = [text.replace("says", "said") for text in texts]
    other = datasets.Dataset.from_dict({"text": texts, "url": texts})
    other.to_parquet(str(tmp_path / "parquet" / "a.parquet"))  # of the same name, number and size
    again = prepare("openwebtext/prepare.py", *args, env=env)
    assert again.returncode == 0 and "up to date" not in again.stdout
    assert "said" in tokenizer.decode(open_tokens(str(tmp_path / "out" / "train.bin"), "bin"))


def test_openwebtext_says_the_size_before_the_download(tmp_path):
    needs_gpt2_tokenizer()
    env = NO_NETWORK | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = prepare("openwebtext/prepare.py", f"--out={tmp_path / 'out'}", env=env)
    check_error(done, "without a network" if "8,013,769 documents, 39.77 GB" in done.stdout else "MB free")
    assert not (tmp_path / "out").exists()


def test_openwebtext_from_bad_parquet(tmp_path):
    needs_gpt2_tokenizer()
    import datasets

    env = NO_NETWORK | {"HF_HOME": str(tmp_path / "hf")}
    random = np.random.RandomState(1)
    texts = ["".join(map(chr, random.randint(97, 123, 3000))) for _ in range(100)]
    for name, columns in (("damaged", {"text": texts}), ("cut", {"text": texts}), ("one", {"text": ["a"]}),
                          ("columns", {"words": texts}), ("numbers", {"text": [1, 2]})):
        (tmp_path / name).mkdir()
        datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / name / "a.parquet"))
    (tmp_path / "none").mkdir()
    content = (tmp_path / "cut" / "a.parquet").read_bytes()
    (tmp_path / "cut" / "a.parquet").write_bytes(content[:-100])
    (tmp_path / "damaged" / "a.parquet").write_bytes(content[:4] + bytes(5000) + content[5004:])
    for name, words in (("none", "no *.parquet files"), ("cut", "a.parquet is no whole parquet file"),
                        ("columns", "has columns ['words'], and no 'text' of strings"),
                        ("numbers", "no 'text' of strings"), ("one", "1 document is too little"),
                        ("damaged", "could not load the parquet files")):
        done = prepare("openwebtext/prepare.py", f"--parquet={tmp_path / name}", f"--out={tmp_path / 'out'}",
                       "--workers=2", env=env)
        error = done.stderr.splitlines()[-1]  # below a bar of `datasets`
        assert done.returncode == 2 and error.startswith("error: ") and words in error, done.stderr
        assert "network" not in error and "Traceback" not in done.stderr and not (tmp_path / "out").exists()


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
