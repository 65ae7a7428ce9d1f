"""Token files and the prepare scripts: formats, malformed files, what is written and when. CPU; seconds.

    python -m pytest tests/scripts/test_data.py

Tests with GPT-2's tokenizer or tiny Shakespeare need their files in ../shared and skip where those are not.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import NO_NETWORK, PATIENCE, ROOT, needs_gpt2_tokenizer, python, tinyshakespeare

from data.corpus_encoding import encode_job, start_worker
from data.corpus_inputs import Job
from nanosync import tokenizers
from nanosync.token_files import open_tokens, read_meta, split_files


def prepare(script, *args, env=None):
    return python(f"data/{script}", *args, cwd=ROOT, **(env or {}))


def script_module(script):
    """A prepare.py as a module, for what in it deserves a test of its own."""
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "data" / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_error(done, words):
    assert done.code == 2 and words in done.err, done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err


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
    check_error(prepare(script, f"--out={tmp_path}/\udcff", env=env), "is not UTF-8")
    assert sorted(os.listdir(tmp_path)) == ["file", "other"]


def test_shakespeare_does_not_replace_another_data_set(sources, tmp_path):
    assert prepare("python_source/prepare.py", f"--roots={sources}", f"--out={tmp_path}").code == 0
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
    assert done.code == 0, done.err
    assert "60 files" in done.out and "MB to write" in done.out
    meta = read_meta(str(out))
    assert meta["vocab_size"] == 98 == len(meta["chars"])
    assert all(1.0 < ratio < 1.1 for ratio in meta["bytes_per_token"].values())  # é has 2 bytes
    tokenizer = tokenizers.from_meta(meta)
    texts = {split: tokenizer.decode(open_tokens(str(out / f"{split}.bin"), "bin"))
             for split in ("train", "val")}
    in_split = {split: {i for i in range(60) if f"def f{i}(" in text} for split, text in texts.items()}
    assert in_split["train"] | in_split["val"] == set(range(60)) and not in_split["train"] & in_split["val"]
    assert texts["train"].count("def f3(") + texts["val"].count("def f3(") == 1  # its copy was left out
    assert "no code" not in texts["train"] + texts["val"] and tokenizers.UNKNOWN in texts["train"]

    again = prepare("python_source/prepare.py", f"--roots={sources}", f"--out={out}", "--workers=2")
    assert again.code == 0 and "up to date" in again.out
    other = prepare("python_source/prepare.py", f"--roots={sources}", f"--out={out}", "--format=shards")
    assert other.code == 2 and "--out" in other.err and other.err.count("\n") == 1


def test_python_source_as_gpt2_shards(sources, tmp_path):
    needs_gpt2_tokenizer()
    done = prepare("python_source/prepare.py", f"--roots={sources}", f"--out={tmp_path}", "--tokenizer=gpt2",
                   "--format=shards", "--shard_tokens=500", "--workers=2")
    assert done.code == 0, done.err
    kind, paths = split_files(str(tmp_path), "train")
    assert kind == "shards" and len(paths) > 1
    assert [len(open_tokens(p, kind)) for p in paths[:-1]] == [500] * (len(paths) - 1)
    tokens = np.concatenate([open_tokens(p, kind) for p in paths])
    assert tokens[0] == 50256 and (tokens == 50256).sum() == 60 - (
        open_tokens(*split_files(str(tmp_path), "val")[1], kind) == 50256).sum()


def test_python_source_in_characters_and_in_gpt2_tokens_have_folders_of_their_own():
    """So what make demo wrote is not in the way of the configurations that need GPT-2's tokens."""
    folder_of = script_module("python_source/prepare.py").folder_of
    assert folder_of("char") == str(ROOT / "data" / "python_source")
    assert folder_of("gpt2") == str(ROOT / "data" / "python_source_gpt2")
    configs = [ROOT / "config" / "fast_python_source.py", *ROOT.glob("experiments/configs/*/fast_*.json"),
               *ROOT.glob("experiments/configs/fp8/*.json")]
    assert len(configs) == 8
    for path in configs:
        assert '"python_source_gpt2"' in path.read_text(), path


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
    assert done.code == 0 and "62 files" in done.out, done.err


