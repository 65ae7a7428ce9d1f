"""--diagnose=N: train some steps, profile the next N, print where their time goes, and end.

A diagnosis locks, archives and saves nothing. It writes one file, the Chrome trace in out_dir.
step_profile.py attributes the time. The profiler slows down the host, so the time of steps without it is
printed, too.
"""

import os
import time
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from configurator import Config, check_at_least, check_at_most
from nanosync.errors import UserError
from nanosync.files import check_can_write, os_error_as_user_error, unused_path
from nanosync.hardware import peak_flops, pick_dtype
from nanosync.step_profile import (
    ATTENTION,
    COPIES,
    ELEMENTWISE,
    EXPOSED,
    GAPS,
    HIDDEN,
    LOSS,
    NORMS,
    OPTIMIZER,
    OTHER,
    PRODUCTS,
    ROWS,
    WAITING,
    StepProfile,
    profile_of,
    read_trace,
)

WARM_UP = 10  # steps before those under the profiler
TIMED_FROM, PROFILER_WARM_UP = 5, 2  # warm-up steps TIMED_FROM to WARM_UP - PROFILER_WARM_UP are timed
MOST = 1000  # profiled steps; a step has thousands of events
# settings that a diagnosis turns off
OFF = {"eval_interval": 0, "val_loss_every": 0, "sample_interval": 0, "hellaswag_interval": 0,
       "checkpoint_interval": 0, "save_checkpoint": False,
       "cuda_graphs": False}  # the profiler does not see which operator launched a graph's kernel


def check_diagnosis(config: Config) -> None:
    """Raise UserError for a wrong `diagnose`, before any work is done."""
    check_at_least(config, 0, "diagnose")
    check_at_most(config, MOST, "diagnose")
    if config["diagnose"] and config.get("eval_only"):
        raise UserError(f"diagnose={config['diagnose']} profiles training steps, and eval_only trains none: "
                        f"leave one of them out")


def only_diagnose(config: Config, device: torch.device) -> None:
    """Turn off what a diagnosis does not do, before the model is compiled. Raises UserError."""
    if not config["diagnose"]:
        return
    if device.type == "mps":
        raise UserError(f"diagnose={config['diagnose']}: the profiler does not see MPS kernels; use a CUDA "
                        f"device, or --device=cpu")
    check_can_write(config["out_dir"] or os.curdir, "out_dir")
    for name, value in OFF.items():
        if name in config:
            config[name], config.origin[name] = value, "diagnose"
    if device.type == "cpu" and config["compile"]:  # compiled kernels as operators of the trace
        import torch._inductor.config as inductor

        inductor.cpp.enable_kernel_profile = True


def check_steps(config: Config, first: int) -> None:
    """Raise UserError if too few steps are left for the diagnosis. first: step at which the run begins."""
    name = "max_iters" if "max_iters" in config else "num_iterations"
    needed = first + WARM_UP + config["diagnose"]
    if config["diagnose"] and config[name] < needed:
        begins = f", and the run begins at step {first}" if first else ""
        raise UserError(f"diagnose={config['diagnose']} needs {WARM_UP} steps of warm-up before it"
                        f"{begins}: use --{name}={needed} or more, not {config[name]}")


def profiled(run) -> Iterator[int]:
    """Yield run.iterations(). With `diagnose`, profile some of them, print the table and stop the run."""
    steps = run.config["diagnose"]
    if not steps:
        yield from run.iterations()
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler's library prints when it starts and ends
    device, begin = run.processes.device, run.first_step + WARM_UP
    times, profiler = {}, None
    for step in run.iterations():
        if step in (begin - WARM_UP + TIMED_FROM, begin - PROFILER_WARM_UP, begin, begin + steps):
            if device.type == "cuda":  # so that the kernels of the steps before are not in these steps
                torch.cuda.synchronize(device)
            times[step - begin] = time.perf_counter()
        if step == begin - PROFILER_WARM_UP and run.processes.main:
            profiler = _start(device, steps)
        elif profiler is not None:
            profiler.step()
            if step == begin:
                times[0] = time.perf_counter()
        if step == begin + steps:
            if profiler is not None:
                plain = (times[-PROFILER_WARM_UP] - times[TIMED_FROM - WARM_UP]) \
                    / (WARM_UP - PROFILER_WARM_UP - TIMED_FROM)
                _report(run, profiler, plain, (times[steps] - times[0]) / steps)
            run.stop("the diagnosis is done: no checkpoint and no log was written")
        yield step


def _start(device: torch.device, steps: int) -> profile:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    profiler = profile(activities=activities, record_shapes=True,
                       schedule=schedule(wait=0, warmup=PROFILER_WARM_UP, active=steps, repeat=1))
    profiler.start()
    return profiler


