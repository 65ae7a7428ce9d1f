"""The picture of training logs, and how these are read: resumed runs joined, a last line half written, losses
that are no number, all that a user can get wrong. CPU; seconds.

    python -m pytest tests/unit/test_visualize_training.py
"""

import os

import numpy as np
import pytest
from helpers import write_log as write

import visualize_training
from nanosync.errors import UserError
from nanosync.run_log import read_log


def start(time: float, resumed: bool = False) -> dict:
    return {"event": "start", "time": time, "config": {"n_layer": 2}, "environment": {}, "resumed": resumed}


def iteration(step: int, loss: float | None, mfu: float | None = None) -> dict:
    return {"event": "iter", "step": step, "loss": loss, "lr": 1e-3, "norm": loss, "seconds": 0.1,
            "tokens_per_second": 100.0 + step, "mfu": mfu, "epoch": 0}


def evaluation(step: int, loss: float | None) -> dict:
    return {"event": "eval", "step": step, "train_loss": loss, "val_loss": loss, "lr": 1e-3}


def saved(step: int, loss: float | None) -> dict:
    return {"event": "checkpoint", "step": step, "path": "", "val_loss": loss}


def end(step: int) -> dict:
    return {"event": "end", "step": step, "status": "finished"}


def said(events: list[dict]) -> list[tuple]:
    """Return kind, step and loss of the events, without a loss for events that have none."""
    return [(e["event"], e["step"], *[e[k] for k in ("loss", "val_loss") if k in e])
            for e in events if "step" in e]


FIRST = (start(1), evaluation(0, 4.0), iteration(0, 4.0), iteration(5, 3.5), evaluation(10, 3.0),
         saved(10, 3.0), iteration(10, 3.0), iteration(15, 2.5), evaluation(20, 2.0), end(20))


def test_a_resumed_run_has_each_step_once(tmp_path):
    """The later log wins from where it goes on, also over steps that it did not get to."""
    write(tmp_path / "run_b.jsonl", *FIRST)
    write(tmp_path / "run_a.jsonl", start(2, True), iteration(10, 3.1), iteration(12, 2.9))
    events = read_log(str(tmp_path))
    assert said(events) == [("eval", 0, 4.0), ("iter", 0, 4.0), ("iter", 5, 3.5), ("eval", 10, 3.0),
                            ("checkpoint", 10, 3.0), ("iter", 10, 3.1), ("iter", 12, 2.9)]
    paths = [os.path.basename(e["path"]) for e in events if e["event"] == "start"]
    assert paths == ["run_b.jsonl", "run_a.jsonl"]
    assert len(said(read_log(str(tmp_path / "run_a.jsonl")))) == 2


def test_a_resumed_run_that_evaluates_first(tmp_path):
    write(tmp_path / "run_1.jsonl", *FIRST)
    write(tmp_path / "run_2.jsonl", start(2, True), evaluation(20, 1.9), saved(20, 1.9), end(20))
    assert said(read_log(str(tmp_path)))[-4:] == [
        ("iter", 15, 2.5), ("eval", 20, 1.9), ("checkpoint", 20, 1.9), ("end", 20)]


def test_a_run_resumed_with_nothing_left_to_do_or_not_yet_begun(tmp_path):
    write(tmp_path / "run_1.jsonl", *FIRST)
    write(tmp_path / "run_2.jsonl", start(2, True), {"event": "end", "step": 20})
    write(tmp_path / "run_3.jsonl", rest='{"event": "sta')
    assert said(read_log(str(tmp_path))) == [*said([*FIRST]), ("end", 20)]


def test_a_new_run_in_the_folder_starts_over(tmp_path):
    write(tmp_path / "run_1.jsonl", *FIRST)
    write(tmp_path / "run_2.jsonl", start(2), iteration(0, 4.5))
    assert said(read_log(str(tmp_path))) == [("iter", 0, 4.5)]


