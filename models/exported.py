"""Models as folders of Hugging Face's transformers: writing them from a model of any kind, and reading them.

A model that computes the dense GPT is a GPT2LMHeadModel. Every other one has its own modeling file in the
folder, modeling_nanosync.py. nanosync.json has what the checkpoint knows besides.
"""

import importlib.util
import json
import os
import shutil

import torch
import torch.nn as nn

from model import GPT, GPTConfig
from models.converted import GPT2_VOCABULARIES, Converted, Options, tokenizer_meta
from models.registry import INFERENCE_KINDS, SCRIPTS_OWN
from nanosync import exported_tokenizers, huggingface, model_card, nanogpt_files, tokenizers
from nanosync.bits_per_byte import measured_bytes_per_token, stated_bytes_per_token
from nanosync.dataloader import open_dataset
from nanosync.errors import UserError
from nanosync.files import first_line, read_json
from nanosync.foreign_weights import TRANSFORMERS
from nanosync.model_kind import check_size, model_config, model_description
from nanosync.sync_schedule import width
from nanosync.tensor_files import check_values, write_tensors

MODELING = "modeling_nanosync"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", TRANSFORMERS, f"{TRANSFORMERS}.index.json")


def is_dense(model: nn.Module) -> bool:
    """Return True if a model computes the dense GPT, on any number of TP ranks."""
    if not isinstance(model, GPT):
        return False
    schedule = getattr(model, "schedule", None)
    if schedule is None:
        return True
    return schedule.is_dense or (model.config.tp_size == 1 and schedule.is_plain)


def write_huggingface(converted: Converted, folder: str) -> None:
    """Write weights, config, tokenizer files, model card and, if transformers has no such class, the modeling
    file. Raises UserError or OSError."""
    kind, state = converted.description["kind"], converted.state
    meta, used = state.get("meta"), converted.description["config"].get("used_vocab_size")
    used = converted.description["config"]["vocab_size"] if used is None else used
    tokenizer = exported_tokenizers.tokenizer_of(meta, used)  # first, as its files may be missing
    end_of_text = None if tokenizer is None else tokenizers.end_of_text(meta)
    model = converted.model()
    dense = is_dense(model)
    if dense:
        huggingface.save(model, folder, end_of_text)
    else:
        _save_with_code(model, kind, folder, end_of_text)
    if tokenizer is None:
        converted.notes.append("no tokenizer files: the tokenizer of the training data is unknown")
    else:
        exported_tokenizers.write(tokenizer, folder, end_of_text, model.config.block_size)
    own = tuple(name for name in INFERENCE_KINDS[kind].state if name in state)
    model_card.write_record(folder, model_description(kind, model), converted.step, state, own)
    texts = _described(model, kind, dense)
    facts = model_card.facts_of(state, converted.step, *texts, bytes_per_token(state))
    model_card.write_card(folder, "A model of nanoSync", facts, not dense)
    if not dense:
        converted.notes.append(f"transformers has no class for this model: load it with "
                               f"trust_remote_code=True, which runs {MODELING}.py of the folder")


def bytes_per_token(state: dict) -> float | None:
    """Return the bytes of a token of the val split: of meta.json, or counted if the data set is here; None if
    they are unknown. Raises UserError. state: contents of state.json."""
    stated = stated_bytes_per_token(state.get("meta"), "the data set")
    name = state.get("config", {}).get("dataset")
    if stated is not None or type(name) is not str:
        return stated
    try:
        data = open_dataset(name, 1)
        same = data.fingerprint == state.get("data")
        return measured_bytes_per_token(data.val, data.meta) if same else None
    except UserError:  # it is not here, or another one has its name
        return None


def _described(model: nn.Module, kind: str, dense: bool) -> tuple[str, str]:
    """Return texts about architecture and schedule for the model card."""
    c, schedule = model.config, getattr(model, "schedule", None)
    n = sum(p.numel() for p in model.parameters())
    architecture = f"{kind}, {n:,} parameters: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} " \
        f"channels, context of {c.block_size} tokens"
    if dense or schedule is None:
        return architecture, "none: a dense model" if schedule is None else "all: the dense function"
    return architecture, f"{model.syncs} of {2 * c.n_layer} all-reduces, {c.tp_size} TP ranks"


def _save_with_code(model: nn.Module, kind: str, folder: str, end_of_text: int | None) -> None:
    c, schedule = model.config, getattr(model, "schedule", None)
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    architecture = model_description(kind, model)["config"]
    if kind not in SCRIPTS_OWN:
        kind, fields = "gpt", GPTConfig.__dataclass_fields__
        architecture = {name: value for name, value in architecture.items() if name in fields}
    described = None if schedule is None else {
        "ranks": c.tp_size, "width": width(schedule.channels, c.n_embd),
        "sublayers": [{"sync": s.sync, "delay": s.delay, "sees": s.sees} for s in schedule.sublayers]}
    write_tensors(weights, os.path.join(folder, "model.safetensors"), {"format": "pt"})
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), f"{MODELING}.py")
    shutil.copyfile(source, os.path.join(folder, f"{MODELING}.py"))
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump({
            "model_type": huggingface.OWN_MODEL_TYPE, "architectures": ["NanoSyncForCausalLM"],
            "dtype": "float32", "auto_map": {"AutoConfig": f"{MODELING}.NanoSyncConfig",
                                             "AutoModelForCausalLM": f"{MODELING}.NanoSyncForCausalLM"},
            "kind": kind, "architecture": architecture, "schedule": described,
            "untied": not getattr(model, "tied", True),
            "bos_token_id": end_of_text, "eos_token_id": end_of_text, "pad_token_id": end_of_text,
        }, f, indent=1)


