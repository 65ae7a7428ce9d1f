"""Attribution of a profiled training step to rows: products, attention, ..., host gaps, waiting for data.

The input is the Chrome trace of torch.profiler, whose steps are events ProfilerStep#n. Every moment of the
steps belongs to one row, so the rows add up to the step:

- On a GPU, to the kernel that runs. Kernels that run at the same time share the moment. A collective counts
  as exposed only while no other kernel runs, and as hidden otherwise. Without a kernel the moment belongs to
  the main thread: it waits for data, or the host leaves the GPU idle (a host gap).
- On a CPU, to the operator that the main thread is in, without the operators that it calls (its self time).
  A collective of another thread counts as exposed while the main thread is in no operator.

A kernel's row follows from the words of its name and from the operators that launched it: whatever an
optimizer or an attention launches is theirs. torch.compile makes kernels whose names list their operators.
"""

import gzip
import json
import math
import re
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field

PRODUCTS, ATTENTION, NORMS, LOSS, OPTIMIZER = "products", "attention", "norms", "loss", "optimizer"
ELEMENTWISE, COPIES, OTHER = "element-wise", "copies, fills", "other"
COMMUNICATION = "communication"  # of kernels and operators; its row is EXPOSED
EXPOSED, HIDDEN = "communication, exposed", "communication, hidden"
GAPS, WAITING = "host gaps", "waiting for data"
ROWS = (PRODUCTS, ATTENTION, NORMS, LOSS, OPTIMIZER, ELEMENTWISE, COPIES, OTHER, EXPOSED, GAPS, WAITING)

STEP = "ProfilerStep#"  # torch.profiler's marker
WAIT = "nanosync::wait_for_data"  # DataLoader.next's marker

# The first pattern that a name matches decides, in lower case. Kernels without a word of their own are of
# kernels/: _forward_kernel and _backward_kernel normalise, _grad_kernel is of the loss, _kernel a product.
WORDS = (
    (COMMUNICATION, r"nccl|rccl|gloo|c10d|reducer::|all_?reduce|all_?gather|reduce_?scatter|symm_mem|"
                    r"one_shot|two_shot|multimem|_exchange_kernel"),
    (OPTIMIZER, r"^optimizer\.|multi_tensor_apply|adam|_foreach_|lpnorm|linalg_vector_norm|muon|_amp_|"
                r"^_(squares|norm)_kernel"),
    (LOSS, r"cross_entropy|log_?softmax|nll_?loss|logsumexp|_lse_kernel|^_grad_kernel"),
    (NORMS, r"layer_?norm|rms_?norm|qk_norm|gammabeta|rsqrt|^_(forward|backward)_kernel|_column_sums_kernel"),
    (ATTENTION, r"attention|attn|flash|fmha|sdpa|softmax|^_(delta|backward_kv|backward_q)_kernel|"
                r"bwd_kernel_(dk|dq)|bwd_preprocess"),
    (PRODUCTS, r"gemm|gemv|matmul|nvjet|cutlass|xmma|cublas|splitk|_scaled_mm|linear|^cijk_|^_kernel$|"
               r"(?<![a-z])(addmm|baddbmm|bmm|mm)(?![a-z])"),
    (COPIES, r"memcpy|memset|copy|catarray|aten::(cat|stack|clone|contiguous|to|_to_copy|fill_|zero_|zeros|"
             r"empty\w*)$|fillfunctor"),
    (ELEMENTWISE, r"elementwise|element_wise|^triton_|cpp_fused|reduce_kernel|vectorized|embedding|dropout|"
                  r"index|gelu|relu|philox|^aten::"),
)
PATTERNS = tuple((row, re.compile(pattern)) for row, pattern in WORDS)
FUSED = re.compile(r"^triton_(poi|per|red)_|cpp_fused")  # of torch.compile, and never a product itself
MOVES = re.compile(r".*fused_+((to_copy|clone|cat|copy|view|transpose|permute|slice|t|unsqueeze|squeeze|"
                   r"expand|split|stack|select|zeros|full)_*)+\d*")  # a kernel of FUSED that copies only
