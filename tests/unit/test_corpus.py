"""Corpora: inputs, tokenizers, splits, weights, resuming, the report on leakage, wrong inputs. CPU; seconds.

    python -m pytest tests/unit/test_corpus.py

Tests with GPT-2's tokenizer need its files in ../shared and skip where those are not.
"""

import gzip
import itertools
import json
import os
import re
import sys

import numpy as np
import pytest
from helpers import needs_gpt2_tokenizer

import data.prepare
from data import corpus, corpus_documents, corpus_inputs, leakage, ngrams
from data.folder_files import files_of
from nanosync import tokenizers
from nanosync.dataloader import open_dataset
from nanosync.errors import UserError
from nanosync.folder_lock import lock_folder
from nanosync.packing import PackedSplit
from nanosync.token_files import open_tokens, read_meta, split_files

WORDS = "the a sync rank loss model token of to and in is layer head step GPU 12 x1 été".split()


def text_of(seed: int, words: int = 60) -> str:
    """A text of random words, with line ends."""
    chosen = np.random.RandomState(seed).choice(WORDS, words)
    return "".join(word + ("\n" if n % 9 == 8 else " ") for n, word in enumerate(chosen)).strip() + "."


TEXTS = [text_of(seed) for seed in range(80)]


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """prepare("--input=...", ..., out="name") -> folder of the data set, made in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*args, out="out", tokenizer="byte", workers=1):
        monkeypatch.setattr(sys, "argv", ["prepare.py", f"--out={tmp_path / out}", f"--workers={workers}",
                                          f"--tokenizer={tokenizer}", *map(str, args)])
        data.prepare.main()
        return tmp_path / out

    return run


@pytest.fixture
def small_jobs(monkeypatch):
    """Jobs of 700 bytes, so that small inputs have many."""
    monkeypatch.setattr(corpus_documents, "JOB_BYTES", 700)
    monkeypatch.setattr(corpus_inputs, "JOB_BYTES", 700)


def write_lines(path, texts, field="text"):
    content = "".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(texts)).encode()
    if path.name.endswith(".gz"):
        content = gzip.compress(content)
    elif path.name.endswith(".zst"):
        pyarrow = pytest.importorskip("pyarrow")
        half = len(content) // 2
        content = b"".join(pyarrow.compress(part, "zstd", asbytes=True)
                           for part in (content[:half], content[half:]))  # two frames
    path.write_bytes(content)
    return path


def write_parquet(path, texts, field="text"):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": list(range(len(texts))), field: texts}), path, row_group_size=30)
    return path


def tokens_of(folder, split):
    kind, paths = split_files(str(folder), split)
    dtype = read_meta(str(folder)).get("dtype")
    return np.concatenate([open_tokens(path, kind, dtype) for path in paths])


def documents_of(folder, split):
    """The texts of a split's documents, by the stored offsets."""
    meta = read_meta(str(folder))
    tokenizer, tokens = tokenizers.from_meta(meta), tokens_of(folder, split)
    starts = np.fromfile(folder / f"{split}.idx", "<u8").astype(np.int64)
    assert starts[0] == 0 and starts[-1] == len(tokens) and (np.diff(starts) > 0).all()
    documents, end_of_text = [], meta.get("end_of_text")
    separated = end_of_text in tokens
    for start, end in itertools.pairwise(starts):
        if separated:
            assert tokens[start] == end_of_text
            start += 1
        assert end_of_text not in tokens[start:end]
        documents.append(tokenizer.decode(tokens[start:end]))
    return documents


