"""Draw sync schedules, from the schedules of the models.

    python experiments/draw_schedules.py --out=schedules.png [--n_layer=12]
"""

import os

if __name__ == "__main__":
    import root_path  # noqa: F401

from configurator import Parser
from nanosync.errors import UserError
from nanosync.files import check_can_write
from nanosync.sync_schedule import SyncSchedule
from reduced_sync_model import GPTConfig
from tensor_parallel_model import DistributedGPTConfig


def schedules(n_layer: int) -> list[tuple[str, SyncSchedule]]:
    """Return a schedule of each kind, with its name."""
    size = dict(n_layer=n_layer, n_head=2, n_embd=2)
    half = list(range(n_layer // 4)) + list(range(n_layer - n_layer // 4, n_layer))
    thirds = ["tp"] * (n_layer // 3) + ["spd"] * (n_layer // 3)
    thirds += ["parallel"] * (n_layer - len(thirds))
    configs = [
        ("standard", GPTConfig(**size)),
        (f"selective, {len(half)} layers",
         GPTConfig(**size, sync_strategy="selective", attn_sync_layers=half)),
        ("tp, spd, parallel blocks", DistributedGPTConfig(**size, block_types=thirds)),
        ("spd", GPTConfig(**size, sync_strategy="spd")),
        *((f"grouped by {k}", GPTConfig(**size, sync_strategy="grouped", layers_per_group=k))
          for k in (2, 4) if n_layer % k == 0),
        ("parallel blocks", DistributedGPTConfig(**size, block_types=["parallel"] * n_layer)),
    ]
    return [(name, config.schedule()) for name, config in configs]


def draw(n_layer: int, path: str) -> None:
    """Draw a row a schedule: boxes are sublayers, bars all-reduces; orange while the ranks differ."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = schedules(n_layer)
    figure, axes = plt.subplots(figsize=(11, 0.52 * len(rows) + 1.1), layout="constrained")
    for y, (name, schedule) in enumerate(rows):
        pending = False
        for j, sublayer in enumerate(schedule.sublayers):
            face = "#f4b183" if pending else "#dbe5f1"
            axes.add_patch(plt.Rectangle((j + 0.08, y - 0.27), 0.72, 0.54, facecolor=face,
                                         edgecolor="#666666", linewidth=0.6))
            axes.text(j + 0.44, y, "AM"[j % 2], ha="center", va="center", fontsize=7, color="#333333")
            pending = not sublayer.sync
            if sublayer.sync or j == len(schedule.sublayers) - 1:
                axes.plot([j + 0.92] * 2, [y - 0.4, y + 0.4], color="#c00000", linewidth=2)
        count = len(set(schedule.points) | {2 * n_layer - 1})
        axes.text(-0.4, y, name, ha="right", va="center", fontsize=9)
        axes.text(2 * n_layer + 0.4, y, str(count), ha="left", va="center", fontsize=9, color="#c00000")
    for i in range(n_layer):
        axes.text(2 * i + 0.94, -0.75, str(i), ha="center", va="center", fontsize=8, color="#666666")
    axes.text(-0.4, -0.75, "layer", ha="right", va="center", fontsize=8, color="#666666")
    axes.text(2 * n_layer + 0.4, -0.75, "all-reduces", ha="left", va="center", fontsize=8, color="#c00000")
    axes.set_xlim(-6.2, 2 * n_layer + 3)
    axes.set_ylim(len(rows) - 0.2, -1.1)
    axes.axis("off")
    axes.text(0, len(rows) - 0.3, "A attention, M MLP.  Red bar: all-reduce, after which all ranks see the "
              "same.  Orange: each rank also sees what only it has pending.", fontsize=8, color="#333333",
              va="center")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", default="schedules.png")
    parser.add_argument("--n_layer", type=int, default=12)
    args = parser.parse_args()
    if not args.out.endswith((".png", ".svg", ".pdf")) or os.path.isdir(args.out):
        raise UserError(f"--out={args.out} names no picture: end it with .png, .svg or .pdf")
    folder = os.path.dirname(args.out) or "."
    check_can_write(folder, "--out")
    os.makedirs(folder, exist_ok=True)
    draw(args.n_layer, args.out)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
