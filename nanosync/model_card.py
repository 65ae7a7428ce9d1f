"""The model card of an exported model: its README.md, and nanosync.json, from which it is imported again."""

import math
import os

from nanosync.bits_per_byte import bits_per_byte
from nanosync.errors import UserError, one_line, shown
from nanosync.files import first_line, read_json, write_json
from nanosync.foreign_weights import UNKNOWN_DATA
from nanosync.token_files import check_meta

RECORD = "nanosync.json"
KEYS = {"model": dict, "meta": dict | None, "data": dict, "step": int, "val_loss": float | None,
        "state": dict}


def write_record(folder: str, model: dict, step: int, state: dict, own: tuple[str, ...]) -> None:
    """Write nanosync.json: what a checkpoint has besides weights and no other file of the folder says.

    model: `model` entry of state.json. own: entries of state.json that only the model's script has.
    """
    write_json(os.path.join(folder, RECORD), {
        "model": model, "step": step, "val_loss": state.get("val_loss"), "meta": state.get("meta"),
        "data": state.get("data") or dict(UNKNOWN_DATA), "state": {name: state[name] for name in own}})


def read_record(folder: str) -> dict | None:
    """Read nanosync.json, None if the folder has none. Raises UserError if it is malformed."""
    path = os.path.join(folder, RECORD)
    if not os.path.exists(path):
        return None
    try:
        record = read_json(path)
        for name, kind in KEYS.items():
            if not isinstance(record[name], kind):
                raise ValueError(f"{name} is {shown(record[name])}")
        if type(record["model"].get("config")) is not dict:
            raise ValueError("its model has no config")
        if record["val_loss"] is not None and not math.isfinite(record["val_loss"]):
            raise ValueError(f"val_loss is {record['val_loss']}")
        if record["meta"] is not None:
            check_meta(record["meta"], path)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as e:
        problem = getattr(e, "strerror", None) or first_line(e)
        raise UserError(f"{path} is malformed ({type(e).__name__}: {problem}): export the model again"
                        ) from None
    return record


def write_card(folder: str, name: str, facts: dict[str, str], remote_code: bool) -> None:
    """Write README.md. facts: rows of its table. remote_code: the folder has the model's modeling file."""
    rows = "\n".join(f"| {key} | {cell(value)} |" for key, value in facts.items())
    options = ", trust_remote_code=True" if remote_code else ""
    tags = "\n".join(f"- {tag}" for tag in ("nanosync", *(["custom_code"] * remote_code)))
    note = "`modeling_nanosync.py` in this folder is the model: read it before you trust it. It has no\n" \
        "key-value cache, and a batch of prompts must be of one length.\n" if remote_code else ""
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as f:
        f.write(f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}
---

# {name}

```python
from transformers import pipeline

generate = pipeline("text-generation", model="PATH OF THIS FOLDER"{options})
print(generate("Once", max_new_tokens=50)[0]["generated_text"])
```

{note}
| | |
| --- | --- |
{rows}

`nanosync.json` has these facts for programs, and the tokenizer's description. To train it further:
`python convert.py FOLDER OUT_DIR` in a copy of nanoSync.
""")


def cell(text: str) -> str:
    """Return a text that stays inside a cell of a Markdown table. Names of data sets are free text."""
    return one_line(text).replace("|", "\\|").replace("<", "&lt;")


def facts_of(state: dict, step: int, architecture: str, syncs: str, per_token: float | None
             ) -> dict[str, str]:
    """Return the rows of a card's table. Values that the checkpoint does not have are said to be unknown.

    state: contents of state.json. architecture, syncs: texts. per_token: bytes of a token of the val split.
    """
    loss, data, meta = state.get("val_loss"), state.get("data") or {}, state.get("meta") or {}
    digests, dataset = data.get("sha256") or {}, str(state.get("config", {}).get("dataset", ""))
    fingerprint = [f"{file}: `{digest}`" for file, digest in digests.items()]
    tokens = [f"{data[f'{split}_tokens']:,} {split} tokens" for split in ("train", "val")
              if type(data.get(f"{split}_tokens")) is int]
    names = [os.path.basename(dataset.rstrip(os.sep)), meta.get("name")]
    return {
        "architecture": architecture, "sync schedule": syncs, "updates": f"{step:,}",
        "val loss, nats a token": "not measured at this step" if loss is None else f"{loss:.4f}",
        "val loss, bits per byte": "unknown" if loss is None or per_token is None
        else f"{bits_per_byte(loss, per_token):.4f}",
        "tokenizer": meta.get("tokenizer", "gpt2"),
        "data": ", ".join(dict.fromkeys(filter(None, names + tokens))) or "unknown",
        "SHA-256 of the data": ", ".join(fingerprint) or "unknown",
        "commit of nanoSync": (state.get("environment") or {}).get("git_commit") or "unknown",
    }
