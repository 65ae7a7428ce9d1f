"""nanoGPT's files: its checkpoint ckpt.pt and the vocabulary meta.pkl of a data set by characters.

Both are pickles, and a pickle can name any function to call. ckpt.pt is read by PyTorch's
torch.load(weights_only=True), which builds tensors and plain values only. meta.pkl is read by an unpickler
that knows only the operations of dict, str and int. So no code of a file runs.
"""

import io
import math
import os
import pickle
import pickletools
import warnings
from dataclasses import dataclass

import torch

from nanosync.errors import UserError, shortened, shown
from nanosync.files import check_json, first_line, open_regular, read_file
from nanosync.tensor_files import FLOATING

ARGUMENTS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")  # model_args
SETTINGS = ("eval_interval", "log_interval", "eval_iters", "always_save_checkpoint",
            "gradient_accumulation_steps", "batch_size", "dropout", "learning_rate", "max_iters",
            "weight_decay", "beta1", "beta2", "grad_clip", "decay_lr", "warmup_iters",
            "lr_decay_iters", "min_lr", "dtype", "compile", "wandb_log", "wandb_project",
            "wandb_run_name")  # of nanoGPT's train.py with the same meaning here, which no
# checkpoint decides
PREFIXES = ("module.", "_orig_mod.")  # of DDP and torch.compile
MAX_META = 2**24  # bytes of a meta.pkl
META_OPERATIONS = {  # all that pickles of dict, str and int consist of, in every protocol
    "PROTO", "FRAME", "STOP", "MARK", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "PUT",
    "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET", "MEMOIZE"}


@dataclass
class NanoGPTCheckpoint:
    """The contents of a ckpt.pt, of which only the types are checked."""

    arguments: dict  # of the model: ARGUMENTS, as far as the file has them
    weights: dict[str, torch.Tensor]  # by parameter name, in the order of the model's parameters
    optimizer: dict  # state_dict of AdamW, {} if the file has none
    step: int  # updates done
    val_loss: float | None  # of the evaluation at this step, after which nanoGPT saves
    config: dict  # settings


def read_checkpoint(path: str) -> NanoGPTCheckpoint:
    """Read a ckpt.pt; no code of the file runs. Raises UserError."""
    content = load_plain(path)
    if type(content) is not dict or not {"model", "model_args"} <= set(content):
        raise UserError(f"{path} is not a checkpoint of nanoGPT: it has no entries model and model_args")
    arguments, config = content["model_args"], content.get("config", {})
    optimizer, step = content.get("optimizer") or {}, content.get("iter_num", 0)
    for name, value in (("model_args", arguments), ("config", config), ("optimizer", optimizer)):
        if type(value) is not dict:
            raise UserError(f"{path} cannot be used: its {name} is {shown(value)}, not a dict")
    if type(step) is not int or not 0 <= step < 2**53:
        raise UserError(f"{path} cannot be used: its iter_num is {shown(step)}, not a number of updates")
    try:
        check_json(config, "config")
        config = {name: value for name, value in config.items() if type(value) in (int, float, bool, str)}
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} cannot be used: of its config, {first_line(e)}") from None
    return NanoGPTCheckpoint({name: arguments[name] for name in ARGUMENTS if name in arguments},
                             _weights(content["model"], path), optimizer, step,
                             _loss(content.get("best_val_loss"), path), config)


def load_plain(path: str):
    """Load a file of torch.save that holds tensors and plain values only. Raises UserError."""
    try:
        open_regular(path).close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that the reader then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or first_line(e)}") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} is refused, and nothing of it was executed: it is not a file of torch.save "
                        f"with tensors and plain values only. Load it where you trust it, and save "
                        f"only such values again with torch.save") from None
    except Exception as e:  # any type: PyTorch's reader passes on what a malformed file makes it raise
        raise UserError(f"{path} is not a readable file of torch.save ({type(e).__name__}: "
                        f"{shortened(first_line(e), 120)}): copy it again") from None