def test_python_source_below_file_names_that_are_not_utf8(sources, tmp_path):
    folder = tmp_path / "src"
    folder.mkdir()
    for path in sources.glob("m*.py"):
        (folder / path.name).write_bytes(path.read_bytes())
    with open(os.path.join(os.fsencode(folder), b"\xff.py"), "w") as f:
        f.write("def odd():\n    return 'xyz'\n")
    done = prepare("python_source/prepare.py", f"--roots={folder}", f"--out={tmp_path / 'out'}")
    assert done.code == 0 and "61 files" in done.out, done.err


def test_python_source_keeps_files_of_blank_lines(tmp_path):
    script_module("python_source/prepare.py")  # which knows how its jobs are read
    (tmp_path / "blank.py").write_text("\n\n")
    job = Job("python", ([str(tmp_path / "blank.py")] * 2, False), 1.0, split="val")
    start_worker({"meta": tokenizers.ByteTokenizer().meta(), "end_of_text": 256, "val_share": 0.0,
                  "report": False})
    encoded = encode_job(job)
    assert encoded.tokens["val"].tolist() == [256, 10, 10] * 2 and len(encoded.documents) == 2


HELD = """# each worker waits in its fourth job until they are interrupted
import importlib.util, os, sys, time
sys.path.insert(0, {root!r})
from data import corpus, corpus_encoding
encode, done = corpus_encoding.encode_job, []
def encode_job(job):
    while len(done) == 3 and not os.path.exists("interrupted"):
        time.sleep(0.01)
    done.append(1)
    return encode(job)
corpus.encode_job = corpus_encoding.encode_job = encode_job
path = os.path.join({root!r}, "data", "python_source", "prepare.py")
spec = importlib.util.spec_from_file_location("prepare", path)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
script.main()
"""