def all_documents(folder):
    return sorted(documents_of(folder, "train") + documents_of(folder, "val"))


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("tokenizer", ["char", "byte", "gpt2", "bpe:300"])
def test_a_folder_in_each_tokenizer(prepare, tmp_path, tokenizer):
    if tokenizer == "gpt2":
        needs_gpt2_tokenizer()
    (tmp_path / "texts" / "sub").mkdir(parents=True)
    for n, text in enumerate(TEXTS):
        (tmp_path / "texts" / ("sub" if n % 2 else "") / f"{n}.txt").write_text(text)
    (tmp_path / "texts" / "picture.png").write_bytes(b"\x89PNG\xff" * 9)
    (tmp_path / "texts" / "empty.txt").write_text(" \n")
    folder = prepare("--input=texts", tokenizer=tokenizer)
    assert all_documents(folder) == sorted(TEXTS)
    meta, report = read_meta(str(folder)), report_of(folder)
    assert 0 < meta["val_documents"] < 20 and meta["train_documents"] + meta["val_documents"] == 80
    assert (report["empty_documents"], report["files_not_utf8"]) == (1, 1)
    for split in ("train", "val"):
        size = sum(len(text.encode()) for text in documents_of(folder, split))
        ordinary = len(tokens_of(folder, split)) - meta[f"{split}_documents"]
        assert meta["bytes_per_token"][split] == pytest.approx(size / ordinary)
    assert meta["tokenizer"] == tokenizer.split(":")[0]
    assert (meta["vocab_size"] == 300) == tokenizer.startswith("bpe")


def test_all_kinds_of_inputs_hold_the_same_documents(prepare, tmp_path, small_jobs):
    separated = "<|endoftext|>".join(f"\n{text}\n" for text in TEXTS).strip("\n")
    (tmp_path / "one.txt").write_text(separated)
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + separated.replace("\n", "\r\n").encode())
    (tmp_path / "lines").mkdir()
    for part in range(2):
        write_lines(tmp_path / "lines" / f"{part}.jsonl.gz", TEXTS[part::2])
    inputs = [tmp_path / "one.txt", tmp_path / "windows.txt", tmp_path / "lines",
              write_lines(tmp_path / "a.jsonl", TEXTS), write_lines(tmp_path / "a.jsonl.gz", TEXTS),
              write_lines(tmp_path / "a.jsonl.zst", TEXTS), write_parquet(tmp_path / "a.parquet", TEXTS)]
    expected = None
    for n, path in enumerate(inputs):
        folder = prepare(f"--input={path}", out=f"out{n}")
        splits = sorted(documents_of(folder, "train")), sorted(documents_of(folder, "val"))
        expected = expected or splits
        assert splits == expected and sorted(splits[0] + splits[1]) == sorted(TEXTS)


def test_a_hub_data_set_from_a_folder(prepare, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "hub").mkdir()
    write_parquet(tmp_path / "hub" / "train.parquet", TEXTS, field="body")
    assert all_documents(prepare("--input=hf:./hub", "--field=body")) == sorted(TEXTS)


def test_one_text_is_split_at_its_end(prepare, tmp_path, small_jobs):
    text = "\n" + "\n\n".join(TEXTS) + "\n"
    (tmp_path / "book.txt").write_text(text)
    for tokenizer in ("char", "byte", "gpt2"):
        if tokenizer == "gpt2":
            needs_gpt2_tokenizer()
        folder = prepare("--input=book.txt", "--val_share=0.2", tokenizer=tokenizer, out=tokenizer)
        (train,), (val,) = documents_of(folder, "train"), documents_of(folder, "val")
        assert train + val == text and len(val.encode()) == pytest.approx(0.2 * len(text.encode()), abs=4)
        meta = read_meta(str(folder))
        if tokenizer == "gpt2":  # parts of the text are encoded, and the tokens are those of the whole
            assert tokens_of(folder, "train").tolist() == tokenizers.GPT2Tokenizer().encode(train).tolist()
        elif tokenizer == "char":
            assert meta["chars"] == "".join(sorted(set(text))) and "end_of_text" not in meta


@pytest.mark.parametrize("val_share", [0.1, 0.2, 0.201, 0.3])
def test_windows_line_ends_of_a_long_text_stay_single(prepare, tmp_path, small_jobs, val_share):
    text = "\n".join(TEXTS) + "\n"
    (tmp_path / "book.txt").write_bytes(text.replace("\n", "\r\n").encode())
    folder = prepare("--input=book.txt", f"--val_share={val_share}")
    assert "".join(documents_of(folder, "train") + documents_of(folder, "val")) == text


