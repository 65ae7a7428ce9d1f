"""Run modded-nanogpt's newest record script on one GPU, with varlen_attn in place of FlashAttention 3.

    torchrun --standalone --nproc_per_node=1 run_record_newest.py FOLDER --batch_factor=0.25 \\
        --num_scheduled_iterations=915 --seed=42 --val_tokens=524288 \\
        --train_files='/data/*_train_*.bin' --val_files='/data/*_val_*.bin'

FOLDER holds train_gpt.py, triton_kernels.py and dc_triton_kernels.py of modded-nanogpt's commit f411b3d
(August 2026: the record of 2026-07-17). The script is changed, and its results have to be called so:

- Attention is torch.nn.attention.varlen.varlen_attn.
- A step has batch_factor x 8 micro-batches of 16,384, then 32,768, then 49,152 tokens (by thirds of the
  schedule). The script has 8, on any number of GPUs.
- Documents longer than a sequence (896 tokens, later 2,048) are cut into sequences. The script trains on the
  first sequence of a document and drops the rest. A micro-batch begins where the one before it ended, not
  at a document.
- The scales of the MLP's FP8 products are copied (by a clamp that changes no value): cuBLAS 13 takes only
  pointers aligned to 16 bytes, and the script passes entries of a vector.
- The table of offsets has room for the sequences of these tokens: documents of source code can be short.

A --key=value replaces the value of that name in the script's class Hyperparameters. Besides:

    --batch_factor=F              a multiple of 1/8, at most 1 (0.25)
    --num_extension_iterations=N  by default 15 for 1,270 of --num_scheduled_iterations
    --val_seq_len=N               tokens of a validation sequence, at least 49,152 (65,536)
    --lr_factor=F                 factor of all learning rates (1)
    --muon_warmup_steps=N         steps in which Muon's momentum grows (300, as in the script)
    --seed=N                      for torch.manual_seed: without it, all runs begin alike
    --print                       print the changed script instead of running it
    --plan                        print steps and tokens instead of running the script

The clock is the script's own: warm-up comes before it, and validation does not count. Validation's window
is 2,560 tokens at the end. Logs go to ./logs. Tokens are GPT-2's, and TIKTOKEN_CACHE_DIR has GPT-2's files.
"""

import ast
import functools
import glob
import hashlib
import os
import re
import runpy
import sys
import sysconfig
import tempfile
from itertools import pairwise

import numpy as np

FILES = "train_gpt.py", "triton_kernels.py", "dc_triton_kernels.py"
END_OF_TEXT = 50256
HEADER = 1024  # bytes of a shard before its tokens
MICRO_BATCHES = 16384, 32768, 49152, 49152  # tokens in the stages of the schedule
SEQUENCES = 896, 2048, 2048, 2048
FLASH_CALL = re.compile(r"flash_attn_interface\.flash_attn_varlen_func\(q\[0\], k\[0\], v\[0\],"
                        r"\s+cu_seqlens_q=seqlens, cu_seqlens_k=seqlens,"
                        r"\s+max_seqlen_q=max_len, max_seqlen_k=max_len,"
                        r"\s+causal=True, softmax_scale=yarn\.attn_scale, window_size=\(bm_size, 0\)\)")
VARLEN_CALL = "varlen_attn(q[0], k[0], v[0], seqlens, seqlens, max_len, max_len, " \
              "scale=yarn.attn_scale, window_size=(bm_size, 0))"


def sequence_starts(tokens: np.ndarray, longest: int) -> list[int]:
    """Return where sequences begin in a micro-batch, but for the first, which begins at 0.

    tokens: (T,). A sequence begins at each <|endoftext|>, and `longest` tokens after the last beginning
    (never, if it is negative).
    """
    bounds = [0, *np.flatnonzero(tokens == END_OF_TEXT).tolist(), len(tokens)]
    step = longest if longest > 0 else len(tokens)
    return [start for a, b in pairwise(bounds) for start in range(a, b, step)][1:]


@functools.cache
def document_starts(pattern: str) -> list[np.ndarray]:
    """Return the places of <|endoftext|> in each shard."""
    shards = [np.memmap(path, np.uint16, "r", HEADER) for path in sorted(glob.glob(pattern))]
    return [np.flatnonzero(tokens == END_OF_TEXT) for tokens in shards]


