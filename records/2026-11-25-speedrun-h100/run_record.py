"""Run modded-nanogpt's record script of 2024-10-14 as it is, but for the settings and the seed given here.

    torchrun --standalone --nproc_per_node=1 run_record.py TRAIN_GPT2.PY --seed=42 --batch_size=128 ...

TRAIN_GPT2.PY is records/track_1_short/2024-10-14_ModernArch/train_gpt2.py of that repository. A --key=value
replaces the default of that name in its class Hyperparameters. It sets no seed of its own, so that all its
runs begin alike: --seed is given to torch.manual_seed before it begins. Logs and its checkpoint go to ./logs.
"""

import os
import re
import runpy
import sys
import tempfile

import torch


def main() -> None:
    path, *arguments = sys.argv[1:]
    with open(path, encoding="utf-8") as f:
        code = f.read()
    for argument in arguments:
        key, value = argument.removeprefix("--").split("=", 1)
        if key == "seed":
            torch.manual_seed(int(value))
            continue
        if key == "coordinate_descent_tuning":
            switch = f"config.{key} = "
            assert code.count(switch + "True") == 1, f"{path} does not set {key}"
            code = code.replace(switch + "True", switch + value)
            continue
        line = re.compile(rf"^(    {key} : (int|float|str) = )('[^']*'|[^ #\n]+)", re.MULTILINE)
        shown = repr(value) if line.search(code)[2] == "str" else value
        code, times = line.subn(lambda match, shown=shown: match[1] + shown, code)
        assert times == 1, f"{key} is not one setting of {path}"
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [os.path.join(folder, "train_gpt2.py")]
        with open(sys.argv[0], "w", encoding="utf-8") as f:
            f.write(code)
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