GENERIC = (ELEMENTWISE, COPIES, OTHER)  # rows that the calling operator may know better
# operators whose own time is the host's: the autograd engine, what torch.compile wraps around its kernels
MACHINERY = re.compile(r"^autograd::engine|^torch-compiled|^compiledfunction|^torchdynamo|^aotdispatcher|"
                       r"^torch::autograd|^generatedbackwardfor|^pregraph bytecode|^## call|"
                       r"^_?[a-z0-9]+backward\d*$")
DEVICE, HOST, LAUNCH = ("kernel", "gpu_memcpy", "gpu_memset"), ("cpu_op", "user_annotation"), \
    ("cuda_runtime", "cuda_driver", "hip_runtime", "hip_driver")
TOP = 5  # names of the row `other` that the table shows


@dataclass
class StepProfile:
    """Times of one step, the mean of the profiled steps.

    seconds: row of ROWS -> seconds. step: their sum. hidden: seconds of collectives behind other rows.
    flops: PRODUCTS and ATTENTION -> floating-point operations. others: name -> seconds, longest of OTHER.
    steps: number of profiled steps. on_device: True if the rows are of a GPU's kernels.
    """

    seconds: dict[str, float]
    step: float
    hidden: float
    flops: dict[str, float]
    steps: int
    on_device: bool
    others: list[tuple[str, float]] = field(default_factory=list)

    def share_of_peak(self, row: str | None, peak: float | None) -> float | None:
        """Return FLOP/s over the peak of a row, or of the whole step for None; None if unknown."""
        flops = sum(self.flops.values()) if row is None else self.flops.get(row, 0.0)
        seconds = self.step if row is None else self.seconds[row]
        return None if peak is None or not flops or not seconds else flops / seconds / peak