def _report(run, profiler: profile, plain: float, measured: float) -> None:
    """Write the trace and print the table. plain, measured: seconds of a step without and with the
    profiler. Raises UserError."""
    config, device = run.config, run.processes.device
    with os_error_as_user_error(f"cannot write the trace into {config['out_dir']}"):
        os.makedirs(config["out_dir"] or os.curdir, exist_ok=True)
        path = unused_path(os.path.join(config["out_dir"], time.strftime("trace_%Y%m%d-%H%M%S")), ".json.gz")
        profiler.export_chrome_trace(path)
        found = profile_of(read_trace(path))
    peak = peak_flops(device, pick_dtype(config["dtype"], device))
    of = "kernels of the GPU" if found.on_device else "operators of the main thread, by their own time"
    steps = f"{found.steps} step{'s' * (found.steps != 1)}"
    run.line(f"where a step's time goes: {steps} after {WARM_UP} of warm-up on "
             f"{run.environment['device']}, {of}\n" + "\n".join(table(found, config, peak)))
    run.line(f"a step takes {1e3 * plain:.2f} ms without the profiler, {1e3 * measured:.2f} ms with it; "
             f"trace: {path} (open it in ui.perfetto.dev)")


def table(found: StepProfile, config: dict, peak: float | None) -> list[str]:
    """Return the lines of the table.

    peak: FLOP/s of the device, None if unknown. Of the peak: products and attention by their own operations
    and time; the step by the operations of both.
    """
    lines = [f"  {'':23} {'ms':>9} {'share':>7} {'of peak':>8}  to change it"]
    for row in ROWS:
        share = found.seconds[row] / found.step if found.step else 0.0
        switch = switch_of(row, config, found.on_device) if share >= 0.01 else ""
        lines.append(_line(row, found.seconds[row], share, found.share_of_peak(row, peak)
                           if row in (PRODUCTS, ATTENTION) else None, switch))
    lines.append(_line("step", found.step, 1.0, found.share_of_peak(None, peak), ""))
    if found.hidden:
        lines.append(_line(HIDDEN, found.hidden, None, None, "(behind the rows above, not in the sum)"))
    if found.others and found.seconds[OTHER] >= 0.01 * found.step:
        lines.append("  other: " + ", ".join(f"{name[:60]} {1e3 * seconds:.2f} ms"
                                             for name, seconds in found.others))
    return lines


def _line(name: str, seconds: float, share: float | None, of_peak: float | None, switch: str) -> str:
    shown = "" if share is None else f"{100 * share:.1f}%"
    peak = "" if of_peak is None else f"{100 * of_peak:.1f}%"
    return f"  {name:23} {1e3 * seconds:9.2f} {shown:>7} {peak:>8}  {switch}".rstrip()


def switch_of(row: str, config: dict, on_device: bool) -> str:
    """Return the setting that changes a row most, '' if no setting of the script does."""
    batch = "device_batch_size" if "device_batch_size" in config else "batch_size"
    per_update = "more --gradient_accumulation_steps" if "gradient_accumulation_steps" in config else \
        "larger --batch_sizes" if "batch_sizes" in config else "a larger --batch_size"
    length = "block_size" if "block_size" in config else "sequence_length"
    low = "--dtype=bfloat16" if on_device and config["dtype"] == "float32" else ""
    compiled = "" if config["compile"] else "--compile=True"
    larger = f"a larger --{batch}"
    if row == PRODUCTS:
        return low or (larger if on_device else "a smaller model")
    if row == ATTENTION:
        return low or ("shorter --short_windows, --long_windows" if "long_windows" in config
                       else f"a smaller --{length}")
    if row == NORMS:
        return "--use_triton=True" if on_device and config.get("use_triton") is False else compiled
    if row == LOSS:
        return low or compiled
    if row == OPTIMIZER:
        sharded = config.get("use_zero1", True) or config.get("use_fsdp", True)
        return "with several processes --use_zero1" if not sharded and config["optimizer"] == "adamw" else \
            f"{per_update}: fewer updates for the same tokens"
    if row == ELEMENTWISE:
        return compiled or ("--dropout=0.0" if config.get("dropout") else "")
    if row == COPIES:
        return compiled
    if row == EXPOSED:
        if config.get("tp_processes", 1) > 1:
            return "a --sync_strategy with fewer syncs" if "sync_strategy" in config else \
                "--block_types with fewer syncs"
        if config.get("use_fsdp") and config["fsdp_reshard_after_forward"]:
            return "--fsdp_reshard_after_forward=False"
        return f"{per_update}: fewer updates for the same tokens"
    if row == GAPS:
        graphs = "on one GPU --cuda_graphs, or " * (on_device and "cuda_graphs" in config)
        return compiled or graphs + larger
    return "a --dataset on a faster disk" if row == WAITING else ""
