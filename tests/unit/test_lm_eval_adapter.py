"""Requests of lm-evaluation-harness: each kind against its definition, divided over processes, errors; where
the library is installed, against its own backend for transformers. CPU; seconds.

    python -m pytest tests/unit/test_lm_eval_adapter.py
"""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import build, needs_gpt2_tokenizer, random_model, random_speedrun_model

from nanosync import lm_eval_adapter
from nanosync.errors import UserError
from nanosync.lm_eval_adapter import Tasks, TextModel
from nanosync.tokenizers import CharTokenizer, GPT2Tokenizer

CPU = torch.device("cpu")
CHARS = "\n" + "".join(map(chr, range(32, 91)))  # 60 of the model's 61 tokens
PAIRS = [("HELLO", " WORLD"), ("", "A"), ("", "ABC"), ("SPACES AFTER  ", "IT"), ("A" * 40, " TAIL"),
         ("X", "Y" * 16), ("LONG " * 9, "E" * 15), ("Q", "R")]
TEXTS = ["", "A", "AB" * 7, "C" * 15, "D" * 16, "EFG" * 6, "HIJKL" * 20]
MODELS = {"gpt": random_model, "speedrun_gpt": lambda: random_speedrun_model(sequence_length=16),
          "distributed_gpt": lambda: build(dict(block_types=["spd"] * 4), 2)}


def requests(*args):
    return [SimpleNamespace(args=of) for of in args]


def adapter(model, *more, batch_size=3):
    return TextModel(model, CharTokenizer(CHARS), None, batch_size, CPU, *more)


def assert_same(found, expected):
    """fp64: the same sums in another order."""
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-9)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@torch.no_grad()
def log_probabilities(model, row: list[int]):
    """Of each token of a row but the first, given the tokens before it; and the most likely tokens."""
    x = model.hidden(torch.tensor([row[:-1]]))
    logits = model.head(x)[0, :, :model.config.used_vocab_size]
    return logits.log_softmax(-1)[range(len(row) - 1), row[1:]], logits.argmax(-1)


@pytest.mark.parametrize("kind", MODELS)
def test_log_probabilities_are_those_of_the_definition(kind):
    model, tokenizer = MODELS[kind]().eval(), CharTokenizer(CHARS)
    found = adapter(model).loglikelihood(requests(*PAIRS))
    for (context, continuation), (score, greedy) in zip(PAIRS, found):
        n = len(continuation) + len(context) - len(context.rstrip())  # spaces belong to the continuation
        row = tokenizer.encode(context + continuation if context else "\n" + continuation).tolist()[-17:]
        of_each, best = log_probabilities(model, row)
        assert score == pytest.approx(of_each[-n:].sum().item(), rel=1e-9)
        assert greedy == (best[-n:].tolist() == row[-n:])
    for batch_size in (1, 100):
        assert_same(adapter(model, batch_size=batch_size).loglikelihood(requests(*PAIRS)), found)
    assert adapter(model).loglikelihood([]) == []


@pytest.mark.parametrize("kind", MODELS)
def test_a_text_is_scored_once_with_as_much_context_as_fits(kind):
    model, tokenizer = MODELS[kind]().eval(), CharTokenizer(CHARS)
    found = adapter(model).loglikelihood_rolling(requests(*((text,) for text in TEXTS)))
    for text, score in zip(TEXTS, found):
        row, expected = tokenizer.encode("\n" + text).tolist(), 0.0
        for start in range(1, len(row), 16):
            end = min(start + 16, len(row))
            expected += log_probabilities(model, row[max(0, end - 17):end])[0][start - end:].sum().item()
        assert score == pytest.approx(expected, rel=1e-9)


def greedy_text(model, context: str, n: int) -> str:
    """Continue a text token by token, without a cache."""
    tokenizer = CharTokenizer(CHARS)
    row = tokenizer.encode(context).tolist()
    for _ in range(n):
        with torch.no_grad():
            logits = model.head(model.hidden(torch.tensor([row[-16:]])))[0, -1, :model.config.used_vocab_size]
        row.append(int(logits.argmax()))
    return tokenizer.decode(row[-n:])


def test_greedy_continuations_end_before_the_first_stop_text():
    model = random_model(used_vocab_size=60).eval()
    whole = greedy_text(model, "ABC", 10)
    answer = adapter(model)
    options = [{"max_gen_toks": 10}, {"max_new_tokens": 3, "until": []},
               {"max_gen_toks": 10, "until": whole[4]},
               {"max_tokens": 10, "until": [whole[5:7], whole[2:4], "\n\n\n"], "do_sample": False},
               {"max_gen_toks": 10, "until": whole[0], "temperature": 0.0}]
    found = answer.generate_until(requests(*(("ABC", of) for of in options)))
    assert found == [whole, whole[:3], whole[:whole.find(whole[4])], whole[:2] if whole[2:4] not in whole[:3]
                     else whole[:whole.find(whole[2:4])], ""]
    end = answer.text_tokenizer.encode(whole[3])[0]
    answer.end_of_text = int(end)
    assert answer.generate_until(requests(("ABC", {"max_gen_toks": 10}))) == [whole[:whole.find(whole[3])]]


