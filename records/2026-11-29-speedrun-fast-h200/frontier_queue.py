"""Print the queue of the frontier, for run_queue.py: final losses at about 60, 120 and 240 s of training.

    python frontier_queue.py SETTINGS.json PEERS DATA > queue.jsonl

SETTINGS.json: settings of train_gpt_fast.py besides config/fast_python_source.py and those of LENGTHS.
PEERS: a folder with record_2025_07.txt and newest/, see run_record_2025_07.py and run_record_newest.py.
DATA: a folder of shards. Some runs are alone on their GPU: their times count. The others share a GPU: their
losses count.
"""

import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
TORCHRUN = ["torchrun", "--standalone", "--nproc_per_node=1"]
SECONDS = {1: 60, 2: 120, 4: 240}
START = {"ours": 60, "newest": 170, "record": 240, "gpt": 60}  # seconds to the first step, and of the end
STEPS = {"newest": 457.5, "record": 333, "gpt": 380}  # of a run of 60 s; newest's are extended by 1.2%
LENGTHS = {1: {"n_layer": 7, "num_iterations": 850}, 2: {"n_layer": 9, "num_iterations": 1470},
           4: {"n_layer": 11, "num_iterations": 2530}}  # of ours
# seeds from 4 on: settings were chosen with seeds 1 and 2
ORDER = [("newest", 1, 4), ("ours", 1, 4), ("ours", 2, 4), ("newest", 2, 4),
         *((script, length, seed) for length, seed in ((2, 5), (4, 5), (1, 5), (2, 6), (1, 6))
           for script in ("newest", "ours")),
         ("record", 1, 4), ("gpt", 1, 4), ("newest", 4, 6), ("ours", 4, 6), ("record", 4, 4), ("gpt", 4, 4),
         ("ours", 4, 4), ("newest", 4, 4)]
ALONE = {("newest", 1, 4), ("ours", 1, 4), ("ours", 2, 4)}


def command(script: str, length: int, seed: int, settings: dict, peers: str, data: str) -> list[str]:
    """Return the command of a run. length: in multiples of 60 s."""
    name = f"{script}-{length}-{seed}"
    files = [f"--train_files={data}/*_train_*.bin", f"--val_files={data}/*_val_*.bin", "--val_tokens=524288",
             "--val_loss_every=0", f"--seed={seed}"]
    steps = int(STEPS.get(script, 0) * length)
    if script == "newest":
        return [*TORCHRUN, f"{HERE}/run_record_newest.py", f"{peers}/newest", "--batch_factor=0.25",
                f"--num_scheduled_iterations={steps}", *files]
    if script == "record":
        return [*TORCHRUN, f"{HERE}/run_record_2025_07.py", f"{peers}/record_2025_07.txt",
                "--grad_accum_steps=2", "--align_to_bos=False", f"--num_iterations={steps}",
                "--val_seq_len=65536", *files]
    common = [f"--seed={seed}", f"--out_dir=out-{name}", "--save_checkpoint=False", "--val_loss_every=0",
              "--log_interval=25"]
    if script == "gpt":
        return ["python", "train_gpt.py", "--dataset=python_source", "--batch_size=96",
                "--device_batch_size=48", "--val_tokens=524288", f"--num_iterations={steps}",
                f"--warmdown_iters={round(steps * 0.283)}", *common]
    given = settings | LENGTHS[length]
    if "long_layers" in given:
        given |= {key: [1, 3, given["n_layer"] - 1] for key in ("long_layers", "offset_layers")}
    return ["python", "train_gpt_fast.py", "config/fast_python_source.py", *common,
            *(f"--{key}={value}" for key, value in given.items())]


def main() -> None:
    path, peers, data = sys.argv[1:]
    with open(path, encoding="utf-8") as f:
        settings = json.load(f)
    for run in ORDER:
        print(json.dumps({"name": "{}-{}-{}".format(*run), "start": START[run[0]], "train": SECONDS[run[1]],
                          "command": command(*run, settings, peers, data), "alone": run in ALONE}))


if __name__ == "__main__":
    main()
