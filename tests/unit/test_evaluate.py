"""evaluate.py's figures: bits per byte of a uniform model under several tokenizers, losses of windows against
the definition, standard errors, paired differences, McNemar's test; wrong inputs. CPU; seconds.

    python -m pytest tests/unit/test_evaluate.py
"""

import json
import math

import numpy as np
import pytest
import torch
from helpers import (
    build,
    needs_gpt2_tokenizer,
    random_hellaswag,
    random_model,
    random_speedrun_model,
    settings_error,
    write_dataset,
)
from scipy import stats

from model import GPT, GPTConfig
from nanosync import bits_per_byte, comparison, hellaswag_eval
from nanosync.dataloader import evaluate, evaluation_batches, open_dataset
from nanosync.errors import UserError
from nanosync.token_losses import token_losses, window_losses
from nanosync.tokenizers import GPT2_META, CharTokenizer, GPT2Tokenizer

CPU = torch.device("cpu")
DOCUMENTS = ["Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.\n",
             "def f(x):\n    return x\n", "日本語のテキスト、🙂 and more; " * 3,
             "plain words, plain words, plain words. "] * 3
TEXT = "".join(DOCUMENTS)
T = 16


def char_tokens(folder):
    tokenizer = CharTokenizer("".join(sorted(set(TEXT))))
    return tokenizer.encode(TEXT), tokenizer.meta()


def byte_tokens(folder):
    """Each document after token 256; the tokenizer is unknown, so meta.json has the bytes per token."""
    tokens = np.concatenate([[256, *text.encode()] for text in DOCUMENTS])
    return tokens, {"tokenizer": "bytes", "vocab_size": 257, "end_of_text": 256,
                    "bytes_per_token": {"train": 1.0, "val": 1.0}}


def gpt2_tokens(folder):
    needs_gpt2_tokenizer()
    tokenizer = GPT2Tokenizer()
    return np.concatenate([[tokenizer.eot_token, *tokenizer.encode_ordinary(text)] for text in DOCUMENTS]), \
        dict(GPT2_META)