def test_interrupted(tmp_path):
    """Ctrl-C goes to all processes of the terminal, the workers as well."""
    folder, out = tmp_path / "src", tmp_path / "new" / "out"
    folder.mkdir()
    for i in range(320):  # 10 jobs
        (folder / f"m{i}.py").write_text(f"x{i} = 1\n")
    (tmp_path / "held.py").write_text(HELD.format(root=str(ROOT)))
    command = [sys.executable, "held.py", "--workers=2", f"--roots={folder}", f"--out={out}"]
    process = subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True,  # a group, as of a terminal
                               # a shell's job in the background ignores it, and so do its children
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not list(out.glob("*.tmp")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    (tmp_path / "interrupted").touch()
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert [line for line in err.splitlines() if line and "batch" not in line] == ["interrupted"]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("args", [["--roots=/no/such/folder"], ["--roots="], ["--format=parquet"],
                                  ["--workers=0"], ["--shard_tokens=0"], ["--what"]])
def test_python_source_errors(args, tmp_path):
    done = prepare("python_source/prepare.py", *args, f"--out={tmp_path / 'out'}")
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_shakespeare_by_character(tmp_path):
    done = prepare("shakespeare_char/prepare.py", f"--input={tinyshakespeare()}", f"--out={tmp_path}")
    assert "train has 1,003,854 tokens, val has 111,540 tokens, vocabulary 65" in done.out, done.err
    train = open_tokens(str(tmp_path / "train.bin"), "bin")
    text = tinyshakespeare().read_text()
    symbols = sorted(set(text))
    assert train[:1000].tolist() == [symbols.index(c) for c in text[:1000]]  # nanoGPT's ids
    meta = read_meta(str(tmp_path))
    assert meta["sha256"]["val.bin"].startswith("d37d30cc0c8327c2") and meta["bytes_per_token"]["val"] == 1.0
    assert "up to date" in prepare("shakespeare_char/prepare.py", f"--input={tinyshakespeare()}",
                                   f"--out={tmp_path}").out


def test_shakespeare_in_gpt2_tokens(tmp_path):
    needs_gpt2_tokenizer()
    done = prepare("shakespeare/prepare.py", f"--input={tinyshakespeare()}", f"--out={tmp_path}")
    assert "train has 301,966 tokens, val has 36,059 tokens" in done.out, done.err
    meta = read_meta(str(tmp_path))
    assert meta["sha256"]["train.bin"].startswith("502a2bdc8210d1ac")
    assert meta["bytes_per_token"] == {"train": 1_003_854 / 301_966, "val": 111_540 / 36_059}


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
        assert done.code == 2 and words in done.err and done.err.count("\n") == 1, done.err
        assert not (tmp_path / "out").exists()


def test_complete_data_is_up_to_date_without_network_and_text(tmp_path):
    for script, counts, tokenizer in (("shakespeare_char", (1003854, 111540), "char"),
                                      ("shakespeare", (301966, 36059), "gpt2")):
        out = tmp_path / script
        out.mkdir()
        for split, n in zip(("train", "val"), counts):
            np.zeros(n, "<u2").tofile(out / f"{split}.bin")
        (out / "meta.json").write_text(json.dumps(
            {"name": script, "format": "bin", "tokenizer": tokenizer, "vocab_size": 65, "dtype": "uint16",
             "train_tokens": counts[0], "val_tokens": counts[1]}))
        env = NO_NETWORK | {"TIKTOKEN_CACHE_DIR": str(tmp_path)}
        done = prepare(f"{script}/prepare.py", f"--out={out}", env=env)
        assert (done.code, done.out) == (0, f"{out} is up to date\n"), done.err
        os.truncate(out / "val.bin", 100)
        check_error(prepare(f"{script}/prepare.py", f"--out={out}", env=env), "could not download")


def test_texts_that_are_not_utf8_or_have_many_symbols(tmp_path):
    text = "some text " * 100
    (tmp_path / "utf16.txt").write_text(text, encoding="utf-16")
    (tmp_path / "mark.txt").write_text(text, encoding="utf-8-sig")
    (tmp_path / "many.txt").write_text("".join(map(chr, [*range(0x20, 0xD800), *range(0xE000, 0x14000)])))
    done = prepare("shakespeare_char/prepare.py", "--input", tmp_path / "utf16.txt", "--out", tmp_path / "16")
    check_error(done, "utf16.txt is UTF-16")
    assert not (tmp_path / "16").exists()
    for printed in ("vocabulary 79,", "is up to date"):
        done = prepare("shakespeare_char/prepare.py", "--input", tmp_path / "many.txt", "--out",
                       tmp_path / "many")
        assert done.code == 0 and printed in done.out, done.err
    assert read_meta(str(tmp_path / "many"))["dtype"] == "uint32"
    done = prepare("shakespeare_char/prepare.py", "--input", tmp_path / "mark.txt", "--out", tmp_path / "out")
    assert done.code == 0 and read_meta(str(tmp_path / "out"))["chars"] == " emostx"


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
    assert done.code == 0, done.err
    train, val = (open_tokens(str(tmp_path / "out" / f"{split}.bin"), "bin") for split in ("train", "val"))
    tokenizer = tokenizers.GPT2Tokenizer()
    documents = [tokenizer.decode(part) for tokens in (train, val)
                 for part in np.split(tokens, np.flatnonzero(tokens == 50256) + 1) if len(part)]
    documents = sorted(d.removesuffix("<|endoftext|>") for d in documents)
    assert documents == sorted(texts)
    ratios = read_meta(str(tmp_path / "out"))["bytes_per_token"]
    sizes = {split: ratios[split] * (len(tokens) - (tokens == 50256).sum())
             for split, tokens in (("train", train), ("val", val))}
    assert sum(sizes.values()) == pytest.approx(sum(map(len, texts)))
    assert "up to date" in prepare("openwebtext/prepare.py", *args, env=env).out

    texts = [text.replace("says", "said") for text in texts]
    other = datasets.Dataset.from_dict({"text": texts, "url": texts})
    other.to_parquet(str(tmp_path / "parquet" / "a.parquet"))  # of the same name, number and size
    again = prepare("openwebtext/prepare.py", *args, env=env)
    assert again.code == 0 and "up to date" not in again.out
    assert "said" in tokenizer.decode(open_tokens(str(tmp_path / "out" / "train.bin"), "bin"))


def test_openwebtext_says_the_size_before_the_download(tmp_path):
    needs_gpt2_tokenizer()
    env = NO_NETWORK | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = prepare("openwebtext/prepare.py", f"--out={tmp_path / 'out'}", env=env)
    check_error(done, "without a network" if "8,013,769 documents, 39.77 GB" in done.out else "MB free")
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
        error = done.err.splitlines()[-1]  # below a bar of `datasets`
        assert done.code == 2 and error.startswith("error: ") and words in error, done.err
        assert "network" not in error and "Traceback" not in done.err and not (tmp_path / "out").exists()
