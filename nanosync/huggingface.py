"""GPT-2 weights in Hugging Face's format: reading from the hub or a folder, and writing."""

import json
import os

import torch
import torch.nn as nn

from nanosync.errors import UserError, shortened, shown
from nanosync.files import expand_path, first_line, read_json
from nanosync.foreign_weights import advice
from nanosync.tensor_files import check_values, read_tensors, write_tensors

GPT2_SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 350M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}
GPT2_VOCAB_SIZE = 50257
OWN_MODEL_TYPE = "nanosync"  # of exported models that transformers has no class for
# Hugging Face stores these weights as Conv1D, transposed
CONV1D_WEIGHTS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def check_name(name: str) -> None:
    """Raise UserError unless a name is that of a folder with a GPT-2's configuration, or a key of GPT2_SIZES.

    The weights are not read and nothing is downloaded.
    """
    if unread := advice(name):
        raise UserError(unread)
    if os.path.isdir(name):
        if not os.path.exists(os.path.join(name, "config.json")):
            raise UserError(f"{name} has neither checkpoints (ckpt/step-...) nor config.json and "
                            f"model.safetensors: name another folder")
        read_config(name)
    elif name not in GPT2_SIZES:
        raise UserError(f"{name!r} is neither a folder nor one of {', '.join(GPT2_SIZES)}")


def find_folder(name: str) -> str:
    """Return the folder of GPT-2 weights, downloaded if they are not in the local cache. Raises UserError.

    name: a local folder, or a key of GPT2_SIZES.
    """
    name = expand_path(name)
    check_name(name)
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # the error below replaces its warnings
    try:
        files = ["config.json", "model.safetensors"]
        return snapshot_download(f"openai-community/{name}", allow_patterns=files)
    except Exception as e:  # any type, from huggingface_hub or its HTTP library
        raise UserError(f"could not download {name} ({type(e).__name__}): without a network, give a folder "
                        f"with its config.json and model.safetensors instead of the name") from None


def read_config(folder: str) -> dict:
    """Read the fields of model.GPTConfig from a folder's config.json.

    Raises UserError if the file does not describe a GPT-2.
    """
    path = os.path.join(folder, "config.json")
    try:
        c = read_json(path)
        kind = c.get("model_type", "gpt2") if isinstance(c, dict) else None
        if kind == OWN_MODEL_TYPE:
            raise UserError(f"{folder} is an exported model of this repository: make it a checkpoint with "
                            f"python convert.py {folder} OUT_DIR, and give that folder")
        if kind != "gpt2":
            raise UserError(f"{path} is not the configuration of a GPT-2: its model_type is {shown(kind)}")
        fields = {name: c["n_positions" if name == "block_size" else name]
                  for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
        for name, value in fields.items():
            if type(value) is not int or not 1 <= value < 2**31:
                raise ValueError(f"{name} is {shown(value)}")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as e:
        problem = getattr(e, "strerror", None) or first_line(e)
        raise UserError(f"{path} is not the configuration of a GPT-2 ({type(e).__name__}: {problem})"
                        ) from None
    wanted = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
              "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
              "tie_word_embeddings": True, "n_inner": None}
    for key, value in wanted.items():
        if c.get(key, value) != value and not (key == "n_inner" and c[key] == 4 * fields["n_embd"]):
            raise UserError(f"{path} has {key}={shown(c[key])}; this model supports only {value!r}")
    return fields


