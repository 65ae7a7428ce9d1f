"""The life of a run: lock, resume, open files, evaluate, save, stop, end.

    run = Run(config, processes, kinds, own)      # lock out_dir; find the checkpoint to resume
    run.check_data(data)
    run.restore(model, optimizer, scaler)         # exits if nothing is left to train
    run.open()                                    # writes files and handles signals from here on
    run.begin(loader, kind=...)                   # random states, saver
    for it in run.iterations():
        if run.due(eval_interval):                # False while stopping; remembers what was skipped
            run.evaluated(losses, lr)
        if not run.proceed():                     # saves what is due; False after the last update or a stop
            break
        loss, norm = run.agree(loss_sum, norm, n)  # after forward and backward; fails if not finite
        run.iteration(loss, lr, norm)             # after the update
    run.end()

A script owns settings, model, data and update. A Run never calls the model's forward pass, and never reads or
writes a gradient.
"""

import math
import time
from collections.abc import Callable, Iterator

import torch

from nanosync import run_dir
from nanosync.checkpoint_writer import Saver, snapshot, state_of
from nanosync.dataloader import DataLoader, DataSet, epoch_messages
from nanosync.distributed import Job, Processes, agree, any_process, barrier, finish, on_main
from nanosync.errors import UserError, before_exit, exit_now
from nanosync.hardware import environment, peak_flops, peak_memory
from nanosync.log_sinks import check_installed
from nanosync.memory import watch_memory
from nanosync.model_kind import ModelKind
from nanosync.optimizer_state import load_state_by_name
from nanosync.random_states import resume_random_states, seed_random_states
from nanosync.resuming import check_same_data, load_scaler, start_from
from nanosync.signals import StopSignal, answer_of, status_after
from nanosync.training_logger import Stopwatch, TrainingLogger