def _weights(state, path: str) -> dict[str, torch.Tensor]:
    """Return the parameters of a state_dict: without prefixes, causal masks, and the head, which is wte."""
    if not isinstance(state, dict) or not all(type(name) is str for name in state):
        raise UserError(f"{path} cannot be used: its model is a {type(state).__name__}, not a state_dict")
    weights = {}
    for name, value in state.items():
        while name.startswith(PREFIXES):
            name = name.removeprefix("module.").removeprefix("_orig_mod.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks of nanoGPT with PyTorch 1
            continue
        if name in weights:
            raise UserError(f"{path} has {shown(name)} twice, with and without a prefix: which of them is "
                            f"the weight is unknown; save it again")
        check_plain(value, name, path)
        weights[name] = value
    head, embedding = weights.pop("lm_head.weight", None), weights.get("transformer.wte.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise UserError(f"{path} has another head than its embedding, and this model ties them: it is not of "
                        f"nanoGPT's model.py")
    return weights


def check_plain(value, name: str, path: str) -> None:
    """Raise UserError unless a value is a floating-point tensor in memory, strided, of any shape."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu" \
            or value.dtype not in FLOATING:
        raise UserError(f"{path} cannot be used: {shown(name)} is not a tensor of floating-point numbers")


def _loss(value, path: str) -> float | None:
    """Return best_val_loss as a float; None if no evaluation has set it."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if value is None or value == 1e9:  # nanoGPT's start value
        return None
    if type(value) not in (int, float) or not math.isfinite(value):
        raise UserError(f"{path} cannot be used: its best_val_loss is {shown(value)}, not a finite number")
    return float(value)


def settings_text(config: dict) -> str:
    """Return a config file for train.py with the settings of a converted run. Values are literals only."""
    named = [name for name in ("dataset", *SETTINGS) if type(config.get(name)) in (int, float, bool, str)]
    if "cuda" not in str(config.get("device", "cuda")):
        named = [name for name in named if name != "dtype"]  # nanoGPT ignores dtype there: float32
    return "# settings of the converted run\n" + "".join(f"{name} = {config[name]!r}\n" for name in named)


def moments(optimizer: dict, weights: dict[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """Return AdamW's state by parameter name, as optim.safetensors has it. Raises UserError.

    nanoGPT's optimizer numbers parameters in two groups: first those of two and more dimensions, then the
    others, each in the order of the model. Without any state, the moments are those before the first update.
    """
    names = sorted(weights, key=lambda name: weights[name].dim() < 2)  # stable
    fix = "convert without it by --moments=new, which starts AdamW anew"
    groups, states = optimizer.get("param_groups", []), optimizer.get("state", {})
    if not states:
        return {f"{name}.{entry}": torch.zeros(w.shape if entry != "step" else ())
                for name, w in weights.items() for entry in ("exp_avg", "exp_avg_sq", "step")}
    try:
        sizes = [len(group["params"]) for group in groups]
        numbers = [number for group in groups for number in group["params"]]
    except (TypeError, KeyError):
        raise UserError(f"{path}: its optimizer has no groups of parameters: {fix}") from None
    matrices = sum(w.dim() >= 2 for w in weights.values())
    fits = sizes == [matrices, len(weights) - matrices] and len(states) == len(weights)
    if not fits or set(map(shown, numbers)) != set(map(shown, states)):
        raise UserError(f"{path}: the groups of its optimizer have {shown(sizes)} parameters, and those of "
                        f"nanoGPT's train.py have {[matrices, len(weights) - matrices]}: {fix}")
    found = {}
    for name, number in zip(names, numbers):
        state = states[number]
        if type(state) is not dict or set(state) != {"step", "exp_avg", "exp_avg_sq"}:
            raise UserError(f"{path}: the optimizer's state of {shown(name)} is not AdamW's: {fix}")
        state = state | {"step": torch.as_tensor(state["step"], dtype=torch.float32)}
        for entry, value in state.items():
            check_plain(value, f"{name}.{entry}", path)
            shape = torch.Size() if entry == "step" else weights[name].shape
            if value.shape != shape:
                raise UserError(f"{path}: {entry} of {shown(name)} has the shape {tuple(value.shape)}, and "
                                f"the weight {tuple(shape)}: {fix}")
            found[f"{name}.{entry}"] = value.float().contiguous()
    return found


class _PlainUnpickler(pickle.Unpickler):
    """The second lock behind META_OPERATIONS: no name of a pickle is looked up."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_vocabulary(path: str) -> dict:
    """Read a meta.pkl; return the contents of a meta.json. No code of the file runs. Raises UserError."""
    try:
        content = read_file(path, MAX_META)
        unknown = {op.name for op, _, _ in pickletools.genops(content)} - META_OPERATIONS
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or first_line(e)}") from None
    except Exception as e:  # any type: of malformed pickles
        raise UserError(f"{path} is not a pickle ({shortened(first_line(e), 80)}): copy it again") from None
    if unknown:
        raise UserError(f"{path} is refused, and nothing of it was executed: it holds more than dict, str "
                        f"and int ({', '.join(sorted(unknown)[:4])}): write a meta.json, see docs/data.md")
    try:
        meta = _PlainUnpickler(io.BytesIO(content)).load()
    except Exception as e:
        raise UserError(f"{path} is not a readable pickle ({type(e).__name__}: "
                        f"{shortened(first_line(e), 80)}): copy it again") from None
    symbols = meta.get("itos") if type(meta) is dict else None
    if type(symbols) is not dict or not symbols:
        raise UserError(f"{path} has no characters (itos): it is not the meta.pkl of nanoGPT's data by "
                        f"characters; write a meta.json, see docs/data.md")
    return _char_meta(symbols, meta, path)


def _char_meta(symbols: dict, meta: dict, path: str) -> dict:
    """Check the table of characters; return the contents of a meta.json."""
    n = len(symbols)
    if set(map(shown, symbols)) != set(map(str, range(n))):
        raise UserError(f"{path}: the ids of its {n} characters are not 0 to {n - 1}: write a meta.json, see "
                        f"docs/data.md")
    chars = [symbols[i] for i in range(n)]
    wrong = [c for c in chars if type(c) is not str or len(c) != 1 or "\ud800" <= c <= "\udfff"]
    if wrong or len(set(chars)) != n:
        problem = f"{shown(wrong[0])} is not one character" if wrong else "a character is in it twice"
        raise UserError(f"{path}: {problem}: the tokenizer must be one by characters; prepare the data set "
                        f"again with a prepare.py of data/")
    table = meta.get("stoi", {c: i for i, c in enumerate(chars)})
    if table != {c: i for i, c in enumerate(chars)} or meta.get("vocab_size", n) != n:
        raise UserError(f"{path}: its tables itos and stoi, or its "
                        f"vocab_size={shown(meta.get('vocab_size'))}, contradict each other: "
                        f"prepare the data set again")
    return {"tokenizer": "char", "vocab_size": n, "chars": "".join(chars)}


def is_checkpoint(path: str) -> bool:
    """Return True for a file of torch.save by its name, or a folder with a ckpt.pt."""
    return (os.path.isfile(path) and path.endswith((".pt", ".pth", ".ckpt"))) or \
        os.path.isfile(os.path.join(path, "ckpt.pt"))
