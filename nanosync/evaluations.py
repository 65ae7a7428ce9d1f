"""Periodic evaluations of a run besides the losses: samples of text, HellaSwag.

A new evaluation is a function here, an entry of EVALUATIONS, and a setting <name>_interval in the script.
"""

from collections.abc import Callable
from dataclasses import dataclass

from nanosync import hellaswag_eval, tokenizers
from nanosync.dataloader import DataSet
from nanosync.errors import UserError
from nanosync.generation import sample_text
from nanosync.run import Run


@dataclass
class Evaluation:
    """A periodic evaluation with its inputs loaded."""

    interval: int  # updates
    check: Callable  # (model) -> None; raises UserError if the model cannot be evaluated
    run: Callable  # (model) -> None; all processes call it, under autocast, with the unsharded model


def _samples(run: Run, data: DataSet) -> Evaluation:
    """Prepare to print text that the model generates after sample_prompt. DDP rank 0 generates. A stop
    request takes effect between tokens."""
    config, tokenizer = run.config, tokenizers.from_meta(data.meta)
    if len(tokenizer.encode(config["sample_prompt"])) == 0:
        raise UserError("sample_prompt is empty: give at least one character")

    def sample(model) -> None:
        text = None
        if run.processes.dp_rank == 0:
            text = sample_text(model, tokenizer, config["sample_prompt"], config["sample_tokens"],
                               config["seed"], lambda: run.asked_to_stop(run.processes.tp_group))
        if not run.stop_anywhere() and text is not None:
            run.log.sample(run.step, text)

    return Evaluation(config["sample_interval"], lambda model: None, sample)


def _hellaswag(run: Run, data: DataSet) -> Evaluation:
    """Prepare to evaluate HellaSwag. A stop request takes effect between batches."""
    config, processes = run.config, run.processes
    with hellaswag_eval.in_training():
        examples = run.on_main(
            lambda: hellaswag_eval.load(config["hellaswag_input"], setting="hellaswag_input"))
        hellaswag_eval.check_lengths(examples, config["block_size"])

    def check(model) -> None:
        with hellaswag_eval.in_training():
            hellaswag_eval.check_vocabulary(model.config.used_vocab_size, data.meta, data.folder)

    def evaluate(model) -> None:
        result = hellaswag_eval.accuracy(model, examples, config["batch_size"], processes.device,
                                         processes.dp_rank, processes.dp_size, processes.dp_group,
                                         run.stop_anywhere)
        if result is not None:
            run.log.hellaswag(run.step, **result)

    return Evaluation(config["hellaswag_interval"], check, evaluate)


EVALUATIONS = {"sample": _samples, "hellaswag": _hellaswag}  # <name>_interval is the setting


def prepare_evaluations(run: Run, data: DataSet) -> list[Evaluation]:
    """Prepare the evaluations that the settings enable, and check their inputs. Raises UserError."""
    return [prepare(run, data) for name, prepare in EVALUATIONS.items()
            if run.config.get(f"{name}_interval") and run.writes]
