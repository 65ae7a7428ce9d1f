"""Weights in formats that this repository does not read: what they are and how to bring them here."""

import os

NANOGPT, TRANSFORMERS = "ckpt.pt", "pytorch_model.bin"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
UNKNOWN_DATA = {"unknown": True}  # entry `data` in state.json of a converted checkpoint whose data set is
# unknown, so that it may resume on any
PICKLE = "a pickle, which can run code and is not loaded"


def advice(path: str) -> str:
    """Return a sentence about weights at a path that are not read, '' if there are none.

    path: file or folder.
    """
    if os.path.isfile(path):
        if path.endswith(".safetensors"):
            return f"{path} is a file: give its folder, which must have config.json, too"
        return _about(path, os.path.basename(path)) if path.endswith(PICKLES) else ""
    if any(os.path.exists(os.path.join(path, "model.safetensors" + end)) for end in ("", ".index.json")):
        return ""
    for name in (NANOGPT, TRANSFORMERS, f"{TRANSFORMERS}.index.json"):
        if os.path.isfile(os.path.join(path, name)):
            return _about(os.path.join(path, name), name)
    return ""


def _about(path: str, name: str) -> str:
    if name == NANOGPT:
        return (f"{path} is a checkpoint of nanoGPT, {PICKLE} here: convert it with python convert.py {path} "
                f"OUT_DIR, and give that folder")
    if name.startswith(TRANSFORMERS):
        return (f"{path} is {PICKLE}: convert it with python convert.py {os.path.dirname(path) or '.'} "
                f"OUT_DIR, and give that folder")
    return f"{path} is {PICKLE}: write its weights as model.safetensors, beside a config.json"