def read_trace(path: str) -> list[dict]:
    """Return the events of a Chrome trace."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8", errors="replace") as f:
        return json.load(f)["traceEvents"]


def row_of(name: str) -> str | None:
    """Return the row of a kernel's or an operator's name, None for an operator of MACHINERY."""
    name = name.lower()
    if MACHINERY.search(name) and not name.startswith(("aten::", "nanosync::")):
        return None
    row = next((row for row, pattern in PATTERNS if pattern.search(name)), OTHER)
    if FUSED.search(name) and row in (PRODUCTS, COPIES, ELEMENTWISE):
        return COPIES if MOVES.fullmatch(name) else ELEMENTWISE
    return row


def row_within(outer: str | None, name: str) -> str | None:
    """Return the row of a kernel or operator that an operator of the row `outer` calls; None: no row."""
    own = row_of(name)
    if own == COMMUNICATION:
        return own
    if outer in (OPTIMIZER, ATTENTION) or (outer == LOSS and own == ATTENTION):  # a softmax of the loss
        return outer
    if own is None or (own == OTHER and outer is not None):
        return outer
    return outer if own in GENERIC and outer not in (None, *GENERIC) else own


def profile_of(events: list[dict]) -> StepProfile:
    """Attribute the steps of a trace. Raises ValueError if the trace has no step."""
    events = [e for e in events if e.get("ph") == "X"]
    marks = [e for e in events if e["name"].startswith(STEP) and e.get("cat") == "user_annotation"]
    if not marks:
        raise ValueError("the trace has no profiled step")
    begin, end = min(e["ts"] for e in marks), max(e["ts"] + e["dur"] for e in marks)
    inside = [e for e in events if e["ts"] < end and e["ts"] + e["dur"] > begin
              and not e["name"].startswith(STEP)]
    main, threads = (marks[0]["pid"], marks[0]["tid"]), {}
    for e in inside:
        if e.get("cat") in (*HOST, *LAUNCH):
            threads.setdefault((e["pid"], e["tid"]), []).append(e)
    segments, launched, flops = [], {}, Counter()
    for thread, own in threads.items():
        swept = Thread(own, begin, end)
        launched |= swept.launched
        flops.update(swept.flops)
        if thread == main:
            segments = swept.segments
    kernels = [e for e in inside if e.get("cat") in DEVICE]
    if kernels:
        seconds, hidden, others = device_rows(kernels, launched, segments, begin, end)
    else:
        others = Counter()
        collectives = [(max(e["ts"], begin), min(e["ts"] + e["dur"], end)) for thread, own in threads.items()
                       if thread != main for e in own if row_of(e["name"]) == COMMUNICATION]
        seconds, hidden = host_rows(segments, merged(collectives), begin, end, others)
    scale = 1e-6 / len(marks)
    return StepProfile({row: seconds.get(row, 0.0) * scale for row in ROWS}, (end - begin) * scale,
                       hidden * scale, {row: n / len(marks) for row, n in flops.items()}, len(marks),
                       bool(kernels), [(name, us * scale) for name, us in others.most_common(TOP)])


class Thread:
    """The operators of a thread as a sequence of moments.

    segments: (begin, end, row, name) in order, without gaps; row is None outside of operators.
    launched: correlation id of a kernel -> row of the operator that launched it.
    flops: PRODUCTS and ATTENTION -> floating-point operations of all operators.
    """

    def __init__(self, events: list[dict], begin: float, end: float):
        self.segments, self.launched, self.flops = [], {}, Counter()
        self._stack, self._now = [], begin  # of (end, row, True if its own time counts, name)
        for e in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
            self._close(e["ts"])
            outer = self._stack[-1][1] if self._stack else None
            if e["cat"] in LAUNCH:
                if "correlation" in e.get("args", {}):
                    self.launched[e["args"]["correlation"]] = outer
                continue
            self._advance(e["ts"])
            row = WAITING if e["name"] == WAIT else row_within(outer, e["name"])
            if e["cat"] == "user_annotation" and row not in (WAITING, OPTIMIZER):
                row = outer  # a label is no operator
            own = row_of(e["name"])
            host = own is None or (own == OTHER and "::" not in e["name"])  # Python's autograd functions, too
            counts = row == WAITING or (e["cat"] == "cpu_op" and row is not None and not host)
            self._stack.append((e["ts"] + e["dur"], row, counts, e["name"]))
            self._count_flops(e, row)
        self._close(end)
        self._advance(end)

    def _close(self, until: float) -> None:
        """End the operators that end until a moment."""
        while self._stack and self._stack[-1][0] <= until:
            self._advance(self._stack[-1][0])
            self._stack.pop()

    def _advance(self, until: float) -> None:
        if until > self._now:
            _, row, counts, name = self._stack[-1] if self._stack else (0.0, None, False, "")
            if not counts and any(entry[2] for entry in self._stack):  # a label inside of an operator
                _, row, counts, name = next(entry for entry in reversed(self._stack) if entry[2])
            self.segments.append((self._now, until, row if counts else None, name))
            self._now = until

    def _count_flops(self, event: dict, row: str | None) -> None:
        dims = event.get("args", {}).get("Input Dims")
        if dims and row in (PRODUCTS, ATTENTION):
            self.flops[row] += product_flops(event["name"], dims) if row == PRODUCTS else \
                attention_flops(event["name"], dims)


def product_flops(name: str, dims: list) -> float:
    """Return the floating-point operations of an operator that multiplies matrices, 0 for any other.

    dims: shapes of the operator's arguments.
    """
    first = {"aten::mm": 0, "aten::bmm": 0, "aten::_scaled_mm": 0, "aten::addmm": 1, "aten::addmm_": 1,
             "aten::baddbmm": 1, "aten::baddbmm_": 1}.get(name)
    if first is not None and len(dims) > first + 1 and dims[first] and dims[first + 1]:
        return 2.0 * math.prod(dims[first]) * dims[first + 1][-1]
    if name.startswith("nanosync::linear_relu_squared") and len(dims) > 1 and len(dims[1]) == 2:
        rows, (a, b) = dims[0][0], dims[1]
        return 2.0 * rows * a * b
    return 0.0


def attention_flops(name: str, dims: list) -> float:
    """Return the floating-point operations of a causal attention operator, 0 for any other.

    A token attends to half of the sequence on average. The backward pass has 2.5 times the products of the
    forward pass, as it computes the scores again (arXiv 2307.08691).
    """
    if not re.search(r"aten::_scaled_dot_product_(flash|cudnn|efficient)_attention", name):
        return 0.0
    backward = name.endswith("_backward")
    q, k = dims[backward:backward + 2]
    if len(q) != 4 or len(k) != 4:
        return 0.0
    B, H, T, D = q
    return (5.0 if backward else 2.0) * B * H * T * k[2] * D


def merged(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the union of intervals as intervals in order that do not touch."""
    union = []
    for begin, end in sorted(intervals):
        if union and begin <= union[-1][1]:
            union[-1] = union[-1][0], max(end, union[-1][1])
        elif end > begin:
            union.append((begin, end))
    return union


