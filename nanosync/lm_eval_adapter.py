"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), for any model.

The library is optional. It makes three kinds of requests of a task's examples, which TextModel answers:

    loglikelihood          log-probability of a continuation after a context; is it the most likely one?
    loglikelihood_rolling  log-probability of a text, in windows of block_size tokens
    generate_until         a continuation up to a stop text

Windows, truncation on the left and the token before a text are those of the library's own backend for
transformers, so a model and its export have the same results. Probabilities are over the used vocabulary,
because an export has no padding rows.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable

import numpy as np
import torch

from nanosync.distributed import all_values
from nanosync.errors import UserError
from nanosync.files import ROOT, first_line
from nanosync.hellaswag_eval import LENGTH_STEP
from nanosync.token_losses import token_losses

NEW_TOKENS = 256  # most tokens of a continuation if a task does not say; the library's default


class TextModel:
    """A model with its tokenizer, for texts in place of tokens.

    All processes get all requests, in the same order. Each DDP rank answers its share.
    """

    def __init__(self, model, tokenizer, end_of_text: int | None, batch_size: int, device: torch.device,
                 dp_rank: int = 0, dp_size: int = 1, dp_group=None):
        """Keep a model in eval mode; the caller chooses the autocast of every call.

        end_of_text: token with which documents begin. Without it a text begins after a newline or token 0.
        batch_size: sequences of a batch.
        """
        super().__init__()
        self.text_model, self.text_tokenizer, self.end_of_text = model, tokenizer, end_of_text
        self.sequences, self.torch_device = batch_size, device
        self.share, self.shares, self.share_group = dp_rank, dp_size, dp_group
        self.longest, self.used = model.config.block_size, model.config.used_vocab_size
        self.prefix, self.decoders = 0 if end_of_text is None else end_of_text, {}
        if end_of_text is None and "\n" in getattr(tokenizer, "chars", ""):
            self.prefix = tokenizer.chars.index("\n")

    def loglikelihood(self, requests, **_) -> list[tuple[float, bool]]:
        """Return (log-probability, True if greedy decoding gives it) of each (context, continuation)."""
        return self._divided(lambda mine: self._scores([self._pair(*r.args) for r in mine]), requests)

    def loglikelihood_rolling(self, requests, **_) -> list[float]:
        """Return the log-probability of each (text,)."""
        return self._divided(self._rolling, requests)

    def generate_until(self, requests, **_) -> list[str]:
        """Return a continuation of each (context, options)."""
        return self._divided(lambda mine: [self._generate(*r.args) for r in mine], requests)

    def _divided(self, answer: Callable, requests: list) -> list:
        """Answer this DDP rank's share of the requests; return the answers to all of them."""
        shares = all_values(answer(requests[self.share::self.shares]), self.share_group)
        answers = [None] * len(requests)
        for i, share in enumerate(shares):
            answers[i::self.shares] = share
        return answers

    def _encode(self, text: str) -> list[int]:
        """Return the tokens of a text. Raises UserError for a token that the model lacks."""
        tokens = self.text_tokenizer.encode(text).tolist()
        if tokens and max(tokens) >= self.used:
            raise UserError(f"a task has token {max(tokens)}, but the model has only tokens 0 to "
                            f"{self.used - 1}: evaluate a model that was trained with this tokenizer")
        return tokens

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a context and of a continuation. Spaces between them belong to the latter."""
        if not context:
            return [self.prefix], self._encode(continuation)
        stripped = context.rstrip()
        whole, context_tokens = self._encode(context + continuation), self._encode(stripped)
        return context_tokens or [self.prefix], whole[len(context_tokens):]

    def _rolling(self, requests) -> list[float]:
        pairs, counts = [], []
        for request in requests:
            tokens = [self.prefix, *self._encode(request.args[0])]
            ends = range(1, len(tokens), self.longest)
            for start in ends:
                end = min(start + self.longest, len(tokens))
                first = max(0, end - self.longest - 1)  # as much context as a window has room for
                pairs.append((tokens[first:start], tokens[start:end]))
            counts.append(len(ends))
        scores = [score for score, _ in self._scores(pairs)]
        return [sum(scores[end - n:end], 0.0) for end, n in zip(np.cumsum(counts), counts)]

    def _scores(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return (log-probability, greedy) of each (context, continuation) in tokens.

        Contexts that do not fit lose tokens on the left. Raises UserError if a continuation does not fit.
        """
        for _, continuation in pairs:
            if len(continuation) > self.longest:
                raise UserError(f"a task has a continuation of {len(continuation)} tokens, and block_size is "
                                f"{self.longest}: leave the task out")
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))  # the longest first
        answers = [None] * len(pairs)
        for start in range(0, len(order), self.sequences):
            batch = order[start:start + self.sequences]
            for i, answer in zip(batch, self._batch([pairs[i] for i in batch])):
                answers[i] = answer
        return answers

    def _batch(self, pairs: list) -> list[tuple[float, bool]]:
        rows = [(context + continuation)[-self.longest - 1:] for context, continuation in pairs]
        longest = max(map(len, rows)) - 1
        T = max(1, min(-(-longest // LENGTH_STEP) * LENGTH_STEP, self.longest))
        idx, targets = torch.zeros(len(rows), T, dtype=torch.int64), torch.full((len(rows), T), -1)
        for i, (row, (_, continuation)) in enumerate(zip(rows, pairs)):
            t, n = len(row) - 1, len(continuation)
            idx[i, :t] = torch.tensor(row[:-1], dtype=torch.int64)
            targets[i, t - n:t] = torch.tensor(continuation, dtype=torch.int64)
        greedy = torch.ones(len(rows), T, dtype=torch.bool, device=self.torch_device)
        losses = token_losses(self.text_model, idx, targets, self.torch_device, self.used, greedy)
        return list(zip((-losses.sum(dim=1)).tolist(), greedy.all(dim=1).tolist()))

    def _generate(self, context: str, options: dict) -> str:
        """Continue a context; return the text before the first stop text."""
        until = options.get("until") or []
        stops = [text for text in ([until] if isinstance(until, str) else until) if text]
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        most = int(next((options[name] for name in names if options.get(name) is not None), NEW_TOKENS))
        temperature = float(options.get("temperature") or 0.0)
        if options.get("do_sample", temperature > 0) is False:
            temperature = 0.0
        elif options.get("do_sample") and "temperature" not in options:
            temperature = 1.0
        sampling = {"temperature": temperature, **{name: options[name] for name in ("top_k", "top_p")
                                                   if temperature > 0 and options.get(name)}}
        kept = self.longest - most if most < self.longest else self.longest  # else the window slides
        tokens = (self._encode(context) or [self.prefix])[-kept:]
        decoder = self._decoder(sampling)
        text, to_text = "", self.text_tokenizer.stream()
        for (token,) in decoder.stream(torch.tensor([tokens], device=self.torch_device), most):
            if token == self.end_of_text:
                break
            text += to_text(token)
            if any(stop in text for stop in stops):
                break
        return text[:min([text.find(stop) for stop in stops if stop in text], default=None)]

    def _decoder(self, sampling: dict):
        """Return a decoder, which can be used again: under autocast it has its own copy of the weights."""
        key = tuple(sampling.items())
        if key not in self.decoders:
            self.decoders = {key: self.text_model.decoder(1, **sampling)}  # keep the one in use
        return self.decoders[key]


class Tasks:
    """Tasks of the library by name."""

    def __init__(self, names: str, folder: str = ""):
        """Find the tasks. Raises UserError if the library is not installed, or lacks a task.

        names: comma-separated. folder: further tasks of the user, YAML files as the library reads them.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(f"lm_eval={names} needs lm-evaluation-harness, which is not installed: pip "
                            f"install lm_eval, or leave lm_eval out")
        _import_evaluate()
        from lm_eval.tasks import TaskManager

        self.names = [name.strip() for name in names.split(",") if name.strip()]
        self.manager = TaskManager(include_path=folder or None)
        unknown = [name for name in self.names if not self.manager.match_tasks([name])]
        if unknown or not self.names:
            raise UserError(f"lm_eval={names}: lm-evaluation-harness has no task "
                            f"{', '.join(unknown) or repr(names)}: `lm_eval ls tasks` lists its tasks; give "
                            f"your own with --lm_eval_path=FOLDER")

    def model(self, *args) -> TextModel:
        """Make a TextModel that the library accepts. args: those of TextModel."""
        from lm_eval.api.model import LM

        return type("NanoSync", (TextModel, LM), {})(*args)

    def evaluate(self, model, few_shot: int | None = None, limit: int | None = None) -> dict | None:
        """Return the results by task, {metric: value}, None on processes that do not print.

        Raises UserError if a task's data set cannot be read.

        model: result of the method `model`.
        few_shot: examples in each prompt, None for the task's own number.
        limit: examples of each task, None for all.
        """
        from lm_eval import simple_evaluate

        try:
            found = simple_evaluate(model=model, tasks=self.manager.match_tasks(self.names),
                                    num_fewshot=few_shot, limit=limit, task_manager=self.manager,
                                    log_samples=False)
        except OSError as e:
            raise UserError(f"a task of lm_eval={','.join(self.names)} cannot read its data set "
                            f"({type(e).__name__}: {first_line(e)}): with a network, the library downloads "
                            f"it at first use") from None
        if found is None:
            return None
        return {task: _numbers(values) for task, values in found["results"].items()}


def _import_evaluate() -> None:
    """Import the package `evaluate`, which the library uses for some metrics, before the library does.

    The repository's script evaluate.py has the same name, and its folder comes first on the path. The name is
    blocked if the package is not installed.
    """
    if "evaluate" in sys.modules:
        return
    path = list(sys.path)
    sys.path[:] = [folder for folder in path if os.path.realpath(folder or ".") != os.path.realpath(ROOT)]
    try:
        importlib.import_module("evaluate")
    except ImportError:
        sys.modules["evaluate"] = None
    finally:
        sys.path[:] = path


def _numbers(values: dict) -> dict:
    """Return the metrics of a task that are numbers, without the name of the filter that most have."""
    return {name.removesuffix(",none"): value for name, value in values.items()
            if isinstance(value, (int, float)) and name != "sample_len"}


def lines(results: dict) -> list[str]:
    """Return the lines that evaluate.py prints, one a task."""
    found = []
    for task, values in results.items():
        parts = []
        for name, value in values.items():
            metric, comma, rest = name.partition(",")
            error = values.get(f"{metric}_stderr{comma}{rest}")
            if not metric.endswith("_stderr"):
                said = "" if error is None else f" (standard error {error:.4f})"
                parts.append(f"{name} {value:.4f}{said}")
        found.append(f"lm_eval {task}: {', '.join(parts)}")
    return found