def test_the_picture_has_what_it_says(tmp_path):
    logs = [write(tmp_path / name / "run_1.jsonl", *FIRST, iteration(25, 1e9)) for name in ("one", "two")]
    runs = [visualize_training.read_run(str(log)) for log in logs]
    figure = visualize_training.draw(runs)
    axes = {one.get_ylabel().split(" ")[0]: one for one in figure.axes}
    assert set(axes) == {"loss", "learning", "gradient", "throughput", "share"}
    assert axes["loss"].get_ylim()[1] == 6.0 and "cut off" in axes["loss"].get_ylabel()
    ticks = [line for line in axes["loss"].lines if line.get_marker() == "|"]
    assert [list(line.get_xdata()) for line in ticks] == [[10], [10]]
    assert ticks[1].get_ydata() < ticks[0].get_ydata() < 2.0  # a row each, below the curves
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(texts) == 2 and "2.0000 at step 20" in texts[0]
    runs[0].iterations["mfu"][:] = 0.5
    mfu = visualize_training.draw(runs).axes
    assert "MFU (%)" in [one.get_ylabel() for one in mfu]


def test_hellaswag_is_drawn_for_the_runs_that_have_it(tmp_path):
    scores = [{"event": "hellaswag", "step": step, "acc": 0.2, "acc_norm": acc, "n": 100}
              for step, acc in ((5, 0.25), (10, None), (20, 0.31))]
    write(tmp_path / "a" / "run_1.jsonl", *FIRST[:-1], *scores)
    write(tmp_path / "b" / "run_1.jsonl", *FIRST)
    figure = visualize_training.draw([visualize_training.read_run(str(tmp_path / name)) for name in "ab"])
    (axes,) = (one for one in figure.axes if one.get_ylabel() == "HellaSwag acc_norm (%)")
    curves = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert list(curves[0].get_xdata()) == [5, 10, 20] and not len(curves[1].get_xdata())
    np.testing.assert_allclose(curves[0].get_ydata(), [25, np.nan, 31])


def test_a_long_run_is_not_dwarfed_by_its_first_steps(tmp_path):
    losses = [3.0 + 8 / (i + 1) for i in range(500)]
    log = write(tmp_path / "run_1.jsonl", start(1), evaluation(0, 11.0),
                *[iteration(i, loss) for i, loss in enumerate(losses)])
    axes = visualize_training.draw([visualize_training.read_run(str(log))]).axes[0]
    assert losses[20] < axes.get_ylim()[1] < losses[5] and "cut off" in axes.get_ylabel()


@pytest.mark.parametrize("names, steps", [("a", 1), ("a", 3), ("abc", 20), ("abcdefghijkl", 20)])
def test_every_panel_has_room(tmp_path, names, steps):
    """Pictures of few steps, with norms inside one power of 10, and of many runs with long names."""
    runs = []
    for name in names:
        log = write(tmp_path / (name * 40) / "run_1.jsonl", start(1), evaluation(0, 4.0),
                    *[iteration(i, 6.9 - i / 10, 0.5) for i in range(steps)])
        runs.append(visualize_training.read_run(str(log.parent)))
    figure = visualize_training.draw(runs)
    figure.draw_without_rendering()
    assert min(one.get_position().height for one in figure.axes) > 0.12
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= figure.bbox.width


def test_iterations_are_whole_also_of_one_point(tmp_path):
    write(tmp_path / "run_1.jsonl", start(1), iteration(0, 6.9, 0.5))
    figure = visualize_training.draw([visualize_training.read_run(str(tmp_path))])
    panels = [one for one in figure.axes if one.get_xlabel() == "iteration"]
    assert len(panels) == 5
    for one in panels:
        low, high = one.get_xlim()
        assert [tick for tick in one.get_xticks() if low <= tick <= high] == [0], one.get_ylabel()


def test_running_mean():
    values = np.arange(200.0)
    values[50] = float("nan")
    mean = visualize_training.smoothed(values)
    assert mean[100] == 100 and np.isnan(mean[50]) and mean[49] < 49
    assert np.isfinite(mean).sum() == 199


def test_a_picture_that_cannot_be_written_whole(tmp_path, monkeypatch):
    class Figure:
        def savefig(self, path, **_):
            open(path, "w").close()
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        visualize_training.save(Figure(), str(tmp_path / "new" / "x.png"))
    assert not list(tmp_path.iterdir())
