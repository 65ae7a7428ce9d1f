"""Peers of the dense GPT: the GPT of a folder's model.py, a nanoGPT, and Hugging Face's GPT-2."""

import importlib.util
import os
from collections.abc import Callable

import torch
import torch.nn as nn

from benchmarks.harness import Bench
from nanosync.errors import UserError
from nanosync.files import first_line


def check_peer(config: dict) -> None:
    """Raise UserError for wrong settings of a peer in mode train or generate."""
    mode, peer = config["mode"], config["peer"]
    if not peer:
        return
    if not (os.path.isfile(os.path.join(peer, "model.py")) or (peer == "hf" and mode == "generate")):
        raise UserError(f"peer={peer!r} is no folder with a model.py" + ", nor 'hf'" * (mode == "generate"))
    if peer == "hf" and importlib.util.find_spec("transformers") is None:
        raise UserError("peer='hf' needs the package transformers: pip install transformers")
    if mode == "generate" and config["temperature"] == 0:
        raise UserError("temperature=0 (always the most likely token) is nothing that a peer can do: compare "
                        "at a temperature above 0")


def load_module(folder: str, mode: str):
    """Import FOLDER/model.py, under a name that no module of this repository has. Raises UserError."""
    path = os.path.join(folder, "model.py")
    spec = importlib.util.spec_from_file_location("peer_model", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # the code is the user's
        raise UserError(f"peer {path} cannot be imported: {type(e).__name__}: {first_line(e)}") from None
    method = "configure_optimizers" if mode == "train" else "generate"
    for owner, name in ((module, "GPTConfig"), (module, "GPT"), (getattr(module, "GPT", None), method)):
        if not hasattr(owner, name):
            raise UserError(f"peer {path} has no {name}: a peer's model.py has what nanoGPT's has")
    return module


def build_model(module, ours: nn.Module, bench: Bench) -> nn.Module:
    """Build a peer's GPT with the weights of ours, on the CPU. Raises UserError.

    module: what load_module returned.
    """
    try:
        theirs = module.GPT(module.GPTConfig(**bench.architecture))
        theirs.load_state_dict(ours.state_dict(), strict=False)  # buffers such as a causal mask stay theirs
    except Exception as e:
        raise UserError(f"peer {bench.config['peer']}/model.py makes no model with the weights of ours: "
                        f"{type(e).__name__}: {first_line(e)}") from None
    return theirs


def generator(model: nn.Module, bench: Bench, autocast) -> Callable:
    """Return a function (idx, n) that appends n tokens to each row of idx with a peer's `generate`."""
    temperature, top_k = bench.config["temperature"], bench.config["top_k"]

    def generate(idx, n):
        with autocast:
            return model.generate(idx, n, temperature=temperature, top_k=top_k)
    return generate


def hugging_face_generator(cache: str | None, bench: Bench) -> Callable:
    """Return a function (idx, n) that appends n tokens with Hugging Face's GPT-2 of the same size.

    cache: cache_implementation of transformers, None for its default.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = bench.config
    size = {name: settings[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    hf = GPT2LMHeadModel(GPT2Config(n_positions=settings["block_size"], **size))
    hf = hf.to(bench.device, bench.dtype).eval()
    options = dict(do_sample=True, temperature=settings["temperature"], top_k=settings["top_k"] or 0,
                   pad_token_id=0, cache_implementation=cache)
    return lambda idx, n: hf.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n,
                                      min_new_tokens=n, **options)
