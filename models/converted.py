"""A model between two formats, and the options of a conversion."""

import contextlib
import os
from dataclasses import dataclass, field, fields

import torch
import torch.nn as nn

from models.registry import INFERENCE_KINDS, build_model
from models.weights import load_parameters
from nanosync.dataloader import open_dataset
from nanosync.errors import UserError, shown
from nanosync.files import MAX_JSON, decode_text, os_error_as_user_error, read_file
from nanosync.foreign_weights import UNKNOWN_DATA
from nanosync.tokenizers import JsonTokenizer

GPT2_VOCABULARIES = (50257, 50304)  # the second is padded


@dataclass
class Converted:
    """A model on its way from one format to another."""

    description: dict  # `model` entry of state.json
    weights: dict[str, torch.Tensor]  # by parameter name
    where: str  # path of the weights, for messages
    step: int = 0  # updates done
    optimizer: dict[str, torch.Tensor] = field(default_factory=dict)  # as in optim.safetensors
    state: dict = field(default_factory=dict)  # entries of state.json that differ from those of a new run
    settings: str = ""  # text of a config file, '' for none
    notes: list[str] = field(default_factory=list)  # lines for the user
    resume_notes: list[str] = field(default_factory=list)  # lines that hold for a checkpoint only

    def model(self) -> nn.Module:
        """Build the model, on the CPU. Raises UserError if the weights do not fit the configuration."""
        model = build_model(self.description, INFERENCE_KINDS)
        load_parameters(model, self.weights, self.where)
        INFERENCE_KINDS[self.description["kind"]].finish(model, self.state)
        return model.eval()

    def check_state(self) -> None:
        """Raise UserError unless entries of state.json that the model's script adds have their types."""
        for name, kind in INFERENCE_KINDS[self.description["kind"]].state.items():
            if not isinstance(self.state.get(name), kind):
                raise UserError(f"{self.where}: the entry {name} is {shown(self.state.get(name))}: export "
                                f"the model again")

    def take_data(self, options: "Options", dataset: str | None = None, tokenizer_file: str = "") -> None:
        """Set the data's fingerprint and tokenizer, as far as they are known. Raises UserError.

        dataset: name of the data set in the converted settings; it need not exist here.
        tokenizer_file: path of a tokenizer.json, which need not exist, for an unknown data set.
        """
        config, data = self.description["config"], None
        length = config.get("block_size") or config["sequence_length"]
        if options.dataset is not None:
            data = open_dataset(options.dataset, length)
            data.check_tokens(config["vocab_size"])
        elif dataset is not None:
            with contextlib.suppress(UserError):  # there is none of this name here, or another one
                data = open_dataset(dataset, length)
                data.check_tokens(config["vocab_size"])
        if data is not None:
            meta, known = data.meta, f"data set {data.folder}"
            name = {"dataset": options.dataset or dataset}
            self.state |= {"data": data.fingerprint, "config": self.state.get("config", {}) | name}
        else:
            meta, name = tokenizer_meta(config["vocab_size"], tokenizer_file)
            known = f"data set unknown, so a resumed run takes any (name it with --dataset=...); " \
                f"tokenizer {name}"
            self.state["data"] = dict(UNKNOWN_DATA)
        self.state["meta"] = meta
        config["used_vocab_size"] = min(config["vocab_size"], 50257 if meta is None else meta["vocab_size"])
        self.notes.append(known)


def tokenizer_meta(vocab_size: int, file: str) -> tuple[dict | None, str]:
    """Return the meta.json of the tokenizer of a model, None for GPT-2's, and a text about it.

    Raises UserError. vocab_size: of the model. file: path of a tokenizer.json, which need not exist.
    """
    if os.path.isfile(file):
        with os_error_as_user_error(f"cannot read {file}"):
            content = decode_text(read_file(file, MAX_JSON), file)
        tokenizer = JsonTokenizer(content, file)
        gpt2 = tokenizer.vocab_size == 50257 and tokenizer.encode("Hello world").tolist() == [15496, 995]
        if not gpt2 and tokenizer.vocab_size <= vocab_size:
            return tokenizer.meta(), "that of its tokenizer.json"
    if vocab_size in GPT2_VOCABULARIES:
        return None, "GPT-2's"
    return {"tokenizer": "unknown", "vocab_size": vocab_size}, "unknown, so text is token ids"


@dataclass
class Options:
    """Settings of the command line besides input and output."""

    step: str = "best"  # of the checkpoints in an out_dir
    dataset: str | None = None  # folder or name of the data set of the training
    moments: str = "keep"  # 'new': leave the optimizer's state out

    def given(self) -> list[str]:
        """Return the names of the options that differ from their defaults."""
        return [f.name for f in fields(self) if getattr(self, f.name) != f.default]
