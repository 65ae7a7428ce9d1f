"""HellaSwag: against a reference that scores one row at a time, for each kind of model; shares, batches and
real ranks; what is read; the script. CPU, two launches of 2 real processes; 20 seconds.

    python -m pytest tests/unit/test_hellaswag.py
"""

import contextlib
import json
import math

import numpy as np
import pytest
import torch
from helpers import HELLASWAG_RECORDS as RECORDS
from helpers import MODEL_KINDS as KINDS
from helpers import NO_NETWORK, build, needs_gpt2_tokenizer, random_model, write_lines
from helpers import random_hellaswag as random_examples

from nanosync import hellaswag_eval as hellaswag
from nanosync import token_losses as scoring
from nanosync.errors import UserError
from nanosync.hellaswag_eval import Example, accuracy, make_rows
from nanosync.token_losses import token_losses

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are small, and threads that wait for a busy core make seconds of milliseconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def reference(model, examples: list[Example]) -> tuple[list[list[list[float]]], dict]:
    """The losses of each ending's tokens, and the accuracies, by the definition."""
    losses, acc, acc_norm = [], 0, 0
    for example in examples:
        of_endings = []
        for ending in example.endings:
            row = [*map(int, example.context), *map(int, ending)][-(model.config.block_size + 1):]
            logits = model(torch.tensor([row[:-1]]), all_logits=True)[0][0]
            log_p = logits - logits.exp().sum(dim=-1, keepdim=True).log()
            of_row = [-log_p[t, row[t + 1]].item() for t in range(len(row) - 1)]
            of_endings.append(of_row[-len(ending):])
        sums = [sum(of_ending) for of_ending in of_endings]
        means = [sum(of_ending) / len(of_ending) for of_ending in of_endings]
        acc += sums.index(min(sums)) == example.label
        acc_norm += means.index(min(means)) == example.label
        losses.append(of_endings)
    return losses, {"acc": acc / len(examples), "acc_norm": acc_norm / len(examples), "n": len(examples)}


@pytest.mark.parametrize("kind", KINDS, ids=["gpt", "distributed_gpt", "reduced_sync_gpt"])
def test_agrees_with_the_definition(kind):
    """Also of contexts that are cropped: block_size is 16."""
    model, examples = build(kind, 2).eval(), random_examples(13)
    assert sum(len(e.context) + len(ending) > 17 for e in examples for ending in e.endings) > 20
    losses, expected = reference(model, examples)
    idx, targets = make_rows(examples, 16)
    found = token_losses(model, idx, targets, CPU)
    assert found.dtype == torch.float64 and (found == 0).equal(targets == -1)
    for row, of_ending in zip(found, (of_ending for of_example in losses for of_ending in of_example)):
        # fp64: the same sums in another order
        assert (row[row != 0] - torch.tensor(of_ending, dtype=torch.float64)).abs().max() < 1e-11
    for batch_size in (1, 4, 13, 100):
        assert accuracy(model, examples, batch_size, CPU) == expected
    assert 0 < expected["acc"] < 1 and expected["acc"] != expected["acc_norm"]


def test_padding_does_not_count_nor_do_other_rows():
    """In fp32 losses of one example alone and among longer ones differ by rounding."""
    model, examples = random_model(torch.float32, block_size=80).eval(), random_examples(6)
    together = token_losses(model, *make_rows(examples, 80), CPU).sum(dim=1).view(6, 4)
    assert make_rows(examples, 80)[0].shape == (24, 64)
    for i, example in enumerate(examples):
        alone = token_losses(model, *make_rows([example], 80), CPU).sum(dim=1)
        assert (together[i] - alone).abs().max() < 1e-4  # sums of at most 12 losses of about 5


def test_few_lengths():
    shapes = {make_rows([example], 100)[0].shape[1] for example in random_examples(50, longest=100)}
    assert shapes == {32, 64, 96, 100}


def test_logits_in_pieces(monkeypatch):
    model, examples = random_model().eval(), random_examples(5)
    whole = token_losses(model, *make_rows(examples, 16), CPU)
    monkeypatch.setattr(scoring, "HEAD_ROWS", 7)
    assert (token_losses(model, *make_rows(examples, 16), CPU) - whole).abs().max() < 1e-12