def overlap(begin: float, end: float, intervals: list[tuple[float, float]]) -> float:
    """Return the length of [begin, end] that `merged` intervals cover."""
    total, i = 0.0, max(0, bisect_right(intervals, (begin, math.inf)) - 1)
    while i < len(intervals) and intervals[i][0] < end:
        total += max(0.0, min(end, intervals[i][1]) - max(begin, intervals[i][0]))
        i += 1
    return total


def host_rows(segments: list, collectives: list, begin: float, end: float, others: Counter
              ) -> tuple[Counter, float]:
    """Return the time of each row, and of hidden collectives, from the main thread's segments."""
    seconds, hidden = Counter(), 0.0
    for start, stop, row, name in segments:
        sent = overlap(start, stop, collectives)
        if row is None:
            seconds[EXPOSED] += sent
            seconds[GAPS] += stop - start - sent
        else:
            seconds[EXPOSED if row == COMMUNICATION else row] += stop - start
            hidden += sent if row not in (COMMUNICATION, WAITING) else 0.0
        if row == OTHER:
            others[name] += stop - start
    seconds[GAPS] += end - begin - sum(seconds.values())  # rounding, or no segment at all
    return seconds, hidden


def device_rows(kernels: list[dict], launched: dict, segments: list, begin: float, end: float
                ) -> tuple[Counter, float, Counter]:
    """Return the time of each row, of hidden collectives, and of the kernels in OTHER, from the kernels."""
    waits = merged([(start, stop) for start, stop, row, _ in segments if row == WAITING])
    changes = []  # (moment, +1 or -1, row, name)
    for e in kernels:
        row = row_within(launched.get(e.get("args", {}).get("correlation")), e["name"]) or OTHER
        row = OTHER if row == WAITING else row
        changes += [(max(begin, e["ts"]), 1, row, e["name"]),
                    (min(end, e["ts"] + e["dur"]), -1, row, e["name"])]
    seconds, others, hidden, now = Counter(), Counter(), 0.0, begin
    running, collectives = Counter(), 0  # running: (row, name) -> number, without collectives
    for moment, change, row, name in [*sorted(changes), (end, 0, OTHER, "")]:
        length = moment - now
        if length > 0:
            n = sum(running.values())
            for (kind, kernel), count in running.items():
                seconds[kind] += length * count / n
                if kind == OTHER:
                    others[kernel] += length * count / n
            if n == 0 and collectives:
                seconds[EXPOSED] += length
            elif n == 0:
                waited = overlap(now, moment, waits)
                seconds[WAITING] += waited
                seconds[GAPS] += length - waited
            elif collectives:
                hidden += length
        now = max(now, moment)
        if row == COMMUNICATION:
            collectives += change
        elif change:
            running[row, name] += change
            if not running[row, name]:
                del running[row, name]
    return seconds, hidden, others