@pytest.mark.parametrize("text", ["x" * 5000, "é" * 3000, "word " * 900, "a\n\n\n  b\n" * 500, "\n" * 4000,
                                  "日本語。\n" * 400, "word of\r\n" * 700, "\r\n" * 4001, "\r" * 3000,
                                  "x" * 700 + "\r\n" + "x" * 3000])
def test_cuts_of_a_long_text_lose_nothing(text, monkeypatch):
    content, at, parts = text.encode(), 0, []
    while at < len(content):
        size = corpus_documents.safe_cut(content[at:at + 701]) if at + 701 < len(content) else 701
        parts.append(content[at:at + size].decode())
        at += size
    assert "".join(parts) == text and max(map(len, parts)) <= 701
    assert not any(a.endswith("\r") and b.startswith("\n") for a, b in itertools.pairwise(parts))
    monkeypatch.setattr(corpus_documents, "PIECE", 700)
    assert "".join(corpus_documents.pieces(text)) == text


@pytest.mark.parametrize("character", ["é", "東", "😀"])
def test_windows_of_bytes_may_end_inside_a_character(tmp_path, character):
    width = len(character.encode())
    for before in range(width):  # so that a window ends at each place of the character
        path = tmp_path / "long.txt"
        path.write_text("a" * before + character * (70_000 // width), encoding="utf-8")
        corpus_inputs.TextFile(str(path), "").check()
        cut = tmp_path / "cut.txt"
        cut.write_bytes(path.read_bytes()[:5000 - (5000 - before) % width + 1])
        with pytest.raises(UserError, match=r"cut\.txt: byte \d+ is not UTF-8"):
            corpus_inputs.TextFile(str(cut), "")


def test_long_files_of_a_folder_may_have_long_characters(prepare, tmp_path, small_jobs):
    (tmp_path / "texts").mkdir()
    for n, text in enumerate(["東" * 9000, "a" + "東" * 9000, "aa" + "東" * 9000, *TEXTS]):
        (tmp_path / "texts" / f"{n}.txt").write_text(text)
    assert report_of(prepare("--input=texts"))["files_not_utf8"] == 0


def test_long_documents_keep_one_split_and_one_start(prepare, tmp_path, small_jobs):
    long = [text_of(100 + seed, 900) for seed in range(12)]
    (tmp_path / "texts").mkdir()
    for n, text in enumerate(long):
        (tmp_path / "texts" / f"{n}.txt").write_text(text)
    (tmp_path / "all.txt").write_text("<|endoftext|>".join(long))
    for n, path in enumerate(("texts", "all.txt")):
        folder = prepare(f"--input={path}", "--val_share=0.3", out=f"out{n}")
        assert all_documents(folder) == sorted(long)


def test_weights_are_how_often_train_has_a_document(prepare, tmp_path, small_jobs):
    write_lines(tmp_path / "a.jsonl", TEXTS[:40])
    write_lines(tmp_path / "b.jsonl", TEXTS[40:])
    folder = prepare("--input=a.jsonl", "--input=b.jsonl", "--weights=2.5,0.5")
    train, val = (documents_of(folder, split) for split in ("train", "val"))
    counts = [train.count(text) for text in TEXTS]
    assert set(counts[:40]) == {0, 2, 3} and set(counts[40:]) == {0, 1} and len(set(val)) == len(val)
    assert all(count == 0 for text, count in zip(TEXTS, counts) if text in val)
    assert 5 < sum(counts[40:]) < 35 and report_of(folder)["copies"]["train"] == 0  # repeated on purpose
    half = len(train) // 2  # the inputs are mixed
    assert 0.3 < sum(text in TEXTS[40:] for text in train[:half]) / max(1, sum(counts[40:])) < 0.7


def test_shards_and_large_vocabularies(prepare, tmp_path, small_jobs):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    folder = prepare("--input=a.jsonl", "--format=shards", "--shard_tokens=1000", out="mine")
    names = sorted(path.name for path in folder.glob("*.bin"))
    assert names[0] == "mine_train_000000.bin" and len(names) > 10
    assert all_documents(folder) == sorted(TEXTS)
    data = open_dataset(str(folder), 64, train_split=PackedSplit)
    data.check_tokens(257)
    assert data.document_token() == 256
    (tmp_path / "many.txt").write_text("".join(map(chr, [*range(0x20, 0xD800), *range(0xE000, 0x14000)])))
    folder = prepare("--input=many.txt", tokenizer="char", out="many")
    assert read_meta(str(folder))["dtype"] == "uint32" and len(open_dataset(str(folder), 8).train.files[0])


def test_own_tokenizer_json(prepare, tmp_path):
    write_lines(tmp_path / "a.jsonl", [*TEXTS, "a text with <|endoftext|> in it and more words of it"])
    trained = prepare("--input=a.jsonl", tokenizer="bpe:400")
    (tmp_path / "tokenizer.json").write_text(read_meta(str(trained))["tokenizer_json"])
    for name in ("tokenizer.json", str(tmp_path)):
        folder = prepare("--input=a.jsonl", tokenizer=name, out=f"own{len(name)}")
        for split in ("train", "val"):
            assert (folder / f"{split}.bin").read_bytes() == (trained / f"{split}.bin").read_bytes()
    meta = read_meta(str(folder))
    tokenizer = tokenizers.from_meta(meta)
    to_text, text = tokenizer.stream(), "été \N{SNOWMAN} rank"
    assert "".join(to_text(int(i)) for i in tokenizer.encode(text)) == text
    assert tokenizer.encode("<|endoftext|>").tolist() == [meta["end_of_text"]]
    assert meta["end_of_text"] not in tokenizer.encode_ordinary("<|endoftext|>")


def test_the_tokens_do_not_depend_on_the_workers(prepare, tmp_path, small_jobs):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    write_lines(tmp_path / "b.jsonl.gz", [text.upper() for text in TEXTS])
    args = ["--input=a.jsonl", "--input=b.jsonl.gz", "--weights=1,2", "--name=x"]
    made = [contents(prepare(*args, tokenizer="bpe:300", out=f"out{workers}", workers=workers))
            for workers in (1, 2)]
    assert made[0] == made[1]


@pytest.mark.parametrize("stop, kind", [(0, "bin"), (5, "bin"), (12, "shards"), ("tokenizer", "bin"),
                                        ("leakage", "shards")])
def test_resuming_gives_the_same_bytes(prepare, tmp_path, small_jobs, monkeypatch, stop, kind):
    """The run ends without clearing up, as by kill -9, after it has written more than its state says."""

    class Killed(KeyboardInterrupt):
        pass

    args = ["--input=a.jsonl", "--name=x", f"--format={kind}", "--shard_tokens=700"]
    write_lines(tmp_path / "a.jsonl", TEXTS)
    whole = contents(prepare(*args, tokenizer="bpe:300", out="whole"))
    monkeypatch.setattr(corpus, "SAVE_SECONDS", 0.0)
    steps, read, saved = [], [], corpus.Progress.save

    def save(progress):
        if len(steps) == stop:
            for writer in progress.writers.values():
                writer.state()  # flush
            raise Killed
        steps.append(1)
        saved(progress)

    def fail(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(corpus.Progress, "save", save)
        if stop == "tokenizer":
            patch.setattr(corpus.Progress, "open", fail)
        elif stop == "leakage":
            patch.setattr(corpus, "_report", fail)
        with pytest.raises(Killed):
            prepare(*args, tokenizer="bpe:300")
    assert not (tmp_path / "out" / "meta.json").exists()

    encode = corpus.encode_job
    monkeypatch.setattr(corpus, "encode_job", lambda job: (read.append(1), encode(job))[1])
    assert contents(prepare(*args, tokenizer="bpe:300")) == whole
    total = len(list(corpus_inputs.JsonLines("a.jsonl", "text").jobs()))
    assert len(read) == {"tokenizer": total, "leakage": 0}.get(stop, total - len(steps))
    assert not (tmp_path / "out" / ".prepare").exists()


def test_another_input_is_not_resumed(prepare, tmp_path, small_jobs, monkeypatch):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare("--input=a.jsonl")
    write_lines(tmp_path / "a.jsonl", TEXTS[:40])
    assert all_documents(prepare("--input=a.jsonl")) == sorted(TEXTS[:40])


def test_a_complete_data_set_is_up_to_date(prepare, tmp_path, capsys):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    before = contents(prepare("--input=a.jsonl"))
    capsys.readouterr()
    assert contents(prepare("--input=a.jsonl")) == before and "is up to date" in capsys.readouterr().out
    prepare("--input=a.jsonl", "--val_share=0.2")
    assert "up to date" not in capsys.readouterr().out


def test_planted_copies_and_leaks_are_found(prepare, tmp_path, small_jobs):
    train = [text_of(seed) for seed in range(200, 260)]
    val = [text_of(seed) for seed in range(300, 320)]
    train += [train[0], train[1].upper(), "  ", ""]
    train += [val[3], val[4].replace(" ", "\n"), "Before it. " + val[5] + " After it."]
    half = val[6].split()
    train.append(" ".join(half[:len(half) // 2]))
    val += [val[7]]
    write_lines(tmp_path / "train.jsonl", train)
    write_lines(tmp_path / "val.jsonl", val)
    report = report_of(prepare("--input=train.jsonl", "--val_input=val.jsonl"))
    assert report["train"]["documents"] == 66 and report["val"]["documents"] == 21
    assert report["empty_documents"] == 2
    assert report["copies"] == {"train": 1, "val": 1, "val_in_train": 1}
    assert report["copies_but_for_case_and_white_space"] == {"train": 2, "val": 1, "val_in_train": 2}
    found = report["ngrams"]
    assert found["documents_with_any"] == 4
    assert {entry["document"] for entry in found["worst"] if entry["share"] == 1.0} == {3, 4, 5}
    assert [0.2 < entry["share"] < 0.5 for entry in found["worst"] if entry["document"] == 6] == [True]
    assert report["val"]["tokens_per_byte"] == 1.0

    # by hash, a text and its copies are in one split
    write_lines(tmp_path / "all.jsonl", [*TEXTS, *TEXTS, *map(str.upper, TEXTS)])
    report = report_of(prepare("--input=all.jsonl", "--val_share=0.3", out="all"))
    assert report["copies_but_for_case_and_white_space"]["val_in_train"] == 0
    assert report["copies"]["train"] + report["copies"]["val"] == 80


def test_copies_are_counted_in_parts(tmp_path):
    entries = np.zeros(3000, leakage.DOCUMENT)
    random = np.random.RandomState(3)
    entries["key"] = random.randint(0, 900, 3000).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    entries["flags"] = random.rand(3000) < 0.1
    entries.tofile(tmp_path / "documents")
    counts = [leakage.count_copies(str(tmp_path / "documents"), "key", rows) for rows in (10**6, 500, 64)]
    train, val = (entries["key"][entries["flags"] == flag] for flag in (0, 1))
    assert counts[0] == counts[1] == counts[2] == {
        "train": len(train) - len(set(train.tolist())), "val": len(val) - len(set(val.tolist())),
        "val_in_train": int(np.isin(val, train).sum())}


def test_ngrams_of_words():
    def by_hand(text):
        words = re.findall(rb"[a-z0-9\x80-\xff]+", text.lower())
        return len(set(zip(*[words[n:] for n in range(13)])))

    long = " ".join(TEXTS).encode() * 20  # several blocks
    texts = [TEXTS[0].encode(), b"", b"too short", long, TEXTS[0].upper().replace("É", "é").encode()]
    hashes, of_text = ngrams.hashes_of_ngrams(texts)
    for n, text in enumerate(texts):
        assert len(np.unique(hashes[of_text == n])) == by_hand(text)
        assert np.array_equal(hashes[of_text == n], ngrams.hashes_of_ngrams([text])[0])
    assert np.array_equal(hashes[of_text == 0], hashes[of_text == 4])


def planted(tmp_path):
    """Inputs of which each is wrong in its way."""
    for name, content in {
            "a.txt": b"hello world\n" * 50, "utf16.txt": "hello world".encode("utf-16"),
            "bad.txt": b"hello world\n" * 500 + b"\xff", "field.jsonl": b'{"content": "x"}\n',
            "no.jsonl": b"x",
            "list.jsonl": b"[1]\n", "number.jsonl": b'{"text": 3}\n', "empty.txt": b"", "empty.jsonl": b"",
            "latin.jsonl": b'{"text": "\xe9"}', "no.jsonl.gz": b"x\n",
            "cut.jsonl.gz": gzip.compress(b"a" * 99)[:20],
            "no.jsonl.zst": b"no frame", "no.parquet": b"PAR1", "x.zip": b"x", "none.json": b"{}",
            "latin.json": b"\xe9"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder2").mkdir()
    (tmp_path / "folder2" / "a.txt").write_text("hello")
    write_lines(tmp_path / "late.jsonl", [*TEXTS, None])
    (tmp_path / "late.jsonl").write_bytes((tmp_path / "late.jsonl").read_bytes() + b'{"text"')
    content = write_lines(tmp_path / "late.jsonl.gz", [text_of(n, 3000) for n in range(40)]).read_bytes()
    (tmp_path / "late.jsonl.gz").write_bytes(content[:-9])


@pytest.mark.parametrize("args, words", [
    ("", "give --input=FILE"), ("--input=none", "'none' does not exist: an input is a file, a folder or "
                                                "hf:NAME"),
    ("--input=a.txt --weights=x", "no list of numbers"), ("--input=a.txt --weights=1,2", "2 weights of 1 "
                                                                                         "inputs"),
    ("--input=a.txt --weights=0", "above 0"), ("--input=a.txt --weights=nan", "above 0"),
    ("--input=a.txt --tokenizer=word", "is unknown: use gpt2, char, byte, bpe:SIZE or the path"),
    ("--input=a.txt --tokenizer=bpe:32k", "257 to 1,000,000"), ("--input=a.txt --tokenizer=bpe:9", "257 to"),
    ("--input=a.txt --tokenizer=none.json", "is not a usable tokenizer.json"),
    ("--input=a.txt --tokenizer=latin.json", "byte 0 is not UTF-8"),
    ("--input=a.txt --tokenizer=missing.json", "cannot read missing.json: No such file"),
    ("--input=utf16.txt", "utf16.txt is UTF-16"), ("--input=bad.txt", "bad.txt: byte 6000 is not UTF-8"),
    ("--input=field.jsonl", r"no field 'text', but \['content'\]: name the field of the text with --field"),
    ("--input=no.jsonl", "no.jsonl, byte 0: the line is no JSON"), ("--input=list.jsonl", "is no JSON "
                                                                                          "object"),
    ("--input=number.jsonl", "the field 'text' is 3"), ("--input=latin.jsonl", "it is not UTF-8"),
    ("--input=late.jsonl", r"late.jsonl, byte \d{5}: the line is no JSON"),
    ("--input=empty.txt", "empty.txt is empty"), ("--input=empty.jsonl", "empty.jsonl is empty"),
    ("--input=folder", "the folder has no files"), ("--input=. --files=*.rs", r"no files like \*.rs"),
    ("--input=a.txt --files=*.py", "is no folder"), ("--input=no.jsonl.gz", "is no whole gzip file"),
    ("--input=cut.jsonl.gz", "is no whole gzip file"), ("--input=late.jsonl.gz", "is no whole gzip file"),
    ("--input=no.jsonl.zst", "is no whole zstd file"), ("--input=no.parquet", "is no whole parquet file"),
    ("--input=x.zip", "only .jsonl.gz and .jsonl.zst can be read: unpack it"),
    ("--input=a.txt --val_share=1", "above 0 and below 1"), ("--input=a.txt --workers=0", "at least 1"),
    ("--input=a.txt --field=content", "--field=content is for JSON lines, .* and no input is one"),
    ("--input=few.jsonl --separator=;", "--separator=';' ends documents of a text, and no input is a text"),
    ("--input=folder2 --separator=;", "--separator=';' ends documents of a text, and no input is a text"),
    ("--input=a.txt --separator=", "--separator is empty"), ("--input=hf:", "write hf:NAME"),
    ("--input=a.txt --name=x_val --format=shards", "cannot be the name of shards"),
    ("--input=.", "is inside --input=., whose files are all read"),
    ("--input=/dev/zero", "it is not a regular file"), ("--input=late.jsonl --val_share=1e-9", "no JSON"),
    ("--input=few.jsonl --val_share=1e-9", "val would be empty, with 80 documents in all in "
                                           "few.jsonl: set --val_share"),
], ids=lambda value: value)
def test_wrong_inputs(prepare, tmp_path, args, words):
    planted(tmp_path)
    write_lines(tmp_path / "few.jsonl", TEXTS)
    tokenizer = ([arg[12:] for arg in args.split() if arg.startswith("--tokenizer=")] or ["byte"])[0]
    with pytest.raises(UserError, match=words) as error:
        prepare(*args.split(), tokenizer=tokenizer)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("package, path, tokenizer", [
    ("pyarrow", "a.parquet", "byte"), ("pyarrow", "a.jsonl.zst", "byte"),
    ("tokenizers", "a.jsonl", "bpe:300"),
    ("tokenizers", "a.jsonl", "none.json"), ("datasets", "hf:x", "byte")])
def test_a_package_that_is_not_installed(prepare, tmp_path, monkeypatch, package, path, tokenizer):
    planted(tmp_path)
    for name in ("a.jsonl", "a.jsonl.zst"):
        write_lines(tmp_path / name, TEXTS)
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    named = "zstandard" if path.endswith("zst") else package
    with pytest.raises(UserError, match=f"needs the package {named}: pip install {named}"):
        prepare(f"--input={path}", tokenizer=tokenizer)


def test_a_hub_that_is_not_reached(prepare, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"could not load hf:no/such .* without a network, give files"):
        prepare("--input=hf:no/such")


def test_a_full_disk_leaves_nothing(prepare, tmp_path, monkeypatch):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    opened = corpus.Progress.open

    def open_full(progress, dtype):
        os.symlink("/dev/full", tmp_path / "out" / "train.bin.tmp")
        opened(progress, dtype)

    monkeypatch.setattr(corpus.Progress, "open", open_full)
    with pytest.raises(UserError, match=r"cannot write to .*: No space left on device"):
        prepare("--input=a.jsonl")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_in_use_or_holds_another_data_set(prepare, tmp_path):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    os.makedirs(tmp_path / "out" / ".prepare")
    lock = lock_folder(str(tmp_path / "out" / ".prepare"), "out")
    with pytest.raises(UserError, match="is in use by process"):
        prepare("--input=a.jsonl")
    os.close(lock)
    (tmp_path / "out" / ".prepare" / "mine").mkdir()
    with pytest.raises(UserError, match="mine is not of this script"):
        prepare("--input=a.jsonl")
    (tmp_path / "out" / ".prepare" / "mine").rmdir()
    before = contents(prepare("--input=a.jsonl"))
    with pytest.raises(UserError, match="holds another data set, out in byte tokens"):
        prepare("--input=a.jsonl", tokenizer="char")
    planted(tmp_path)
    with pytest.raises(UserError, match="no JSON"):
        prepare("--input=late.jsonl")
    assert contents(tmp_path / "out") == before  # an error does not touch what is there


def test_parts_of_a_folder(prepare, tmp_path, capsys):
    (tmp_path / "code").mkdir()
    for n, text in enumerate(TEXTS):
        (tmp_path / "code" / f"{n}.{'py' if n % 2 else 'md'}").write_text(text)
    write_lines(tmp_path / "code" / "some.jsonl", TEXTS[:3])
    assert all_documents(prepare("--input=code", "--files=*.py", out="py")) == sorted(TEXTS[1::2])
    assert all_documents(prepare("--input=code", out="all")) == sorted(TEXTS)
    assert "some.jsonl are left out; for them alone, add --files='*.jsonl'" in capsys.readouterr().out
    folder = prepare("--input=code", "--files=*.jsonl", "--val_share=0.5", out="lines")
    assert all_documents(folder) == sorted(TEXTS[:3])


def test_links_of_a_folder_give_each_file_once(prepare, tmp_path):
    (tmp_path / "texts" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for n, text in enumerate(TEXTS):
        (tmp_path / ("elsewhere" if n % 3 == 0 else "texts/sub") / f"{n}.txt").write_text(text)
    for place, target in (("texts/sub/up", ".."), ("texts/again", "sub"), ("texts/other", "../elsewhere"),
                          ("texts/1.txt", "sub/1.txt"), ("texts/broken", "nowhere")):
        os.symlink(target, tmp_path / place)
    assert all_documents(prepare("--input=texts")) == sorted(TEXTS)


def test_patterns_of_files(tmp_path):
    for path in ("a.py", "src/b.py", "src/deep/er/c.py", "src/b.md", ".git/d.py", "src/.e.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    for pattern, names in {"*": "a.py b.md b.py c.py", "*.py": "a.py b.py c.py", "src/*.py": "b.py",
                           "src/**/*.py": "b.py c.py", "src/**": "b.md b.py c.py", ".*.py": ".e.py",
                           ".git/*": "d.py", "../*": "", "/*": ""}.items():
        assert sorted(map(os.path.basename, files_of(str(tmp_path), pattern))) == names.split(), pattern


def test_long_files_that_are_not_utf8_are_left_out(prepare, tmp_path, small_jobs):
    (tmp_path / "texts").mkdir()
    for n, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{n}.txt").write_text(text)
    (tmp_path / "texts" / "late.log").write_bytes(b"hello world\n" * 900 + b"\xff\n")
    (tmp_path / "texts" / "cut.log").write_bytes(b"hello world\n" * 900 + "é".encode()[:1])
    folder = prepare("--input=texts")
    assert all_documents(folder) == sorted(TEXTS) and report_of(folder)["files_not_utf8"] == 2


@pytest.mark.parametrize("args, words", [
    ("--input=a.txt --input=b.txt", "val would be empty, with 2 documents in all in a.txt and b.txt: set"),
    ("--input=a.txt --weights=3", "with 1 document in all in a.txt: set --val_share"),
    ("--input=a.txt --input=b.txt", "or name those of val with --val_input")])
def test_too_few_documents_are_counted(prepare, tmp_path, small_jobs, args, words):
    (tmp_path / "a.txt").write_text(text_of(1, 900))  # of several jobs
    (tmp_path / "b.txt").write_text(text_of(2))
    with pytest.raises(UserError, match=words):
        prepare(*args.split(), "--val_share=1e-9")


@pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n", "\n---\n"])
def test_separators_of_lines_in_both_line_ends(prepare, tmp_path, small_jobs, separator):
    texts = [text.replace("\n", " ") for text in TEXTS]
    text = separator.replace("\r\n", "\n").join(texts)
    for name, line_end in (("unix", "\n"), ("windows", "\r\n")):
        (tmp_path / name).write_bytes(text.replace("\n", line_end).encode())
        assert all_documents(prepare(f"--input={name}", f"--separator={separator}", out=f"{name}-out")) \
            == sorted(texts)


def test_separators_where_a_job_ends(prepare, tmp_path, small_jobs):
    texts = [chr(65 + n) * (680 + n) for n in range(40)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    assert all_documents(prepare("--input=a.txt", "--val_share=0.5")) == sorted(texts)