@functools.cache
def offsets_needed(pattern: str, window: int, longest: int) -> int:
    """Return the size of a table of offsets into any `window` tokens of the shards, rounded up to 16.

    The more offsets of empty sequences a table has, the more empty blocks its attention starts.
    """
    longest = longest if longest > 0 else window
    most = -(-window // longest)
    for starts in document_starts(pattern):
        if len(starts):  # the windows that begin with a document
            before = np.concatenate([[0], np.cumsum(-(-np.diff(starts) // longest))])
            last = np.searchsorted(starts, starts + window) - 1  # the last document that begins in the window
            most = max(most, int((before[last] - before - (starts[last] - starts - window) // longest).max()))
    return -(-(most + 4) // 16) * 16  # two more in a window that begins inside a document, and both ends


def replace(code: str, old: str, new: str, times: int = 1) -> str:
    """Replace a text that must occur as often as in the script that this launcher knows."""
    found = code.count(old)
    assert found == times, f"{old!r} occurs {found} times and not {times}: is it another script?"
    return code.replace(old, new)


def with_setting(code: str, key: str, value: str) -> str:
    """Replace a value of the class Hyperparameters; numbers are checked, paths quoted."""
    line = re.compile(rf"^(    {key}: (\w+) = )[^#\n]*", re.MULTILINE)
    found = line.findall(code)
    assert len(found) == 1, f"{key} is a setting {len(found)} times and not once"
    shown = repr(value) if found[0][1] == "str" else repr(ast.literal_eval(value))
    return line.sub(lambda match: f"{match[1]}{shown}  ", code)


def micro_batches(settings: dict[str, str]) -> int:
    """Return how many micro-batches a step has."""
    count = 8 * float(settings["batch_factor"])
    assert count in range(1, 9), f"--batch_factor={settings['batch_factor']} is not a multiple of 1/8 up to 1"
    return int(count)


def plan(settings: dict[str, str]) -> list[tuple[int, int]]:
    """Return the steps and the tokens a step of each stage."""
    count, steps = micro_batches(settings), int(settings["num_scheduled_iterations"])
    extended = steps + int(settings["num_extension_iterations"])
    ends = [0, round(steps / 3), round(2 * steps / 3), steps, extended]
    return [(b - a, tokens * count) for (a, b), tokens in zip(pairwise(ends), MICRO_BATCHES)]


def changed_attention(code: str) -> str:
    """Return the script with varlen_attn in place of FlashAttention 3."""
    code = replace(code, "from kernels import get_kernel\n",
                   "from torch.nn.attention.varlen import varlen_attn\n")
    code = replace(code, "flash_attn_interface = get_kernel('kernels-community/flash-attn3', version=1)"
                         ".flash_attn_interface\n", "")
    code, times = FLASH_CALL.subn(VARLEN_CALL, code)
    assert times == 1, f"the call of FlashAttention occurs {times} times and not once: is it another script?"
    return code


def changed_loader(code: str) -> str:
    """Return the script with a loader that cuts documents longer than a sequence."""
    first = "    # align_to_bos: each sequence begins with"
    code = replace(code, first, f"    align_to_bos = False\n{first}")
    code = replace(code, "TRAIN_MAX_NUM_DOCS.get(num_tokens_local, "
                         "next_multiple_of_n(num_tokens_local // 300, n=128))",
                   "offsets_needed(filename_pattern, num_tokens_local, max_seq_len)")
    return replace(code, "torch.nonzero(_inputs == BOS_ID)[:, 0]",
                   "torch.tensor(sequence_starts(_inputs.numpy(), max_seq_len), dtype=torch.int64)")


def changed(code: str, settings: dict[str, str]) -> str:
    """Return the script for one GPU, with these settings."""
    count = micro_batches(settings)
    code = changed_loader(changed_attention(code))
    code = replace(code, "grad_accum_steps = 8 // world_size\n", f"grad_accum_steps = {count}\n")
    code = replace(code, " * 2048 * 8", f" * 2048 * {count}", times=4)
    code = replace(code, "step_lr = training_schedule.get_lr(step)",
                   f"step_lr = {float(settings['lr_factor'])} * training_schedule.get_lr(step)")
    code = replace(code, "muon_warmup_steps=300", f"muon_warmup_steps={int(settings['muon_warmup_steps'])}")
    if "seed" in settings:
        code = replace(code, "import torch\nimport triton\n",
                       f"import torch\ntorch.manual_seed({int(settings['seed'])})\nimport triton\n")
    code = with_setting(code, "val_batch_size", str(int(settings["val_seq_len"]) * count))
    own = {"batch_factor", "lr_factor", "muon_warmup_steps", "seed", "val_seq_len"}
    for key in settings.keys() - own:
        code = with_setting(code, key, settings[key])
    shown = " ".join(f"--{key}={value}" for key, value in settings.items())
    code = f"# Changed by run_record_newest.py: {shown}\n{code}"
    ast.parse(code)
    return code


def with_headers(code: str) -> str:
    """Return the script's kernels with the folder of this machine that has CUDA's headers."""
    packages = os.path.join(sysconfig.get_paths()["purelib"], "nvidia", "*", "include")
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include")
    folders = [toolkit, *sorted(glob.glob(packages))]
    found = [folder for folder in folders if os.path.exists(os.path.join(folder, "cuda_bf16.h"))]
    return replace(code, 'cuda_include_dirs=["/usr/local/cuda/include/"]', f"cuda_include_dirs={found[:1]}")


def with_aligned_scales(code: str) -> str:
    """Return the script's kernels with copies of the scales: cuBLAS 13 refuses entries of a vector."""
    for name in ("scale_a=activation_scale", "scale_b=W2_scale"):
        code = replace(code, f"{name},", f"{name}.clamp(min=1e-30),")
    return code


def check(settings: dict[str, str]) -> None:
    """Check that sequences and shards are long enough."""
    assert int(settings["val_seq_len"]) >= max(MICRO_BATCHES), "--val_seq_len is less than 49,152"
    assert int(settings["val_tokens"]) % int(settings["val_seq_len"]) == 0, \
        "--val_tokens is not a multiple of --val_seq_len"
    for key, needed in (("train_files", sum(steps * tokens for steps, tokens in plan(settings))),
                        ("val_files", int(settings["val_tokens"]) + 1)):
        assert key in settings, f"--{key}= is missing"
        paths = glob.glob(settings[key])
        tokens = sum((os.path.getsize(path) - HEADER) // 2 - max(MICRO_BATCHES) for path in paths)
        assert tokens >= needed, f"{settings[key]} has {tokens:,} usable tokens in {len(paths)} files, " \
                                 f"and the run needs {needed:,}"


def write(folder: str, settings: dict[str, str]) -> str:
    """Write the changed files and return their folder, the same one for the same files."""
    texts = {}
    for name in FILES:
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            texts[name] = f.read()
    texts["train_gpt.py"] = changed(texts["train_gpt.py"], settings)
    texts["triton_kernels.py"] = with_aligned_scales(with_headers(texts["triton_kernels.py"]))
    digest = hashlib.sha256("".join(texts.values()).encode()).hexdigest()[:16]
    out = os.path.join(tempfile.gettempdir(), f"run_record_newest-{digest}")
    os.makedirs(out, exist_ok=True)
    for name, text in texts.items():
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=out, delete=False) as f:
            f.write(text)
        os.replace(f.name, os.path.join(out, name))
    return out


def main() -> None:
    folder, *arguments = sys.argv[1:]
    flags = {"--print", "--plan"} & set(arguments)
    given = dict(argument.removeprefix("--").split("=", 1) for argument in arguments if argument not in flags)
    settings = {"batch_factor": "0.25", "num_scheduled_iterations": "1270", "val_tokens": "524288",
                "val_seq_len": "65536", "lr_factor": "1.0", "muon_warmup_steps": "300", **given}
    settings.setdefault("num_extension_iterations",
                        str(max(1, round(int(settings["num_scheduled_iterations"]) * 15 / 1270))))
    if "--plan" in flags:
        for steps, tokens in plan(settings):
            print(f"{steps:5} steps of {tokens:,} tokens")
        print(f"{sum(steps * tokens for steps, tokens in plan(settings)):,} tokens")
        return
    check(settings)
    out = write(folder, settings)
    if "--print" in flags:
        with open(os.path.join(out, "train_gpt.py"), encoding="utf-8") as f:
            print(f.read())
        return
    sys.argv = [os.path.join(out, "train_gpt.py")]
    sys.path.insert(0, out)
    runpy.run_path(sys.argv[0], {"sequence_starts": sequence_starts, "offsets_needed": offsets_needed},
                   run_name="__main__")


if __name__ == "__main__":
    main()