def bpe_tokens(folder):
    """A byte pair encoding that is trained here; the tokenizer is unknown to nanoSync."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(DOCUMENTS, tokenizers.trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    parts = [bpe.encode(text).ids for text in DOCUMENTS]
    per_token = len(TEXT.encode()) / sum(map(len, parts))
    vocab_size = bpe.get_vocab_size()
    return np.concatenate([[vocab_size, *ids] for ids in parts]), \
        {"tokenizer": "trained", "vocab_size": vocab_size + 1, "end_of_text": vocab_size,
         "bytes_per_token": {"train": per_token, "val": per_token}}


def data_set(folder, tokens, meta):
    write_dataset(folder, np.asarray(tokens), np.asarray(tokens), meta["vocab_size"])
    (folder / "meta.json").write_text(json.dumps({"dtype": "uint16", **meta}))
    return open_dataset(str(folder), T)


def summary_of(model, data, n_windows=None, batch_size=5):
    n_windows = n_windows or sum(data.val.eval_windows)
    per_token = bits_per_byte.known_bytes_per_token(data, print)
    windows = window_losses(model, evaluation_batches(data.val, n_windows, batch_size, CPU), n_windows, CPU,
                            data.val.end_of_text)
    return comparison.val_summary(windows, per_token, T, "the model")


@pytest.mark.parametrize("tokens_of", [char_tokens, byte_tokens, gpt2_tokens, bpe_tokens])
def test_uniform_model_has_the_bits_per_byte_of_its_vocabulary(tmp_path, tokens_of):
    """log2(V) * tokens / bytes, where end-of-text is no token of the text."""
    tokens, meta = tokens_of(tmp_path)
    data, V = data_set(tmp_path / "data", tokens, meta), meta["vocab_size"]
    model = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=1, n_head=1, n_embd=4))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    n_text = len(tokens) if data.val.end_of_text is None else int((tokens != data.val.end_of_text).sum())
    expected = math.log2(V) * n_text / len(TEXT.encode())
    found = summary_of(model, data)
    assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-6)  # losses are in fp32
    assert found["loss"] == pytest.approx(math.log(V), rel=1e-6) and found["stderr"] < 1e-6


@pytest.mark.parametrize("tokens_of", [char_tokens, gpt2_tokens])
def test_decoded_bytes_are_exact_also_where_a_piece_ends_inside_a_character(tmp_path, tokens_of, monkeypatch):
    tokens, meta = tokens_of(tmp_path)
    data = data_set(tmp_path / "data", tokens, meta)
    n_text = len(tokens) if data.val.end_of_text is None else int((tokens != data.val.end_of_text).sum())
    for piece in (1, 7, 64, 2**20):
        monkeypatch.setattr(bits_per_byte, "PIECE", piece)
        found = bits_per_byte.measured_bytes_per_token(data.val, data.meta)
        assert found == len(TEXT.encode()) / n_text
    monkeypatch.setattr(bits_per_byte, "PIECE", 16)
    monkeypatch.setattr(bits_per_byte, "DECODED", len(tokens) // 2)  # a sample
    assert bits_per_byte.measured_bytes_per_token(data.val, data.meta) == pytest.approx(found, rel=0.2)


def test_unknown_tokenizer_without_bytes_per_token_has_no_bits_per_byte(tmp_path):
    data = data_set(tmp_path / "data", np.arange(100) % 61, {"tokenizer": "other", "vocab_size": 61})
    found = summary_of(random_model(), data)
    assert found["bits_per_byte"] is None and found["loss"] > 0
    assert "bits per byte n/a, on" in comparison.val_line(found)
    said = []
    assert bits_per_byte.known_bytes_per_token(data, said.append) is None
    assert said == [f"no bits per byte: the tokenizer of {data.folder} is unknown here: write "
                    f"bytes_per_token into its meta.json"]


def test_missing_tokenizer_files_cost_only_the_bits_per_byte(tmp_path, monkeypatch):
    data, said = data_set(tmp_path / "data", np.arange(100), dict(GPT2_META)), []

    def missing(meta):
        raise UserError("GPT-2's tokenizer files are not cached")

    monkeypatch.setattr(bits_per_byte.tokenizers, "from_meta", missing)
    assert bits_per_byte.known_bytes_per_token(data, said.append) is None
    assert said == ["no bits per byte: GPT-2's tokenizer files are not cached"]


@pytest.mark.parametrize("entry", [1.0, {}, {"train": 4.0}, {"val": 0.0}, {"val": -1}, {"val": "4"},
                                   {"val": True}, {"val": 1e300}, [1.0, 2.0]])
def test_malformed_bytes_per_token_is_an_error_that_names_the_entry(tmp_path, entry):
    with pytest.raises(UserError, match=r"data/meta.json: bytes_per_token=.* correct it, or leave it out"):
        data_set(tmp_path / "data", np.arange(100) % 61,
                 {"tokenizer": "char", "vocab_size": 61, "bytes_per_token": entry})


MODELS = {"gpt": lambda: build(None), "distributed_gpt": lambda: build(dict(block_types=["spd"] * 4), 2),
          "reduced_sync_gpt": lambda: build(dict(sync_strategy="grouped", layers_per_group=2), 2),
          "speedrun_gpt": random_speedrun_model}


@pytest.mark.parametrize("kind", MODELS)
def test_mean_over_windows_is_the_val_loss_of_training(tmp_path, kind):
    """For any batch size, and for windows that are spread over the split."""
    model = MODELS[kind]().eval()
    data = data_set(tmp_path / "data", np.random.RandomState(0).randint(0, 61, 403),
                    {"tokenizer": "other", "vocab_size": 61, "end_of_text": 3})
    for n_windows in (1, 7, 25):
        expected = evaluate(model, evaluation_batches(data.val, n_windows, 3, CPU))
        for batch_size in (1, 4, 30):
            found = summary_of(model, data, n_windows, batch_size)
            assert found["loss"] == pytest.approx(expected, rel=1e-9) and found["windows"] == n_windows


def test_end_of_text_counts_in_the_loss_but_not_in_the_text(tmp_path):
    model, tokens = random_model().eval(), np.random.RandomState(0).randint(4, 61, T + 1)
    tokens[5] = tokens[9] = 3
    data = data_set(tmp_path / "data", tokens, {"tokenizer": "other", "vocab_size": 61, "end_of_text": 3})
    x, y = (torch.tensor(part)[None] for part in (tokens[:-1], tokens[1:]))
    losses = token_losses(model, x, y, CPU)[0]
    window, = window_losses(model, evaluation_batches(data.val, 1, 1, CPU), 1, CPU, 3)
    kept = y[0] != 3
    assert window.tolist() == pytest.approx([losses.sum().item(), T, losses[kept].sum().item(), T - 2])


def test_losses_over_the_used_vocabulary_and_greedy_targets():
    model = random_model(used_vocab_size=50).eval()
    idx, targets = torch.arange(12).view(1, 12), torch.arange(1, 13).view(1, 12)
    with torch.no_grad():
        logits = model(idx, all_logits=True)[0][..., :50]
    targets[0, 3] = logits[0, 3].argmax()
    targets[0, :2] = -1
    greedy = torch.zeros(1, 12, dtype=torch.bool)
    losses = token_losses(model, idx, targets, CPU, 50, greedy)
    expected = -logits.log_softmax(-1)[0, range(12), targets[0]]
    assert (losses[0, 2:] - expected[2:]).abs().max() < 1e-12 and not losses[0, :2].any()
    assert greedy[0].tolist() == [t != -1 and t == best for t, best in
                                  zip(targets[0].tolist(), logits[0].argmax(-1).tolist())]


# Statistics, against scipy


def test_paired_difference_is_students():
    random = np.random.RandomState(1)
    windows = random.rand(23)
    others = windows + 0.01 * random.randn(23) + 0.004
    found = comparison.paired_difference(windows, others)
    expected = stats.ttest_rel(windows, others)
    low, high = expected.confidence_interval(0.95)
    assert found["interval"] == pytest.approx([low, high], rel=1e-9) and found["n"] == 23
    assert found["mean"] / found["stderr"] == pytest.approx(expected.statistic, rel=1e-9)
    assert comparison.paired_difference(windows, windows)["interval"] == [0, 0]
    assert comparison.paired_difference(windows[:1], others[:1])["interval"] is None


@pytest.mark.parametrize("n, document", [(12, 1), (300, 8), (301, 1)])
def test_intervals_hold_95_percent_also_if_documents_are_longer_than_windows(n, document):
    """Losses that are alike within a document, in windows of which some have hardly any text: 2,000 splits.
    Without groups the second interval holds 65%; without the ratio's error bits per byte would hold 100%."""
    random, held = np.random.RandomState(5), np.zeros(2)
    for _ in range(2000):
        alike = np.repeat(random.randn(-(-n // document)), document)[:n]
        difference = 0.5 + 0.1 * alike + 0.1 * random.randn(n)
        text = random.choice([4, 16], n)
        others = 3 + random.rand(n)
        sums = [np.stack((16 * loss, np.full(n, 16), text * loss, text), axis=1)
                for loss in (others + difference, others)]
        found = comparison.val_difference(*sums, 1 / math.log(2))
        held += [low <= 0.5 <= high for low, high in (of["interval"] for of in found.values())]
        assert found["loss"]["n"] == n
    assert held / 2000 == pytest.approx(0.94, abs=0.03)


def test_groups_have_each_window_once():
    for n in (1, 29, 30, 31, 100):
        sums = comparison.grouped(np.stack((np.arange(n), np.ones(n)), axis=1))
        assert len(sums) == min(n, 30) and np.ptp(sums[:, 1]) <= 1
        assert sums.sum(axis=0).tolist() == [n * (n - 1) / 2, n]


def test_pairs_cancel_what_is_hard_for_both_models():
    random = np.random.RandomState(2)
    hard = 3 + random.rand(50)
    sums = [np.stack((16 * loss, np.full(50, 16), 16 * loss, np.full(50, 16)), axis=1)
            for loss in (hard + 0.01, hard + 0.001 * random.randn(50))]
    found = comparison.val_difference(*sums, 2.0)
    assert found["loss"]["interval"][0] > 0.009
    assert comparison.val_summary(sums[0], 2.0, 16, "")["stderr"] > 50 * found["loss"]["stderr"]
    assert found["bits_per_byte"]["mean"] == pytest.approx(found["loss"]["mean"] / math.log(2) / 2)
    assert comparison.val_difference(*sums, None)["bits_per_byte"] is None


@pytest.mark.parametrize("here, there, both", [(0, 0, 5), (1, 0, 0), (3, 9, 20), (9, 3, 1), (40, 40, 0),
                                               (700, 611, 9000)])
def test_mcnemar_is_the_exact_binomial_test(here, there, both):
    right = np.array([True] * here + [False] * there + [True] * both)
    others = np.array([False] * here + [True] * there + [True] * both)
    found = comparison.mcnemar(right, others)
    expected = stats.binomtest(here, here + there).pvalue if here + there else 1.0
    assert found["p"] == pytest.approx(expected, rel=1e-9)
    assert (found["only_here"], found["only_there"]) == (here, there)
    assert found["mean"] == pytest.approx((here - there) / len(right))


def test_hellaswag_answers_are_in_the_order_of_the_examples():
    model, examples = random_model(torch.float64).eval(), random_hellaswag(17)
    right = hellaswag_eval.judge(model, examples, 4, CPU)
    alone = [hellaswag_eval.judge(model, [example], 1, CPU)[0] for example in examples]
    assert right.tolist() == np.array(alone).tolist() and 0 < right.sum() < right.size
    found = comparison.hellaswag_summary(right)
    acc = hellaswag_eval.accuracy(model, examples, 4, CPU)
    assert {key: found[key] for key in acc} == acc
    p = acc["acc"]
    assert found["acc_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 16))


# Wrong inputs


def test_loss_that_is_not_finite_is_an_error():
    windows = np.array([[1.0, 16, 1.0, 16], [math.nan, 16, math.nan, 16]])
    with pytest.raises(UserError, match=r"the val loss of out is nan: evaluate with --dtype=float32"):
        comparison.val_summary(windows, 1.0, 16, "out")


CHAR = {"tokenizer": "char", "vocab_size": 3, "chars": "abc"}


@pytest.mark.parametrize("meta, other, words", [
    (None, GPT2_META, None), (CHAR, dict(CHAR), None), (None, CHAR, "tokenizer='gpt2' and other with 'char'"),
    (CHAR, CHAR | {"chars": "abd"}, "chars='abc' and other with 'abd'"),
    (CHAR | {"tokenizer_json": "a"}, CHAR | {"tokenizer_json": "b"},
     "tokenizer_json='a' and other with 'b'"),
    (CHAR, CHAR | {"vocab_size": 4}, "vocab_size=3 and other with 4"),
])
def test_other_tokens_are_an_error(meta, other, words):
    if words is None:
        return comparison.check_same_tokens(meta, "run", other, "other")
    with pytest.raises(UserError, match=f"run has tokens with {words}: their losses are of different tokens"):
        comparison.check_same_tokens(meta, "run", other, "other")


def test_an_unknown_tokenizer_is_an_error_that_says_how_to_name_it():
    unknown = {"tokenizer": "unknown", "vocab_size": 3}
    with pytest.raises(UserError, match=r"the tokenizer of run is unknown: .*convert\.py INPUT OUT_DIR"):
        comparison.check_same_tokens(unknown, "run", CHAR, "data")
    comparison.check_same_tokens(unknown, "run", unknown, "data")


@pytest.mark.parametrize("args, words", [
    (["--batch_size=0"], "batch_size=0 must be at least 1"),
    (["--val_windows=-1"], "val_windows=-1 must be at least 0"),
    (["--block_size=0"], "block_size=0 must be at least 1"),
    (["--n_examples=0", "--hellaswag"], "n_examples=0 must be at least 1"),
    (["--val_windows=0"], "leaves nothing to evaluate"),
    (["--hellaswag_input=x.jsonl"], "hellaswag_input is for --hellaswag: add that setting"),
    (["--n_examples=5"], "n_examples is for --hellaswag: add that setting"),
    (["--against_step=best"], "for --against=...: add that setting, or leave against_step out"),
    (["--lm_eval_limit=0", "--lm_eval=a"], "lm_eval_limit=0 must be at least 1"),
    (["--lm_eval_fewshot=0"], "lm_eval_fewshot is for --lm_eval=...: add that setting"),
    (["--lm_eval_path=tasks"], "lm_eval_path is for --lm_eval=...: add that setting"),
    (["--lm_eval_path=none", "--lm_eval=a"], "lm_eval_path=none is not a folder"),
    (["--lm_eval=a", "--val_windows=0", "--against=x"], "against compares val losses and HellaSwag"),
    (["--json=missing/x.json"], "json='missing/x.json' is not the path of a file in an existing folder"),
    (["--json=."], "json='.' is a folder: give the path of a file"),
    (["--window=3"], "unknown key 'window'"),
])
def test_wrong_settings(args, words):
    problem = settings_error("evaluate.py", *args)
    assert words in problem and "\n" not in problem


def test_settings_that_are_fine():
    for args in (["--init_from=out", "--against=other", "--against_step=5"],
                 ["--hellaswag", "--val_windows=0"],
                 ["--init_from=gpt2", "--sync_strategy=spd", "--tp_size=2"]):
        assert settings_error("evaluate.py", *args) is None