def find_huggingface(path: str) -> bool:
    """Return True for a folder with a config.json and weights, or a name of a GPT-2 on the hub."""
    return path in huggingface.GPT2_SIZES or (
        os.path.isfile(os.path.join(path, "config.json"))
        and any(os.path.isfile(os.path.join(path, name)) for name in WEIGHTS))


def meta_of(path: str) -> dict | None:
    """Return the meta.json of the tokenizer of weights that are no checkpoint, None for GPT-2's. Raises
    UserError.

    It is that of a folder which write_huggingface wrote. Other folders have a tokenizer.json, or GPT-2's
    tokens, or an unknown tokenizer.

    path: folder, or name on the hub.
    """
    record = model_card.read_record(path)
    if record is not None or not os.path.isdir(path):
        return None if record is None else record["meta"]
    vocab_size = huggingface.read_config(path)["vocab_size"]
    if vocab_size in GPT2_VOCABULARIES and importlib.util.find_spec("tokenizers") is None:
        return None
    return tokenizer_meta(vocab_size, os.path.join(path, "tokenizer.json"))[0]


def read_huggingface(path: str, options: Options) -> Converted:
    """Read a GPT-2 of transformers, or what write_huggingface wrote. Raises UserError."""
    files = os.listdir(path) if os.path.isdir(path) else WEIGHTS
    pickled = not set(WEIGHTS[:2]) & set(files)
    folder = path if os.path.isdir(path) else huggingface.find_folder(path)
    record = model_card.read_record(folder)
    try:
        own = read_json(os.path.join(folder, "config.json")).get("model_type") == huggingface.OWN_MODEL_TYPE
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(f"{folder}/config.json is malformed ({first_line(e)}): copy it again") from None
    if own and record is None:
        raise UserError(f"{folder} has no {model_card.RECORD}, which names the model: export it again")
    if own:
        check_size(model_config(record["model"], INFERENCE_KINDS))
        weights = huggingface.read_weights(folder)[1]
        check_values(weights, folder)
        entries = INFERENCE_KINDS[record["model"]["kind"]].state
        state = {name: value for name, value in record["state"].items() if name in entries}
        converted = Converted(record["model"], weights, folder, state=state)
        converted.check_state()
    else:
        converted = _read_gpt2(folder, pickled, record)
    if record is None or options.dataset is not None:
        converted.take_data(options, tokenizer_file=os.path.join(folder, "tokenizer.json"))
    else:
        converted.state |= {name: record[name] for name in ("meta", "data", "val_loss")}
        converted.notes.append("tokenizer and data set: those of the training")
    converted.notes.append("step 0: the folder has weights only, so the optimizer begins anew")
    return converted


def _read_gpt2(folder: str, pickled: bool, record: dict | None) -> Converted:
    config = GPTConfig(**huggingface.read_config(folder))
    check_size(config)
    model = GPT(config)
    read = _pickled_weights if pickled else huggingface.read_weights
    huggingface.copy_weights(model, *read(folder))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    biases = [name for name in weights if name.endswith(".bias")]
    if record is not None and not record["model"]["config"].get("bias", True) \
            and not any(weights[name].any() for name in biases):  # written as zeros
        config.bias = False
        weights = {name: w for name, w in weights.items() if name not in biases}
    return Converted({"kind": "gpt", "config": dict(vars(config))}, weights, folder)


def _pickled_weights(folder: str) -> tuple[str, dict[str, torch.Tensor]]:
    """Read pytorch_model.bin, or the files that its index lists; no code of a file runs. Raises UserError."""
    path = os.path.join(folder, TRANSFORMERS)
    index, files = f"{path}.index.json", [TRANSFORMERS]
    if not os.path.isfile(path):
        try:
            files = sorted(set(read_json(index)["weight_map"].values()))
            if not all(name == os.path.basename(name) for name in files):
                raise ValueError("a name is not that of a file beside it")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{index} is not a list of weights ({first_line(e)}): copy it again") from None
    tensors = {}
    for name in files:
        part = nanogpt_files.load_plain(os.path.join(folder, name))
        if not isinstance(part, dict) or not all(isinstance(key, str) for key in part):
            raise UserError(f"{folder}/{name} cannot be used: it is not a dict of tensors")
        tensors |= part
    head, embedding = tensors.pop("lm_head.weight", None), tensors.get("transformer.wte.weight")
    tied = head is None or embedding is None or torch.equal(head, embedding)
    if not tied:
        raise UserError(f"{path} has another head than its embedding, and GPT-2 ties them: it is another "
                        f"model")
    for key, value in tensors.items():
        if not key.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks
            nanogpt_files.check_plain(value, key, path)
    return path, tensors