def test_leaves_no_trace_on_training():
    """Mode and random numbers, with dropout, also after an early end or an error."""
    model, examples = random_model(dropout=0.5), random_examples(9)
    expected = reference(model.eval(), examples)[1]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    for mode in (True, False):
        model.train(mode)
        assert accuracy(model, examples, 2, CPU) == expected
        assert accuracy(model, examples, 1, CPU, stop=lambda: True) is None
        with pytest.raises(ZeroDivisionError):
            accuracy(model, examples, 1, CPU, stop=lambda: 1 / 0)
        assert all(module.training == mode for module in model.modules())
    assert torch.equal(torch.get_rng_state(), states[0]) and np.random.get_state()[1].tolist() == states[1]
    assert all(p.grad is None for p in model.parameters())


def test_stop_and_progress():
    model, examples = random_model(torch.float32), random_examples(19)
    asked, done = [], []

    def stop():
        asked.append(len(done))
        return len(asked) == 2

    assert accuracy(model, examples, 1, CPU, stop=stop, progress=lambda *n: done.append(n)) is None
    assert asked == [1, 2] and done == [(i, 19) for i in (1, 2)]
    done.clear()
    accuracy(model, examples, 2, CPU, stop=lambda: False, progress=lambda *n: done.append(n))
    assert done[-1] == (19, 19) and len(done) == 10


def test_under_autocast():
    """The blocks in bf16, the head and the losses in fp32."""
    model, examples = random_model(torch.float32).eval(), random_examples(9)
    rows = make_rows(examples, 16)
    exact = token_losses(model, *rows, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = token_losses(model, *rows, CPU)
        assert accuracy(model, examples, 2, CPU)["n"] == 9
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - exact).abs().max() < 0.1  # bf16 has 8 bits


def test_a_broken_model_is_not_right_by_chance():
    model, examples = random_model(torch.float32), random_examples(40)
    assert accuracy(model, examples, 8, CPU)["acc"] > 0
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    assert accuracy(model, examples, 8, CPU) == {"acc": 0.0, "acc_norm": 0.0, "n": 40}


def test_ending_longer_than_the_context():
    with pytest.raises(UserError, match="block_size=8 is too short for HellaSwag: an ending has 12 tokens"):
        accuracy(random_model(block_size=8), random_examples(9), 2, CPU)


def test_rows_are_those_of_build_nanogpt(tmp_path):
    """Context, then " " + ending, tokenised apart; special tokens in the text are text."""
    needs_gpt2_tokenizer()
    import tiktoken

    path = write_lines(tmp_path / "some.jsonl", RECORDS)
    examples, encoding = hellaswag.load(path), tiktoken.get_encoding("gpt2")
    assert [example.label for example in examples] == [3, 0, 1, 2]
    for record, example in zip(RECORDS, examples):
        assert example.context.tolist() == encoding.encode(record["ctx"], disallowed_special=())
        for text, ending in zip(record["endings"], example.endings):
            assert ending.tolist() == encoding.encode(" " + text, disallowed_special=())
    idx, targets = make_rows(examples[:1], 1024)
    context = encoding.encode(RECORDS[0]["ctx"])
    for x, y, text in zip(idx.tolist(), targets.tolist(), RECORDS[0]["endings"]):
        ending = encoding.encode(" " + text)
        n, row = len(context), context + ending
        assert x[:len(row) - 1] == row[:-1] and y[:n - 1] == [-1] * (n - 1)
        assert y[n - 1:len(row) - 1] == ending and set(y[len(row) - 1:]) <= {-1}
    assert len(hellaswag.load(path, 2)) == 2 and len(hellaswag.load(path, 99)) == 4
    (tmp_path / "crlf.jsonl").write_bytes(open(path, "rb").read().rstrip().replace(b"\n", b"\r\n"))
    assert len(hellaswag.load(str(tmp_path / "crlf.jsonl"))) == 4


