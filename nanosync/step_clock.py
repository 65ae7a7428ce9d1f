"""The clock of a speedrun, its lines and its events.

The clock measures training time without evaluations, saving, compiling and the first steps. The CPU reads the
report of a step while the next step runs, because a loop that waits for every loss leaves the GPU idle.
"""

import math
from collections.abc import Callable

import torch

from nanosync.distributed import all_reduce_sum
from nanosync.hardware import peak_flops, peak_memory
from nanosync.run import Run


class LateReport:
    """Mean loss and stop request of a step, over all processes, during their copy to the CPU."""

    def __init__(self, step: int, loss: torch.Tensor, stop: bool, group, flops: float, tokens: int,
                 fields: dict):
        """Start the reduction and the copy.

        loss: this process's share of the mean, a scalar.
        stop: True if this process was asked to stop.
        flops, tokens: of the step, over all processes.
        fields: further fields of the step's event.
        """
        self.step, self.flops, self.tokens, self.fields = step, flops, tokens, fields
        values = all_reduce_sum(torch.stack((loss, torch.full_like(loss, float(stop)))), group)
        self._event, self._values = None, values
        if values.is_cuda:
            self._values, self._event = values.to("cpu", non_blocking=True), torch.cuda.Event()
            self._event.record()

    def read(self) -> tuple[float, bool]:
        """Wait until the step is done; return the mean loss, and True if any process was asked to stop."""
        if self._event is not None:
            self._event.synchronize()
        loss, stops = self._values.tolist()
        return loss, stops > 0


STATE = {"train_seconds": float, "train_loss": float | None, "last_val_loss": float | None,
         "last_val_step": int | None}  # entries that the clock adds to state.json -> their types


class StepClock:
    """Training seconds so far, the pending report of the newest step, and the newest val loss."""

    skipped = 10  # steps before the clock starts, as in modded-nanogpt's record

    def __init__(self, run: Run, dtype: torch.dtype,
                 observe: Callable[[int, float], None] = lambda step, loss: None):
        """Start the clock at 0 seconds.

        dtype: dtype of matrix products, for MFU.
        observe: function of (step, mean train loss), called on all processes with the same values.
        """
        self.run, self.observe = run, observe
        self.peak = peak_flops(run.processes.device, dtype)
        self.train_seconds, self.train_loss, self.stop_asked, self._problem = 0.0, None, False, None
        self.val_loss, self.val_step, self._late = None, None, None

    def state(self) -> dict:
        """Return the entries of a checkpoint's state.json."""
        return {"train_seconds": self.train_seconds, "train_loss": self.train_loss,
                "last_val_loss": self.val_loss, "last_val_step": self.val_step}

    def load(self, state: dict) -> None:
        """Load the entries that `state` returned."""
        self.train_seconds, self.train_loss = state["train_seconds"], state["train_loss"]
        self.val_loss, self.val_step = state["last_val_loss"], state["last_val_step"]

    def status(self) -> dict:
        """Return the entries of status.json and of the end event."""
        return {"val_loss": self.val_loss, "val_step": self.val_step, "train_loss": self.train_loss,
                **self.timing(self.run.step)}

    def start(self) -> None:
        """Start to measure; the time so far, e.g. for compiling, does not count."""
        self.run.stopwatch.lap()

    def timing(self, done: int) -> dict:
        """Return the fields of an event after `done` steps: training time and its mean per step, ms."""
        timed = done - self.skipped
        return {"train_time_ms": 1e3 * self.train_seconds,
                "step_avg_ms": 1e3 * self.train_seconds / timed if timed > 0 else math.nan}

    def report(self, what: str, done: int, rest: str = "") -> None:
        """Print the clock after `done` steps, with a loss as text before it, and `rest` after it."""
        clock = self.timing(done)
        self.run.line(f"step:{done}/{self.run.last_step} {what} train_time:{clock['train_time_ms']:.0f}ms "
                      f"step_avg:{clock['step_avg_ms']:.2f}ms{rest}")

    def begin_step(self, settle: bool) -> None:
        """Set run.stopping if any process was asked to stop. Raises UserError, which ends the run, if a loss
        is not finite.

        settle: True if work is due that needs the newest step to be settled. Otherwise that step still runs.
        """
        last = self.run.step == self.run.last_step
        if settle or last or self.stop_asked or self.run.step == self.skipped:
            self.settle()
        if self._problem:
            self.run.fail(self._problem, "no checkpoint has the weights after it")
        self.run.stopping = self.stop_asked and not last

    def evaluated(self, val_loss: float | None, lr: float) -> None:
        """Print and log the result of an evaluation; None: it was stopped. Raises UserError, which ends the
        run, if the loss is not finite."""
        if val_loss is None:
            return
        run, step = self.run, self.run.step
        self.val_loss, self.val_step, run.val_loss = val_loss, step, val_loss
        bits = run.data.bits_per_byte(val_loss)
        self.report(f"val_loss:{val_loss:.4f}", step, "" if bits is None else f" bits_per_byte:{bits:.4f}")
        run.log.event("eval", step=step, train_loss=self.train_loss, val_loss=val_loss, lr=lr,
                      **self.timing(step), **({} if bits is None else {"bits_per_byte": bits}))
        if not math.isfinite(val_loss):
            run.fail(f"the val loss is {val_loss} at step {step}", "no checkpoint has these weights")

    def step_done(self, step: int, loss: torch.Tensor, flops: float, tokens: int, **fields) -> None:
        """Settle the previous step, and start the report of this step.

        loss, flops, tokens, fields: see LateReport.
        """
        self.settle()
        processes = self.run.processes
        self._late = LateReport(step, loss, self.run.signals.received > 0, processes.group, flops, tokens,
                                fields)
        if processes.device.type != "cuda":  # the loss is in the CPU's memory already
            self.settle()

    def settle(self) -> None:
        """Read the report of the newest step, add its time, and log the step."""
        late, self._late = self._late, None
        if late is None:
            return
        self.train_loss, self.stop_asked = late.read()
        seconds = self.run.stopwatch.lap()
        if late.step >= self.skipped:  # includes the start-up of a run that is resumed after these steps
            self.train_seconds += seconds
        self.observe(late.step, self.train_loss)
        if not math.isfinite(self.train_loss):
            self._problem = f"the loss is {self.train_loss} at step {late.step}"
        if (late.step + 1) % self.run.config["log_interval"] == 0:
            self.report(f"train_loss:{self.train_loss:.4f}", late.step + 1)
            self._event(late, seconds)

    def _event(self, late: LateReport, seconds: float) -> None:
        run = self.run
        peak = None if self.peak is None else self.peak * run.processes.world_size
        run.log.event("iter", step=late.step, loss=self.train_loss, norm=None, seconds=seconds,
                      tokens_per_second=late.tokens / seconds, epoch=run.loader.epoch,
                      memory=peak_memory(run.processes.device),
                      mfu=None if peak is None else late.flops / seconds / peak, **late.fields,
                      **self.timing(late.step + 1))
