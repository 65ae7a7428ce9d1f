"""What a line of the log costs, as JSON. From the root: PYTHONPATH=. python records/.../log_cost.py"""

import json
import statistics
import sys
import tempfile
import time

from nanosync.training_logger import TrainingLogger

figures = {}
for tensorboard in (False, True):
    log, times = TrainingLogger(), []
    log.open_files(tempfile.mkdtemp(), {}, {}, tensorboard=tensorboard)
    with open("/dev/null", "w") as sys.stdout:
        for step in range(5000):
            started = time.perf_counter()
            log.iteration(step, 3.2, 6e-4, 0.4, 0.11, 65536, 0.5, 0, 123456789)
            times.append(1e6 * (time.perf_counter() - started))
    sys.stdout = sys.__stdout__
    times.sort()
    figures[f"tensorboard={tensorboard}"] = {
        "n": len(times), "median_us": statistics.median(times), "mean_us": statistics.mean(times),
        "p99_us": times[int(0.99 * len(times))], "max_us": times[-1]}
print(json.dumps(figures, indent=1))