GOOD = json.dumps(RECORDS[0]).encode() + b"\n"
BAD = [  # content, the rest of the line
    (b"", " is empty"),
    (GOOD + b"\n" + GOOD, ", line 2: it is not JSON"),
    (GOOD + GOOD[:50], ", line 2: it is not JSON"),
    (GOOD + b"[" * 100_000, ", line 2: it is not JSON"),
    (GOOD + GOOD + b'{"ctx": "caf\xe9"}\n', ", line 3: byte 12 is not UTF-8"),
    (b"\xff\xfe" + GOOD, ", line 1: byte 0 is not UTF-8"),
    (GOOD + b"[]\n", ", line 2: it is a list, not an object with ctx, endings and label"),
    (b"null", ", line 1: it is a NoneType"),
    (b"{}\n", ", line 1: it has no ctx and no endings and no label"),
    (dict(label=...), ", line 2: it has no label; HellaSwag's test split has no labels: use val"),
    (dict(ctx=...), ", line 2: it has no ctx"),
    (dict(ctx=""), ", line 2: ctx='' is not a text with at least one character"),
    (dict(ctx=["a"]), ", line 2: ctx=['a'] is not a text"),
    (dict(endings=["a", "b", "c"]), ", line 2: endings is a list of 3, not a list of 4 texts"),
    (dict(endings="abcd"), ", line 2: endings is a str, not a list of 4 texts"),
    (dict(endings=["a", "b", "c", None]), ", line 2: endings[3]=None is not a text"),
    (dict(label=4), ", line 2: label=4 is not a whole number from 0 to 3"),
    (dict(label=-1), ", line 2: label=-1 is not a whole number"),
    (dict(label="3"), ", line 2: label='3' is not a whole number"),
    (dict(label=True), ", line 2: label=True is not a whole number"),
    (dict(label=1.0), ", line 2: label=1.0 is not a whole number"),
    (dict(label="long" * 1000), ", line 2: label='longlong"),
]


@pytest.mark.parametrize("content, words", BAD, ids=[words for _, words in BAD])
def test_malformed_lines(tmp_path, content, words):
    path = tmp_path / "x.jsonl"
    if isinstance(content, dict):
        record = {key: value for key, value in (RECORDS[0] | content).items() if value is not ...}
        content = GOOD + json.dumps(record).encode()
    path.write_bytes(content)
    with pytest.raises(UserError) as e:
        hellaswag.load(str(path))
    assert str(e.value).startswith(f"{path}{words}")
    assert "\n" not in str(e.value) and len(str(e.value)) < len(str(path)) + 150


def test_download(tmp_path, monkeypatch):
    import requests

    monkeypatch.setattr(hellaswag, "FOLDER", str(tmp_path / "hellaswag"))
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"without a network, give the file as --input=FILE.jsonl"):
        hellaswag.load()
    with pytest.raises(UserError, match=r"--hellaswag_input=FILE.jsonl"):
        hellaswag.load(setting="hellaswag_input")
    response = requests.Response()
    response.status_code = 200
    monkeypatch.setattr(requests, "get", lambda url, timeout: response)
    for content, words in ((GOOD * 10041, "10041 examples, not 10042"),
                           (b"<html>", "line 1: it is not JSON")):
        response._content = content
        with pytest.raises(UserError, match=words):
            hellaswag.load()
    assert not (tmp_path / "hellaswag").exists()
    response._content = GOOD * 10042
    needs_gpt2_tokenizer()
    assert len(hellaswag.load(n_examples=5)) == 5
    assert (tmp_path / "hellaswag" / "hellaswag_val.jsonl").read_bytes() == response.content
    monkeypatch.setattr(requests, "get", None)  # it is there
    assert len(hellaswag.load(n_examples=5)) == 5


@pytest.mark.parametrize("used, meta, words", [
    (50257, None, None), (50257, {"tokenizer": "gpt2"}, None), (50304, None, None),
    (61, {"tokenizer": "char", "vocab_size": 61}, "run has the tokens of the tokenizer 'char'"),
    (50257, {"tokenizer": "o200k"}, "tokenizer 'o200k'"), (50256, None, "run has a vocabulary of 50256"),
    (50305, None, "vocabulary of 50305 tokens"), (50257, {}, "tokenizer None"),
])
def test_vocabularies(used, meta, words):
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
        hellaswag.check_vocabulary(used, meta, "run")
