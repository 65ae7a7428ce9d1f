"""A model between two formats, and the options of a conversion."""

import contextlib
from dataclasses import dataclass, field

import torch
import torch.nn as nn

from models.registry import INFERENCE_KINDS, build_model
from models.weights import load_parameters
from nanosync import checkpoint
from nanosync.dataloader import open_dataset
from nanosync.errors import UserError, shown

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
                                f"the "
                                f"model again")

    def take_data(self, options: "Options", dataset: str | None = None) -> None:
        """Set the data's fingerprint and tokenizer, as far as they are known. Raises UserError.

        dataset: name of the data set in the converted settings; it need not exist here.
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
            gpt2 = config["vocab_size"] in GPT2_VOCABULARIES
            meta = None if gpt2 else {"tokenizer": "unknown", "vocab_size": config["vocab_size"]}
            known = "data set unknown, so a resumed run takes any (name it with --dataset=...); tokenizer " \
                + ("GPT-2's" if gpt2 else "unknown, so text is token ids")
            self.state["data"] = dict(checkpoint.UNKNOWN_DATA)
        self.state["meta"] = meta
        config["used_vocab_size"] = min(config["vocab_size"], 50257 if meta is None else meta["vocab_size"])
        self.notes.append(known)


@dataclass
class Options:
    """What the command line says besides input and output."""

    step: str = "best"  # of the checkpoints in an out_dir
    dataset: str | None = None  # folder or name of the data set of the training
    moments: str = "keep"  # 'new': leave the optimizer's state out
