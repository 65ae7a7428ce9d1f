"""Models and tokenizers of all kinds, saved as checkpoints or as folders of transformers, for tests."""

import torch
from helpers import save_checkpoint

import models
import train_gpt_fast
from nanosync import tokenizers
from nanosync.model_kind import model_description, schedule_description

EOT = 7
SWITCHES = ("bigram", "trigram", "suffix_match", "embedding_skip", "smear", "attention_gate",
            "late_attention", "backout", "half_rotary", "softcap")
SHAPE = dict(sequence_length=24, vocab_size=61, n_layer=5, n_head=2, n_embd=24, windows=[3, 6],
             long_layers=[1, 4], value_layers=[0, 4], offset_layers=[0, 4], exclusive_layers=[1, 4],
             end_of_text=EOT)
CLOCK = {"train_seconds": 1.0, "train_loss": 2.0, "last_val_loss": None, "last_val_step": None}


def fast_model(dtype=torch.float64, untied=False, **changes):
    """A model of train_gpt_fast.py with all its techniques, of which no parameter is zero."""
    torch.manual_seed(0)
    config = train_gpt_fast.GPTConfig(**SHAPE | dict.fromkeys(SWITCHES, True) | changes)
    model = train_gpt_fast.GPT(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    if untied:
        model.untie()
    return model.eval()


def save_speedrun(folder, model, **state) -> None:
    kind = models.FAST if isinstance(model, train_gpt_fast.GPT) else models.SPEEDRUN
    own = {"untied": not model.tied} if kind == models.FAST else {"variant": {}}
    description = model_description(kind, model)
    description["config"] |= state.pop("config", {})
    save_checkpoint(folder, 1, model, **{"model": description} | own | CLOCK | state)


LETTERS = "".join(map(chr, range(65, 65 + 61)))
META = {"tokenizer": "char", "vocab_size": 61, "chars": LETTERS,
        "bytes_per_token": {"train": 1.0, "val": 1.25}}
DATA = {"train_tokens": 3000, "val_tokens": 700, "sha256": {"val.bin": "ab" * 32}}


def save(folder, model, **state) -> str:
    """Save a model of any kind as a checkpoint; return the path of the out_dir."""
    state = {"meta": META, "data": DATA, "val_loss": 2.0, "environment": {"git_commit": "c0ffee"}} | state
    if type(model).__module__ in ("train_gpt", "train_gpt_fast"):
        save_speedrun(folder, model, **state)
    else:
        kind = "gpt" if not hasattr(model.config, "tp_size") else \
            "distributed_gpt" if hasattr(model.config, "block_types") else "reduced_sync_gpt"
        save_checkpoint(folder, 1, model, model=model_description(kind, model),
                        schedule=schedule_description(model), **state)
    return str(folder)


TEXT = "Hello wörld, 日本語 \n\n  def f(x):\n\treturn 🙂 don't I'll 12345\x00"


def trained_bpe():
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds

    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT * 10, "the cat and the hat " * 20], trainer)
    return tokenizers.JsonTokenizer(tokenizer.to_str(), "test")


TOKENIZERS = {"gpt2": tokenizers.GPT2Tokenizer, "byte": tokenizers.ByteTokenizer, "bpe": trained_bpe,
              "char": lambda: tokenizers.CharTokenizer("".join(sorted({*TEXT, *"<|endoftext|>"}))),
              "char with unknown": lambda: tokenizers.CharTokenizer("abc" + tokenizers.UNKNOWN)}


def gpt2_folder(folder, sharded=False, pickled=False, vocab_size=61):
    """A folder that transformers wrote; its model."""
    import transformers

    config = transformers.GPT2Config(vocab_size=vocab_size, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder, **({"max_shard_size": "40KB"} if sharded else {}))
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model