def read_weights(folder: str) -> tuple[str, dict[str, torch.Tensor]]:
    """Read a folder's model.safetensors, or the files that model.safetensors.index.json lists.

    Return the path of that file, for error messages, and the tensors by name. Raises UserError.
    """
    path = os.path.join(folder, "model.safetensors")
    index = path + ".index.json"
    if os.path.exists(path) or not os.path.exists(index):
        return path, read_tensors(path)
    try:
        files = read_json(index)["weight_map"]
        for file in files.values():
            if type(file) is not str or file != os.path.basename(file) or not file.endswith(".safetensors"):
                raise ValueError(f"{shown(file)} is not the name of a file beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        problem = getattr(e, "strerror", None) or first_line(e)
        raise UserError(f"{index} is not a list of weights ({type(e).__name__}: {problem})") from None
    tensors = {}
    for file in sorted(set(files.values())):
        part = read_tensors(os.path.join(folder, file))
        if twice := sorted(set(part) & set(tensors)):
            raise UserError(f"{index}: {shown(twice[0])} is in {file} and in another file: which of them is "
                            f"the weight is unknown; write the files again")
        tensors |= part
    if missing := sorted(set(files) - set(tensors)):
        raise UserError(f"{index} says that {shown(missing[0])} is in {files[missing[0]]}, and it is not: "
                        f"the files do not belong together")
    return index, tensors


def load_weights(model: nn.Module, folder: str) -> None:
    """Copy a folder's weights into a model.

    Raises UserError if a weight is missing, there twice, has another shape, has values that are not finite,
    or belongs to a layer that the model lacks.
    """
    copy_weights(model, *read_weights(folder))


@torch.no_grad()
def copy_weights(model: nn.Module, path: str, read: dict[str, torch.Tensor]) -> None:
    """Copy weights with Hugging Face's names and shapes into a model. Raises UserError, see load_weights.

    path: file of the weights, for error messages.
    """
    # the hub's GPT-2 files have names without "transformer.", and contain the causal masks
    tensors = {name.removeprefix("transformer."): t for name, t in read.items()}
    twice = [name for name in tensors if name in read and f"transformer.{name}" in read]
    if twice:
        raise UserError(f"{path} has both {shown(twice[0])} and {shown('transformer.' + twice[0])}: which of "
                        f"them is the weight is unknown; write the file again")
    for name, p in model.named_parameters():
        tensor = tensors.get(name.removeprefix("transformer."))
        if tensor is not None:
            check_values({name: tensor}, path)
        if tensor is not None and name.endswith(CONV1D_WEIGHTS):
            tensor = tensor.T
        if tensor is None or tensor.shape != p.shape:
            shape = None if tensor is None else tuple(tensor.shape)
            raise UserError(f"{path}: {name} should be {tuple(p.shape)} and is {shape}")
        p.copy_(tensor)
    expected = {name.removeprefix("transformer.") for name, _ in model.named_parameters()}
    masks = (".attn.bias", ".attn.masked_bias")
    unused = sorted(name for name in set(tensors) - expected
                    if name.startswith("h.") and not name.endswith(masks))
    if unused:
        raise UserError(f"{path} has {len(unused)} weights that the model of config.json has no place for, "
                        f"such as {shortened(unused[0], 80)}: the two files do not belong together")


@torch.no_grad()
def save(model: nn.Module, folder: str, end_of_text: int | None = None) -> None:
    """Write a folder that transformers loads as a GPT2LMHeadModel with the same logits.

    Padding rows of the vocabulary are not written. Biases that the model lacks are written as zeros.

    end_of_text: token that ends generation. None: that of GPT-2's vocabulary, and none of another one, whose
        last token, e.g. the last letter of an alphabet, must not end generation.
    """
    folder, c = expand_path(folder), model.config
    tensors = {}
    for name, p in model.named_parameters():
        p = p.detach().cpu()
        if name == "transformer.wte.weight":
            p = p[:c.used_vocab_size]
        tensors[name] = (p.T if name.endswith(CONV1D_WEIGHTS) else p).contiguous()
        if name.endswith(".weight") and not c.bias and "wte" not in name and "wpe" not in name:
            tensors[name.removesuffix("weight") + "bias"] = p.new_zeros(p.shape[0])
    if end_of_text is None and c.used_vocab_size == GPT2_VOCAB_SIZE:
        end_of_text = GPT2_VOCAB_SIZE - 1
    os.makedirs(folder, exist_ok=True)
    write_tensors(tensors, os.path.join(folder, "model.safetensors"), {"format": "pt"})
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump({
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
            "n_positions": c.block_size, "n_ctx": c.block_size, "n_embd": c.n_embd, "n_head": c.n_head,
            "n_layer": c.n_layer, "vocab_size": c.used_vocab_size, "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True, "dtype": "float32", "attn_pdrop": c.dropout, "embd_pdrop": c.dropout,
            "resid_pdrop": c.dropout, "bos_token_id": end_of_text, "eos_token_id": end_of_text,
        }, f, indent=1)
    # without it, transformers' pipeline generates 256 tokens, which fails behind the last position
    with open(os.path.join(folder, "generation_config.json"), "w") as f:
        json.dump({"max_length": c.block_size, "bos_token_id": end_of_text, "eos_token_id": end_of_text}, f,
                  indent=1)
