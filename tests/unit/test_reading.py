"""Reading of files that any program may have written: regular files, bounded JSON, logs; messages of errors.

CPU, no process; milliseconds.

    python -m pytest tests/unit/test_reading.py
"""

import errno
import io
import json
import os
import sys

import numpy as np
import pytest
import torch
from helpers import write_log

from nanosync import errors, huggingface
from nanosync.errors import UserError
from nanosync.files import open_regular, parse_json, read_file, read_json, write_result
from nanosync.run_log import LogTail, read_log


def test_only_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "text").write_text("abc")
    (tmp_path / "link").symlink_to("text")
    for name, words in (("pipe", "not a regular file"), ("zero", "not a regular file"),
                        ("", "Is a directory"), ("none", "No such file"), ("a\0b", "null byte")):
        for read in (lambda path: read_file(path, 9), open_regular, read_json):
            with pytest.raises(OSError, match=words):
                read(os.path.join(tmp_path, name))
    assert read_file(str(tmp_path / "link"), 3) == b"abc"
    with pytest.raises(OSError, match="more than 2 bytes"):
        read_file(str(tmp_path / "text"), 2)


@pytest.mark.parametrize("text, words", [
    ('{"a": 1, "b": 2, "a": 3}', "has 'a' twice"), ("[NaN]", "NaN"), ("-Infinity", "Infinity"),
    ('{"a": [1e999]}', "'a' is not a finite"), ('{"a": 9223372036854775808}', "does not fit into 64 bits"),
    ("9" * 5000, "."), ("[" * 10**6, "nested too deeply"), ("[" * 60 + "]" * 60, "nested too deeply"),
    ('{"a": "\\u0000"}', "control"), ('{"a": "\\u001b[2J"}', "control"), ('{"a\\u0007": 1}', "control"),
    ('{"a": "\\ud800"}', "not valid Unicode"), ('{"a": "\x00"}', "."), ("", "."), ("{'a': 1}", "."),
])
def test_json_that_is_refused(text, words):
    with pytest.raises(ValueError, match=words) as error:
        parse_json(text.encode())
    assert len(str(error.value)) < 300


def test_json_that_is_accepted():
    value = {"chars": "\x00\x1b\n", "sample_prompt": "\x07", "a": [1.5, -2**63, 2**63 - 1, None, True, "é\n"]}
    assert parse_json(json.dumps(value).encode()) == value
    with pytest.raises(ValueError, match="utf-8"):
        parse_json(b'"\xff"')
    with pytest.raises(ValueError):
        parse_json('{"a": 1}'.encode("utf-16"))


START = {"event": "start", "time": 1.0, "config": {}, "resumed": False}
ITER = {"event": "iter", "time": 2.0, "step": 0, "loss": 3.0, "lr": 0.1, "norm": 1.0, "seconds": 0.1,
        "tokens_per_second": 10.0, "mfu": None}


@pytest.mark.parametrize("change", [
    {"step": "6"}, {"step": True}, {"step": 1.5}, {"step": -1}, {"step": 10**30}, {"loss": [1]},
    {"loss": "3"}, {"loss": float("inf")}, {"loss": float("nan")}, {"loss": 10**400}, {"loss": True},
    {"time": -1}, {"time": 1e300}, {"seconds": 1e999}, {"tokens_per_second": -5}, {"event": 3},
    {"event": "end", "status": 3}, {"event": "end", "status": "\x1b[2J"},
    {"event": "schedule", "syncs": None}, {"event": "sample", "text": 3},
    {"event": "start", "config": []}, {"event": "start", "config": {"a": float("inf")}, "resumed": False},
    {"event": "start", "config": {}}, {"event": "start", "config": {}, "resumed": True, "resumed_step": 3},
    {"event": "start", "config": {"a\0": 1}, "resumed": False, "environment": {}},
    {"event": "start", "config": {}, "resumed": False, "environment": [3]}])
def test_events_of_wrong_types_and_ranges(tmp_path, change):
    write_log(tmp_path / "run_1.jsonl", START, ITER, ITER)
    assert len(read_log(str(tmp_path))) == 3
    write_log(tmp_path / "run_1.jsonl", START, ITER | change)
    with pytest.raises(UserError, match="is no log of a training run"):
        read_log(str(tmp_path))


def test_logs_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "run_1.jsonl")
    with pytest.raises(UserError, match="it is not a regular file"):
        read_log(str(tmp_path))
    assert LogTail(str(tmp_path)).read() == []
    with open(tmp_path / "run_2.jsonl", "wb") as f:
        f.truncate(2**40)
    for size in (2**40, 2**25):
        with open(tmp_path / "run_2.jsonl", "wb") as f:
            f.truncate(size)
        with pytest.raises(UserError, match="no log of a training run"):
            read_log(str(tmp_path / "run_2.jsonl"))


@pytest.mark.parametrize("change", [
    {"n_layer": 1.5}, {"n_layer": 10**9}, {"n_layer": "12"}, {"n_layer": True}, {"vocab_size": 10**30},
    {"n_embd": 2**40}, {"n_positions": 0}, {"n_head": None}, {"n_head": [12]}, {"model_type": "a\x1b[2J"},
    {"model_type": "llama" * 10**5}, {"n_inner": float("nan")}])
def test_configurations_of_hugging_face(tmp_path, change):
    from model import GPT

    config = {"n_positions": 16, "n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 61} | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        GPT.from_pretrained(str(tmp_path))
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_a_hugging_face_configuration_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match="it is not a regular file"):
        huggingface.read_config(str(tmp_path))


def test_every_kind_of_too_little_memory():
    found = []
    for allocate in (lambda: np.empty(2**60, np.uint8), lambda: torch.empty(2**60, dtype=torch.uint8),
                     lambda: bytearray(2**60), lambda: (_ for _ in ()).throw(MemoryError())):
        try:
            allocate()
        except Exception as e:
            found.append(errors._message_for_user(type(e), e, ("batch_size",)))
    assert len(found) == 4
    assert all(message.startswith("out of memory: use a smaller batch_size or model (") for message in found)


def test_streams_that_were_closed(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    errors._open_closed_streams()
    print("nowhere", flush=True)
    assert sys.stdin.read() == "" and os.get_inheritable(sys.stdout.fileno())
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    errors._open_closed_streams()
    assert sys.stdout is stream


def test_a_result_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def no_space(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match=r"cannot write .*x\.json: No space left on device: free space, or"):
        write_result(str(tmp_path / "x.json"), {})
    with pytest.raises(UserError, match="No such file or directory"):
        write_result(str(tmp_path / "gone" / "x.json"), {})
    assert not os.listdir(tmp_path)
