"""Print the queue of the frontier, for run_queue.py: final losses at about 53, 60, 120 and 240 s of training.

    python frontier_queue.py SETTINGS.json PEERS DATA > queue.jsonl

SETTINGS.json: settings of train_gpt_fast.py besides config/fast_python_source.py and those of LENGTHS.
PEERS: a folder with record_2025_07.txt and newest/, see ../2026-11-29-speedrun-fast-h200/README.md.
DATA: a folder of shards. Some runs are alone on their GPU: their times count. The others share a GPU: their
losses count. At the end are techniques switched off, 200 steps each, as in the tables of that page.
"""

import json
import os
import sys

LAUNCHERS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../2026-11-29-speedrun-fast-h200")
TORCHRUN = ["torchrun", "--standalone", "--nproc_per_node=1"]
SECONDS = {0.88: 53, 1: 60, 2: 120, 4: 240}
START = {"ours": 60, "newest": 170, "record": 240, "gpt": 60}  # seconds to the first step, and of the end
STEPS = {"newest": 457.5, "record": 333, "gpt": 380}  # of a run of 60 s; newest's are extended by 1.2%
# the first: half of what the record of 2025-07-18 takes to 0.9025
LENGTHS = {0.88: {"n_layer": 7, "num_iterations": 740}, 1: {"n_layer": 7, "num_iterations": 850},
           2: {"n_layer": 9, "num_iterations": 1470}, 4: {"n_layer": 11, "num_iterations": 2530}}  # of ours
# seeds from 4 on: settings were chosen with seeds 1 and 2
ORDER = [("newest", 1, 4), ("ours", 1, 4), ("ours", 0.88, 4), ("ours", 2, 4), ("newest", 2, 4),
         *((script, length, seed) for length, seed in ((2, 5), (1, 5), (1, 6), (4, 5), (2, 6))
           for script in ("newest", "ours")),
         ("ours", 0.88, 5), ("ours", 0.88, 6), ("record", 1, 4), ("gpt", 1, 4),
         ("newest", 4, 6), ("ours", 4, 6), ("record", 4, 4), ("gpt", 4, 4),
         ("ours", 4, 4), ("newest", 4, 4)]
ALONE = {("newest", 1, 4), ("ours", 1, 4), ("ours", 0.88, 4), ("ours", 2, 4)}
# of 11 layers with the defaults of the tables, seed 2
ABLATIONS = {"default": [], "polar_express": ["--polar_express=False"],
             "windows": ["--short_windows=[768,768,768,768]", "--long_windows=[1664,1664,1664,1664]"],
             "late_attention": ["--late_attention=False"],
             "document_mask": ["--document_mask=False"], "muon_weight_decay": ["--muon_weight_decay=0"]}
BEFORE = ["--n_layer=11", "--num_iterations=200", "--exclusive_layers=[]", "--muon_heads=6",
          "--gate_learning_rate=0.04"]

QUIET = ["--save_checkpoint=False", "--val_loss_every=0", "--log_interval=25"]


def command(script: str, length: float, seed: int, settings: dict, peers: str, data: str) -> list[str]:
    """Return the command of a run. length: in multiples of 60 s."""
    name = f"{script}-{length}-{seed}"
    files = [f"--train_files={data}/*_train_*.bin", f"--val_files={data}/*_val_*.bin", "--val_tokens=524288",
             "--val_loss_every=0", f"--seed={seed}"]
    steps = int(STEPS.get(script, 0) * length)
    if script == "newest":
        return [*TORCHRUN, f"{LAUNCHERS}/run_record_newest.py", f"{peers}/newest", "--batch_factor=0.25",
                f"--num_scheduled_iterations={steps}", *files]
    if script == "record":
        return [*TORCHRUN, f"{LAUNCHERS}/run_record_2025_07.py", f"{peers}/record_2025_07.txt",
                "--grad_accum_steps=2", "--align_to_bos=False", f"--num_iterations={steps}",
                "--val_seq_len=65536", *files]
    common = [f"--seed={seed}", f"--out_dir=out-{name}", *QUIET]
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
    for name, given in ABLATIONS.items():
        print(json.dumps({"name": f"off-{name}-2", "start": START["ours"], "train": 20, "command": [
            "python", "train_gpt_fast.py", "config/fast_python_source.py", "--seed=2",
            f"--out_dir=out-off-{name}", *QUIET, *BEFORE, *given]}))


if __name__ == "__main__":
    main()