class Run:
    """A run of a training script. All processes of the run make the same calls."""

    def __init__(self, config: dict, processes: Processes, kinds: dict[str, ModelKind], own: tuple[str, ...],
                 steps: str = "max_iters"):
        """Lock out_dir, find the checkpoint that a resumed run continues, and take its settings.

        With eval_only or diagnose nothing is locked or written. Raises UserError.

        kinds: all kinds of model; own: names of the kinds that the script trains.
        steps: name of the setting with the number of updates.
        """
        self.config, self.processes, self.kinds, self.steps = config, processes, kinds, steps
        self.log = TrainingLogger(active=processes.main)
        self.line = self.log.line
        self.writes, self._lock = not (config.get("eval_only") or config.get("diagnose")), None
        out_dir = config["out_dir"]
        if self.writes:
            check_installed(config.get("use_tensorboard", False), config.get("wandb_log", False))
            self.on_main(lambda: run_dir.check_out_dir(out_dir))
            self._lock = self.on_main(lambda: run_dir.lock(out_dir, make=False))  # until the process ends
        self.resumed, self.restarted = start_from(config, processes, self.line, kinds, own)
        self.continues = self.resumed is not None and run_dir.belongs_to(self.resumed, out_dir)
        self.tp = {"tp_processes": config["tp_processes"]} if "tp_processes" in config else {}
        self.environment = environment(processes.device) | {"world_size": processes.world_size, **self.tp}
        self.last_step, self.step, self.first_step = config[steps], 0, 0
        self.best_val_loss, self.val_loss = math.inf, None  # val_loss: of this step, if measured
        self.stopping, self.status, self.signals, self.saver, self.tokens = False, "finished", None, None, 0
        job, self._extra_status = Job.of_process(), dict
        self._job = {} if job is None else job.fields()
        self.sample, self.was_evaluated, self._skipped, self._stop_reason = 0, False, False, None

    def on_main(self, function):
        """Call function() on the main process; return its result or raise its UserError on all processes."""
        return on_main(function, self.processes.group)

    def check_data(self, data: DataSet) -> None:
        """Keep the data set. Raises UserError if the checkpoint was trained on another data set."""
        self.data = data
        if self.resumed is not None and self.writes:
            check_same_data(self.resumed, data.folder, data.fingerprint, self.kinds)

    def restore(self, model, optimizer, scaler=None) -> None:
        """Load the states of a resumed run, whose model has its weights. Exit if no step is left."""
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        watch_memory(model, optimizer, self.processes.device)
        if self.resumed is None:
            return
        state = self.resumed.state
        begun = state["step"] > 0 and not state["scaler"]  # a loss scaler may have skipped all updates so far
        load_state_by_name(optimizer, model, self.resumed.tensors("optim"), begun)
        load_scaler(scaler, self.resumed)
        self.step = self.first_step = state["step"]
        self.sample, self.was_evaluated = state["sample"], state["evaluated"]
        if state["best_val_loss"] is not None:
            self.best_val_loss = state["best_val_loss"]
        if self.writes and self.step + self.was_evaluated > self.last_step:  # the last evaluation is done
            self.line(f"nothing left to do: {self.resumed.path} is at step {self.step} of "
                      f"{self.steps}={self.last_step}")
            finish(self.processes)
            raise SystemExit(0)

    def open(self, source: str | None = None) -> None:
        """Print the settings; write files and handle signals from here on. source: script, for the log."""
        if self.writes:
            barrier(self.processes.group)  # wait until all processes have read their weights
            self._lock = self.on_main(lambda: run_dir.open_out_dir(self, self._lock, source))
            before_exit.append(lambda error: self._close(status_after(error, self.status)))
        self.line("settings, with where they differ from the script's:\n" + self.config.table())
        if not self.config.get("eval_only"):  # before the first compilation, see StopSignal
            answer = answer_of(self.config.get("save_checkpoint", True)) if self.processes.main else ""
            self.signals = StopSignal(answer)
            barrier(self.processes.group)  # all have handlers: a signal would end a process without one

    def begin(self, loader: DataLoader, tokens: int, flops: float = 0.0, dtype=None,
              shared_generator: torch.Generator | None = None, *, kind: str, random_states: bool = True,
              progress: bool = True, extra_state: Callable[[], dict] = dict,
              extra_status: Callable[[], dict] = dict) -> None:
        """Set the random states, and start the saver.

        kind: kind of the model; tokens, flops: of an update, over all processes.
        dtype: dtype of matrix products, for MFU; None for a script that does not report MFU here.
        shared_generator: generator that the processes of one model share.
        random_states: seed this process, or restore its random states; progress: show a bar on a terminal.
        extra_state: function that returns further entries of state.json.
        extra_status: function that returns further entries of status.json and of the end event.
        """
        processes, config = self.processes, self.config
        if random_states:  # dropout differs between processes
            seed_random_states(config["seed"] + processes.rank)
        self.shared_generator, self.kind, self.tokens = shared_generator, kind, tokens
        self.extra_state, self._extra_status, self.loader = extra_state, extra_status, loader
        self._epoch, self.stopwatch = loader.epoch, Stopwatch()
        if self.resumed is not None and random_states:
            resume_random_states(self.resumed, processes, shared_generator, self.line)
        peak = peak_flops(processes.device, dtype) if dtype is not None else None
        self._mfu_per_second = None if peak is None else flops / (peak * processes.world_size)
        protected = (self.resumed.step,) if self.continues else ()
        self.saver = Saver(config["out_dir"], config["keep_checkpoints"], protected, self.log)
        self.stop_anywhere()  # asked to stop while the model was compiled
        if progress:
            self.log.begin(self.first_step, self.last_step)
        self.write_status("running")

    def iterations(self) -> Iterator[int]:
        """Yield the number of each update, and then the number of the step after the last update."""
        for step in range(self.first_step, self.last_step + 1):
            self.step = step
            self.val_loss, self._skipped = None, False
            yield step
            self._announce_epoch()
            self.saver.poll()

    def _announce_epoch(self) -> None:
        """Print the end of an epoch and the start of the next, if the loader has reached it."""
        for message in epoch_messages(self.data.train, self._epoch, self.loader.epoch):
            self.line(message)
        self._epoch = self.loader.epoch

    def due(self, interval: int) -> bool:
        """Return True if work that is due every `interval` steps and at the end must be done now. While the
        run is stopping, return False; the resumed run does what is skipped here."""
        due = self.is_due(interval)
        self.stopwatch.pause()  # until `proceed`
        self._skipped |= due and self.stopping
        return due and not self.stopping

    def is_due(self, interval: int) -> bool:
        """Return True every `interval` steps and at the end, even while the run is stopping. Return False at
        the first step of a resumed run if the checkpoint was saved after its evaluation."""
        done = self.step == self.first_step and self.was_evaluated
        return interval > 0 and not done and (self.step % interval == 0 or self.step == self.last_step)

    def evaluated(self, losses: dict[str, float] | None, lr: float) -> None:
        """Log losses, {"train": ..., "val": ...}, of an evaluation; None: it was stopped. Raises UserError if
        a loss is not finite."""
        if losses is None:
            return
        train, val = losses["train"], losses["val"]
        self.log.evaluation(self.step, train, val, lr, self.data.bits_per_byte(val))
        self.val_loss = val
        if not math.isfinite(train + val):
            self.fail(f"the train loss is {train}, the val loss {val} at iteration {self.step}")

    def stop_anywhere(self) -> bool:
        """Return True if any process was asked to stop; the resumed run then repeats the evaluation. All
        processes must call this method after each batch of an evaluation."""
        if self.asked_to_stop(self.processes.group):
            self.stopping = self._skipped = True
        return self.stopping

    def asked_to_stop(self, group) -> bool:
        """Return True if any process of the group was asked to stop."""
        asked = self.signals is not None and self.signals.received > 0
        return any_process(asked, self.processes.device, group)

    def stop(self, reason: str) -> None:
        """Make the next `proceed` end the run after it has saved what is due. reason: line for the log."""
        self._stop_reason = reason

    def proceed(self, save: bool | None = None) -> bool:
        """Save what is due; return False after the last update, or if the run stops here.

        save: True if a checkpoint is due; None: it is due if the val loss improved, or by checkpoint_interval
        or always_save_checkpoint. An interrupted run is saved, too. save_checkpoint=False turns both off.
        """
        config, saved_here = self.config, self.step == self.first_step and self.continues
        if self.stopping:
            self.val_loss = None  # the resumed run evaluates again
            if not saved_here and config.get("save_checkpoint", True):
                self._save(not self._skipped, best=False)
            self.status = "interrupted"
            return False
        improved = self.val_loss is not None and self.val_loss < self.best_val_loss
        self.best_val_loss = self.val_loss if improved else self.best_val_loss
        interval_due = self.is_due(config["checkpoint_interval"])
        if save is None:
            always = self.val_loss is not None and config["always_save_checkpoint"]
            save = self.step > 0 and (improved or always or (interval_due and not saved_here)) \
                and config.get("save_checkpoint", True)
        if save:
            self._save(True, improved)
        if self.val_loss is not None or interval_due or self.step == self.first_step:
            self.write_status("running")
        self.stopwatch.resume()
        if self._stop_reason is not None:
            self.line(self._stop_reason)
            self.status = "stopped"
        return self._stop_reason is None and self.step < self.last_step

    def _save(self, evaluated: bool, best: bool) -> None:
        """Copy the state of the run and start to write it. All processes must call this method.

        evaluated: False if the evaluation due at this step was skipped; best: True for the lowest val_loss.
        """
        started = time.perf_counter()
        if self.processes.main:
            self.saver.wait()  # so that memory holds one copy at a time
        self.model.align_replicas(self.optimizer)
        tensors = snapshot(self.model, self.optimizer, self.processes.device, self.shared_generator,
                           self.processes.group)
        if self.processes.main:
            self.saver.save(self.step, tensors, state_of(self, evaluated), best, started)

    def agree(self, loss_sum: torch.Tensor, norm: torch.Tensor, micro_batches: int) -> tuple[float, float]:
        """All-reduce loss, norm and stop request together; return mean loss and norm.

        Waits for the device. Raises UserError, which ends the run, if a value is not finite on any process.
        (With a loss scaler the norm may overflow: the scaler skips the update.) loss_sum: over this process's
        micro-batches; micro_batches: their number over all models.
        """
        loss_sum, norm, self.stopping = agree(loss_sum, norm, self.signals.received > 0, self.processes)
        loss = loss_sum / micro_batches
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            self.fail(f"the loss is {loss} and the gradient's norm {norm} at iteration {self.step}")
        return loss, norm

    def fail(self, problem: str, kept: str = "the update was skipped and no checkpoint has it") -> None:
        """Raise UserError because a value is not finite. kept: state of update and checkpoints."""
        self.status = "non_finite"
        raise UserError(f"{problem}: {kept}; resume an earlier one (--list_checkpoints shows them) with "
                        f"--resume=STEP and a lower learning_rate")

    def iteration(self, loss: float, lr: float, norm: float, **fields: float) -> None:
        """Log an update. fields: further fields of log_fields.FIELDS."""
        self._announce_epoch()  # before the first line that has the new epoch
        seconds = self.stopwatch.lap()
        mfu = None if self._mfu_per_second is None else self._mfu_per_second / seconds
        self.log.iteration(self.step, loss, lr, norm, seconds, self.tokens, mfu, self.loader.epoch,
                           peak_memory(self.processes.device), self.step % self.config["log_interval"] == 0,
                           **fields)

    def write_status(self, status: str) -> None:
        self.log.status(status, self.step, max_iters=self.last_step, best_val_loss=self.best_val_loss,
                        **self._extra_status(), **self._job)

    def _close(self, status: str) -> None:
        """Wait for the pending checkpoint, and close the logs; also called if an error ends the run."""
        if self.saver is not None:  # the run has begun
            self.loader.close()
            self.saver.wait()
        self.write_status(status)
        self.log.close(status=status, step=self.step, best_val_loss=self.best_val_loss,
                       tokens=self.step * self.tokens, **self._extra_status())

    def end(self, *notes: str) -> None:
        """End the run and this process. notes: lines for the log. Raises UserError if saving fails."""
        self.on_main(lambda: self.saver.wait(final=True))
        if self.status == "interrupted":
            saved = self.config.get("save_checkpoint", True)
            self.line(f"interrupted at step {self.step}: {'use --resume=latest' if saved else 'not saved'}")
        for note in notes:
            self.line(note)
        self._close(self.status)
        self.signals.end()
        finish(self.processes)
        exit_now()  # a single process
