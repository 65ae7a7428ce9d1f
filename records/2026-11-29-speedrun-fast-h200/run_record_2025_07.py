"""Run modded-nanogpt's record script of 2025-07-18 as it is, but for the settings and the seed given here.

    torchrun --standalone --nproc_per_node=1 run_record_2025_07.py RECORD.TXT --seed=42 \\
        --grad_accum_steps=2 --align_to_bos=False --num_iterations=600 --val_loss_every=100 \\
        --val_tokens=524288 --val_seq_len=65536 --train_files='/data/*_train_*.bin' \\
        --val_files='/data/*_val_*.bin'

RECORD.TXT is that record's log, which begins with its script, or the script alone. A --key=value replaces the
value of that name in its class Hyperparameters. Besides:

    --grad_accum_steps=N    micro-batches of train_seq_len tokens a step; the script has 8 / GPUs
    --align_to_bos=False    cut the tokens as they come: the script's own cut stops at a document that is
                            longer than its window, as Python source has some
    --seed=N                for torch.manual_seed: the script sets none, so that all its runs begin alike
    --print                 print the changed script instead of running it

Logs go to ./logs. The script reads each shard once: steps x grad_accum_steps x train_seq_len tokens must be
there. Its window of val tokens, grad_accum_steps x val_seq_len and one, must fit into a val shard.
"""

import ast
import os
import re
import runpy
import sys
import tempfile

END_OF_CODE = "\n" + "=" * 100 + "\n"  # in the log
LOADER = "def distributed_data_generator(filename_pattern: str, seq_len: int, grad_accum_steps: int, " \
         "align_to_bos: bool):\n"
ACCUMULATION = "grad_accum_steps = 8 // world_size\n"
IMPORT = 'import torch\ntorch.empty(1, device="cuda", requires_grad=True)'


def replace_once(code: str, old: str, new: str) -> str:
    """Replace a text that must occur exactly once."""
    assert code.count(old) == 1, f"{old!r} occurs {code.count(old)} times and not once: is it another script?"
    return code.replace(old, new)


def with_setting(code: str, key: str, value: str) -> str:
    """Replace a value of the class Hyperparameters; numbers are checked, paths quoted."""
    line = re.compile(rf'^(    {key} = )("[^"\n]*"|[^ #\n]+)', re.MULTILINE)
    found = line.findall(code)
    assert len(found) == 1, f"{key} is a setting {len(found)} times and not once"
    is_text = found[0][1].startswith('"')
    shown = repr(value) if is_text else repr(ast.literal_eval(value))
    return line.sub(lambda match: match[1] + shown, code)


def changed(code: str, settings: dict[str, str]) -> str:
    """Return the script with other settings."""
    for key, value in settings.items():
        if key == "seed":
            code = replace_once(code, IMPORT, IMPORT.replace("\n", f"\ntorch.manual_seed({int(value)})\n"))
        elif key == "grad_accum_steps":
            code = replace_once(code, ACCUMULATION, f"grad_accum_steps = {int(value)}\n")
        elif key == "align_to_bos":
            assert value in ("True", "False"), f"align_to_bos={value}"
            code = replace_once(code, LOADER, f"{LOADER}    align_to_bos = {value}\n")
        else:
            code = with_setting(code, key, value)
    ast.parse(code)
    return code


def main() -> None:
    path, *arguments = sys.argv[1:]
    with open(path, encoding="utf-8") as f:
        code = f.read().split(END_OF_CODE)[0]
    given = [argument for argument in arguments if argument != "--print"]
    code = changed(code, dict(argument.removeprefix("--").split("=", 1) for argument in given))
    if "--print" in arguments:
        print(code)
        return
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [os.path.join(folder, "train_gpt.py")]
        with open(sys.argv[0], "w", encoding="utf-8") as f:
            f.write(code)
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
