"""Folders of transformers: logits of every kind of model, the way back, tokenizer files, model cards, folders
that cannot be read. CPU; twenty seconds, of which importing transformers takes half.

    python -m pytest tests/unit/test_conversion_to_huggingface.py
"""

import json
import os
import tempfile

import pytest
import torch
from helpers import build, needs_gpt2_tokenizer, random_model, tokens
from helpers import random_speedrun_model as speedrun_model
from saved_models import DATA, META, TEXT, TOKENIZERS, fast_model, gpt2_folder, save

import models
from models.conversion import Options, convert
from nanosync import checkpoint, exported_tokenizers, tokenizers
from nanosync.dataloader import open_dataset
from nanosync.errors import UserError

os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="modules-"))  # read when it is imported
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

def all_logits(model, idx):
    with torch.no_grad():
        return model(idx, all_logits=True)[0] if hasattr(model.transformer, "wpe") else model(idx)[0]


CASES = {  # name -> model, class of transformers
    "dense": lambda: random_model(torch.float32),
    "without biases": lambda: random_model(torch.float32, bias=False),
    "padded": lambda: random_model(torch.float32, vocab_size=64, used_vocab_size=61),
    "standard": lambda: build(dict(sync_strategy="standard"), 4, torch.float32),
    "blocks": lambda: build(dict(block_types=["tp", "spd", "parallel", "parallel"]), 4, torch.float32),
    "one rank": lambda: build(dict(sync_strategy="spd"), 1, torch.float32),
    **{name: lambda name=name: build(dict(sync_strategy=name), 4, torch.float32)
       for name in ("spd", "kraken", "ladder", "palm", "dtp:3", "mean:2", "caat:0.25")},
    "spd without biases": lambda: build(dict(sync_strategy="spd"), 2, torch.float32, bias=False),
    **{name: lambda name=name: speedrun_model(name, torch.float32)
       for name in ("baseline", "palm", "curriculum")},
    "sync": lambda: speedrun_model("sync", torch.float32, tp_size=2, sync_points=[1, 4]),
    "fast": lambda: fast_model(torch.float32),
    "fast, untied": lambda: fast_model(torch.float32, untied=True, value_tables=1, softcap=False),
    "fast, plain": lambda: fast_model(torch.float32, bigram=False, smear=False, half_rotary=False,
                                      backout=False, attention_gate=False, exclusive_layers=[],
                                      end_of_text=None),
}
DENSE = ("dense", "without biases", "padded", "standard", "one rank")


