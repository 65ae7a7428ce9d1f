"""Drop the syncs of a trained model one by one, each time the sync whose removal raises its val loss least.

    python experiments/drop_syncs.py --init_from=out-python-24sync --out_dir=out-drops
    python experiments/drop_syncs.py --init_from=out-python-24sync --max_iters=20 --eval_iters=4

The model is not trained again (zero-shot), and its TP ranks are simulated. Start from all syncs. At n syncs
each but the last is left out in turn, which takes n - 1 evaluations: 276 from 24 syncs down to 1. All
evaluations use the same val windows, and the document_mask of the training. The sync after the last sublayer
stays, because a forward pass ends with one. `--sync_strategy=custom --sync_points=[...]` of
train_reduced_sync.py trains the sublayers that are left.

Writes into out_dir: order.json, and the log and status.json of a run, in which a step is a dropped sync.

    {"dropped": [3, 8, ...], "losses": [1.94, 1.95, ...], "sensitivities": [{"0": 1.96, "1": ...}, ...], ...}

dropped: sublayers in the order in which their syncs were dropped (2i: attention, 2i + 1: MLP of layer i).
losses: val loss with all syncs, and after each drop. sensitivities: val loss without each sync, by sublayer.
"""

import math
import os
import time

if __name__ == "__main__":
    import root_path  # noqa: F401

import torch

import models
from configurator import check_at_least, configure
from nanosync import tokenizers
from nanosync.checkpoint import find_weights, steps_in
from nanosync.dataloader import evaluate, evaluation_batches, open_dataset
from nanosync.errors import UserError
from nanosync.files import check_can_write, write_result
from nanosync.hardware import environment, pick_device, pick_dtype
from nanosync.sync_schedule import SyncSchedule
from nanosync.training_logger import TrainingLogger

# -----------------------------------------------------------------------------
init_from = ""  # out_dir or checkpoint of a model that was trained with all syncs
out_dir = "out-drop-syncs"  # folder for order.json and logs
dataset = ""  # a folder in data/, or a path; '' for the data of the training
tp_size = 2  # TP ranks, at least 2
max_iters = 1  # syncs to drop, at most 2 n_layer - 1
batch_size = 32  # sequences of a batch
eval_iters = 4  # batches of an evaluation
seed = 1  # has no effect
device = "auto"  # 'auto' (cuda, else mps, else cpu), 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = "auto"  # 'auto' (bfloat16 on CUDA, else float32), 'float32', 'bfloat16', 'float16'
# -----------------------------------------------------------------------------
config = configure(globals(), takes="init_from")
check_at_least(config, 1, "max_iters", "batch_size", "eval_iters")
check_at_least(config, 2, "tp_size")  # one rank has nothing to synchronise
if not init_from:
    raise UserError("init_from is empty: name the out_dir of a model that was trained with all syncs")
found = find_weights(init_from, kinds=models.KINDS)
if found is None:
    raise UserError(f"init_from={init_from!r} has no checkpoint: name the out_dir of a run that saved one")
trained, schedule = found.state["model"]["config"], found.state.get("schedule")
if not models.is_dense(schedule, trained.get("tp_size", 1)):
    raise UserError(f"{found.path} was trained with {schedule['syncs']} syncs, some of them dropped, late or "
                    f"weighted: name a model that was trained with all syncs, --sync_strategy=standard")
if steps_in(out_dir):
    raise UserError(f"out_dir={out_dir!r} has checkpoints of a training run, whose log and status.json would "
                    f"change: name another folder")
L = trained["n_layer"]
if max_iters >= 2 * L:
    raise UserError(f"max_iters={max_iters} syncs cannot be dropped: a model of {L} layers has {2 * L}, and "
                    f"one stays. Use at most {2 * L - 1}")
dataset = dataset or found.state["config"].get("dataset") or ""
if not dataset:
    raise UserError(f"{found.path} does not say on which data it was trained: add --dataset=...")
data = open_dataset(dataset, trained["block_size"])
data.check_tokens(trained["vocab_size"])
check_can_write(out_dir, "out_dir")
device = pick_device(device)
compute_dtype = pick_dtype(dtype, device)
variant = {"tp_size": tp_size, "sync_strategy": "standard"}
model = models.load_weights(init_from, "reduced_sync_gpt", variant, dropout=0.0).to(device).eval()
if found.state["config"].get("document_mask") is True:
    model.end_of_text = tokenizers.end_of_text(data.meta)
torch.set_float32_matmul_precision("high")
autocast = torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32)
batches = list(evaluation_batches(data.val, eval_iters * batch_size, batch_size, device))

log = TrainingLogger()
os.makedirs(out_dir, exist_ok=True)
log.open_files(out_dir, dict(config), environment(device))
log.begin(0, max_iters)


def loss_of(points: list[int]) -> float:
    """Return the val loss with syncs after these sublayers; infinite if it is not a number."""
    model.reschedule(SyncSchedule.at(L, points))
    with autocast:
        loss = evaluate(model, batches)
    return loss if math.isfinite(loss) else math.inf


points, dropped, sensitivities = list(range(2 * L)), [], []
losses = [loss_of(points)]
if losses[0] == math.inf:
    raise UserError(f"{found.path}: the val loss with all syncs is not finite. Name other weights with "
                    f"--init_from")
log.line(f"{found.path}: val loss {losses[0]:.4f} with {2 * L} syncs on {tp_size} TP ranks, on "
         f"{len(batches)} batches of {batch_size} x {trained['block_size']} tokens")
log.event("eval", step=0, train_loss=None, val_loss=losses[0], lr=None)
for step in range(max_iters):
    started = time.perf_counter()
    without = {j: loss_of([p for p in points if p != j]) for j in points[:-1]}
    j = min(without, key=lambda j: (without[j], j))
    if without[j] == math.inf:
        raise UserError(f"{found.path}: the val loss with {len(points) - 1} syncs is not finite, so no sync "
                        f"can be chosen. Name other weights with --init_from")
    points.remove(j)
    dropped.append(j)
    losses.append(without[j])
    sensitivities.append({j: loss if loss < math.inf else None for j, loss in without.items()})
    log.line(f"{len(points)} syncs: val loss {without[j]:.4f} without sublayer {j}")
    log.event("iter", step=step, loss=without[j], lr=0.0, norm=None, seconds=time.perf_counter() - started,
              tokens_per_second=None, mfu=None)
    log.event("eval", step=step + 1, train_loss=None, val_loss=without[j], lr=None)
write_result(os.path.join(out_dir, "order.json"),
             {"dropped": dropped, "losses": losses, "sensitivities": sensitivities, "weights": found.path,
              "step": found.step, "tp_size": tp_size, "config": dict(config)})
log.status("finished", max_iters, max_iters=max_iters, best_val_loss=losses[0])
log.close(status="finished", step=max_iters, best_val_loss=losses[0], tokens=0)