def test_long_contexts_leave_room_for_the_continuation():
    """Of block_size tokens if it has room, else the window slides; a sample is reproducible."""
    model = random_model(used_vocab_size=60).eval()
    text = "".join(CHARS[1 + i % 59] for i in range(50))
    found = adapter(model).generate_until(requests((text, {"max_gen_toks": 6}), (text, {"max_gen_toks": 20})))
    assert found == [greedy_text(model, text[-10:], 6), greedy_text(model, text[-16:], 20)]
    sampled = []
    for _ in range(2):
        torch.manual_seed(5)
        options = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_k": 30}
        sampled += adapter(model).generate_until(requests((text, options)))
    assert sampled[0] == sampled[1] != greedy_text(model, text[-4:], 12)


def test_ranks_divide_requests_and_get_all_answers(monkeypatch):
    model = random_model().eval()
    alone = adapter(model).loglikelihood(requests(*PAIRS))
    for size in (2, 3, 20):
        shares = [[] for _ in range(size)]
        monkeypatch.setattr(lm_eval_adapter, "all_values", lambda mine, group: group.append(mine) or [])
        for rank, share in enumerate(shares):
            adapter(model, rank, size, share).loglikelihood(requests(*PAIRS))
        shares = [share for share, in shares]
        assert sum(map(len, shares)) == len(PAIRS)
        monkeypatch.setattr(lm_eval_adapter, "all_values", lambda mine, group: group)
        assert_same(adapter(model, 0, size, shares).loglikelihood(requests(*PAIRS)), alone)


def test_what_a_model_cannot_answer_is_an_error():
    answer = adapter(random_model(used_vocab_size=40).eval())
    with pytest.raises(UserError, match="a continuation of 17 tokens, and block_size is 16"):
        answer.loglikelihood(requests(("A", "B" * 17)))
    with pytest.raises(UserError, match="token 59, but the model has only tokens 0 to 39"):
        answer.loglikelihood_rolling(requests(("Z",)))
    with pytest.raises(UserError, match="character 'é' is not among the 60 characters"):
        answer.generate_until(requests(("é", {})))


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setattr(lm_eval_adapter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="lm_eval=arc_easy needs lm-evaluation-harness, which is not "
                                        "installed: pip install lm_eval, or leave lm_eval out"):
        Tasks("arc_easy")


def test_lines():
    found = lm_eval_adapter.lines({"a": {"acc": 0.25, "acc_stderr": 0.1, "em,strict": 1}, "b": {"ppl": 9.5}})
    assert found == ["lm_eval a: acc 0.2500 (standard error 0.1000), em,strict 1.0000",
                     "lm_eval b: ppl 9.5000"]


def test_answers_are_those_of_the_librarys_backend_for_transformers(tmp_path):
    """For GPT-2's tokens and an exported model."""
    transformers = pytest.importorskip("transformers")
    model_class = transformers.GPT2LMHeadModel  # before lm_eval, which imports accelerate
    backend = pytest.importorskip("lm_eval.models.huggingface")
    needs_gpt2_tokenizer()
    for path in Path(os.environ["TIKTOKEN_CACHE_DIR"]).iterdir():
        shutil.copy(path, tmp_path / ("vocab.json" if path.read_bytes()[:1] == b"{" else "merges.txt"))
    end = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(str(tmp_path), **end)
    shape = dict(vocab_size=50304, used_vocab_size=50257, n_embd=32, block_size=32)
    model = random_model(torch.float32, **shape).eval()
    model.save_pretrained(str(tmp_path / "hf"))
    exported = model_class.from_pretrained(str(tmp_path / "hf")).eval()
    theirs = backend.HFLM(pretrained=exported, tokenizer=tokenizer, batch_size=1, max_length=32)
    ours = TextModel(model, GPT2Tokenizer(), GPT2Tokenizer.eot_token, 3, CPU)
    pairs = requests(("The cat", " sat on"), ("", "the"), ("Zwölf\n\n", "日本"), (" a ", "b"),
                     ("long " * 60, "end"))
    for (a, greedy), (b, other) in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs)):
        assert a == pytest.approx(b, rel=1e-5) and greedy == other  # fp32
    texts = requests(*((text,) for text in ("a", "the " * 31, "the " * 32, "the " * 33, "Zwölf " * 40)))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-5)
    prompts = requests(*((text, {"until": ["z"], "max_gen_toks": 12, "do_sample": False})
                         for text in ("The cat", "the " * 50)))
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)