@pytest.mark.parametrize("case", CASES)
def test_logits_there_and_back(tmp_path, case):
    model, idx = CASES[case]().eval(), tokens(2, 16)
    convert(save(tmp_path / "out", model), str(tmp_path / "hf"), None, Options(step="latest"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    assert (type(theirs).__name__ == "GPT2LMHeadModel") == (case in DENSE)
    ours, scale = all_logits(model, idx)[..., :61], all_logits(model, idx).abs().max()
    with torch.no_grad():
        assert (theirs(idx).logits - ours).abs().max() <= 1e-5 * max(1, scale)
    convert(str(tmp_path / "hf"), str(tmp_path / "back"), None, Options())
    back = models.load(str(tmp_path / "back")).eval()
    assert (all_logits(back, idx)[..., :61] - ours).abs().max() <= 1e-5 * max(1, scale)
    found = checkpoint.find(str(tmp_path / "back"), kinds=models.INFERENCE_KINDS)
    assert (found.step, found.state["meta"], found.state["data"]) == (0, META, DATA)
    if case == "without biases":
        assert not back.config.bias
    if case not in DENSE:
        assert type(back) is type(model) and all(torch.equal(p, q)
                                                 for p, q in zip(model.parameters(), back.parameters()))


def test_a_speedrun_model_has_no_padding(tmp_path):
    convert(save(tmp_path / "out", speedrun_model(dtype=torch.float32)), str(tmp_path / "hf"), None,
            Options(step="latest"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert model(tokens(1, 3), attention_mask=torch.ones(1, 3)).logits.shape == (1, 3, 61)
    assert model(tokens(1, 3), labels=tokens(1, 3)).loss.isfinite()
    with pytest.raises(ValueError, match="padding is not supported"):
        model(tokens(1, 3), attention_mask=torch.tensor([[0, 1, 1]]))


def test_files_of_the_folder(tmp_path):
    out = save(tmp_path / "out", random_model(torch.float32))
    convert(out, str(tmp_path / "hf"), None, Options("latest"))
    card = (tmp_path / "hf" / "README.md").read_text()
    for fact in ("| 2.0000 |", "| 2.3083 |", "3,000 train tokens", "c0ffee", "ab" * 32, "| updates | 1 |"):
        assert fact in card, fact  # 2 nats / (ln 2 * 1.25 bytes) = 2.3083
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "nanosync.json",
        "tokenizer.json", "tokenizer_config.json"}
    assert (tmp_path / "hf").stat().st_mode & 0o777 == (tmp_path / "out").stat().st_mode & 0o777
    assert not list(tmp_path.glob(".tmp*"))


def test_a_card_says_what_is_unknown(tmp_path):
    model = random_model(torch.float32)
    meta = {"tokenizer": "own", "vocab_size": 61}
    notes = convert(save(tmp_path / "out", model, meta=meta, data={}, val_loss=None, environment=None,
                         config={"dataset": "/data/secret/a|b <img>"}),
                    str(tmp_path / "hf"), None, Options("latest"))[1]
    assert "no tokenizer files" in notes[-1] and not (tmp_path / "hf" / "tokenizer.json").exists()
    card = (tmp_path / "hf" / "README.md").read_text()
    assert r"| a\|b &lt;img> |" in card and "secret" not in card
    assert "not measured at this step" in card and card.count("| unknown |") == 3


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_files(tmp_path, name):
    if name == "gpt2":
        needs_gpt2_tokenizer()
    ours = TOKENIZERS[name]()
    made = exported_tokenizers.tokenizer_of(ours.meta(), ours.vocab_size)
    exported_tokenizers.write(made, str(tmp_path), tokenizers.end_of_text(ours.meta()), 16)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ours.vocab_size and theirs.eos_token_id == tokenizers.end_of_text(ours.meta())
    ids = theirs(TEXT)["input_ids"]
    assert ids == ours.encode_ordinary(TEXT).tolist()
    assert theirs.decode(ids) == ours.decode(ids)
    assert theirs("")["input_ids"] == []
    if name == "char":
        with pytest.raises(Exception, match="UNK"):
            theirs("\N{SNOWMAN}")


def test_a_tokenizer_larger_than_the_model(tmp_path):
    meta = {"tokenizer": "char", "vocab_size": 100, "chars": "".join(map(chr, range(100, 200)))}
    with pytest.raises(UserError, match="has 100 tokens and the model 61"):
        convert(save(tmp_path / "out", random_model(torch.float32), meta=meta), str(tmp_path / "hf"), None,
                Options("latest"))
    assert not (tmp_path / "hf").exists()


# In


@pytest.mark.parametrize("options", [{}, {"sharded": True}, {"pickled": True}])
def test_a_gpt2_becomes_a_checkpoint(tmp_path, options):
    theirs, idx = gpt2_folder(tmp_path / "hf", **options), tokens(2, 16)
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == options.get("sharded", False)
    notes = convert(str(tmp_path / "hf"), str(tmp_path / "out"), None, Options())[1]
    assert any("tokenizer unknown" in note for note in notes)
    model = models.load(str(tmp_path / "out")).eval()
    with torch.no_grad():
        assert (theirs(idx).logits - all_logits(model, idx)).abs().max() < 1e-5


def test_the_tokenizer_of_a_foreign_folder(tmp_path):
    gpt2_folder(tmp_path / "hf", vocab_size=300)
    bpe = TOKENIZERS["bpe"]()
    (tmp_path / "hf" / "tokenizer.json").write_text(bpe.content)
    convert(str(tmp_path / "hf"), str(tmp_path / "out"), None, Options())
    state = checkpoint.find(str(tmp_path / "out")).state
    assert state["meta"] == bpe.meta() and state["model"]["config"]["used_vocab_size"] == bpe.vocab_size
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a usable tokenizer.json"):
        convert(str(tmp_path / "hf"), str(tmp_path / "b"), None, Options())


def test_the_tokenizer_of_an_exported_folder(tmp_path):
    out = save(tmp_path / "out", random_model(torch.float32))
    convert(out, str(tmp_path / "hf"), None, Options("latest"))
    assert models.meta_of(str(tmp_path / "hf")) == META and models.meta_of("gpt2") is None


def test_the_tokenizer_of_a_foreign_folder_without_conversion(tmp_path):
    bpe, folder = TOKENIZERS["bpe"](), tmp_path / "hf"
    gpt2_folder(folder, vocab_size=300)
    assert models.meta_of(str(folder)) == {"tokenizer": "unknown", "vocab_size": 300}
    (folder / "tokenizer.json").write_text(bpe.content)
    assert models.meta_of(str(folder)) == bpe.meta()
    gpt2_folder(tmp_path / "gpt2", vocab_size=50257)
    assert models.meta_of(str(tmp_path / "gpt2")) is None


def test_an_exported_folder_with_code_is_no_weights(tmp_path):
    convert(save(tmp_path / "out", speedrun_model(dtype=torch.float32)), str(tmp_path / "hf"), None,
            Options("latest"))
    with pytest.raises(UserError, match=r"exported model of this repository: .* python convert.py"):
        models.find_for_inference({"init_from": str(tmp_path / "hf"), "checkpoint_step": "latest"})


def test_bits_per_byte_are_counted_if_the_data_set_is_here(tmp_path, tiny_data):
    data = open_dataset(str(tiny_data), 1)
    out = save(tmp_path / "out", random_model(torch.float32), meta=data.meta, data=data.fingerprint,
               config={"dataset": str(tiny_data)})
    convert(out, str(tmp_path / "hf"), None, Options("latest"))
    assert "| 2.8854 |" in (tmp_path / "hf" / "README.md").read_text()  # 2 / ln 2: a byte a letter


class Call:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def edit(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize("change, words", [
    (lambda f: (f / "nanosync.json").unlink(), "has no nanosync.json"),
    (lambda f: (f / "nanosync.json").write_text("{"), "nanosync.json is malformed"),
    (lambda f: edit(f / "nanosync.json", step="1"), "nanosync.json is malformed .*step is '1'"),
    (lambda f: edit(f / "nanosync.json", meta={"tokenizer": 3}), "nanosync.json has no usable 'vocab_size'"),
    (lambda f: edit(f / "nanosync.json", state={}), "the entry variant is None"),
    (lambda f: edit(f / "nanosync.json", model={"kind": "llama", "config": {}}), "model of kind 'llama'"),
    (lambda f: edit(f / "nanosync.json", model={"config": {}}), "model of kind None"),
    (lambda f: edit(f / "nanosync.json", model={"kind": "gpt", "config": 3}), "its model has no config"),
    (lambda f: (f / "config.json").write_text("[1]"), "config.json is malformed"),
    (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "cannot read .*model.safetensors"),
])
def test_exported_folders_that_cannot_be_imported(tmp_path, change, words):
    convert(save(tmp_path / "out", speedrun_model(dtype=torch.float32)), str(tmp_path / "hf"), None,
            Options("latest"))
    change(tmp_path / "hf")
    with pytest.raises(UserError, match=words) as error:
        convert(str(tmp_path / "hf"), str(tmp_path / "back"), None, Options())
    assert "\n" not in str(error.value) and not (tmp_path / "back").exists()


@pytest.mark.parametrize("change, words", [
    (lambda f: torch.save({"a": Call(str(f / "executed"))}, f / "pytorch_model.bin"), "nothing of it was"),
    (lambda f: torch.save([1], f / "pytorch_model.bin"), "is not a dict of tensors"),
    (lambda f: torch.save({"h.0.ln_1.weight": 3}, f / "pytorch_model.bin"), "is not a tensor of floating"),
    (lambda f: torch.save({}, f / "pytorch_model.bin"), r"transformer.wte.weight should be \(61, 32\)"),
    (lambda f: edit(f / "config.json", model_type="llama"), "its model_type is 'llama'"),
    (lambda f: edit(f / "config.json", n_layer=3), "transformer.h.2.*should be"),
])
def test_pickled_folders_that_cannot_be_read(tmp_path, change, words):
    gpt2_folder(tmp_path / "hf", pickled=True)
    change(tmp_path / "hf")
    with pytest.raises(UserError, match=words) as error:
        convert(str(tmp_path / "hf"), str(tmp_path / "out"), None, Options())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "hf" / "executed").exists()


def test_directions(tmp_path):
    out = save(tmp_path / "out", random_model(torch.float32))
    with pytest.raises(UserError, match="is a checkpoint of this repository already: choose another format"):
        convert(out, str(tmp_path / "b"), "checkpoint", Options())
    with pytest.raises(UserError, match=r"--moments is for nanoGPT's ckpt.pt, and .* is a checkpoint of th"):
        convert(out, str(tmp_path / "b"), None, Options(moments="new"))
    with pytest.raises(UserError, match="has no checkpoint '7'; it has the steps 1"):
        convert(out, str(tmp_path / "b"), None, Options(step="7"))
    with pytest.raises(UserError, match="no data set 'none'"):
        gpt2_folder(tmp_path / "hf")
        convert(str(tmp_path / "hf"), str(tmp_path / "b"), None, Options(dataset="none"))
    assert not (tmp_path / "b").exists()
