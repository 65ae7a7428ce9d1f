"""HellaSwag on several processes: shares of the examples, real TP ranks, the script. CPU, 2 gloo processes.

    python -m pytest tests/processes/test_hellaswag_processes.py
"""

import json

import torch
from helpers import HELLASWAG_RECORDS as RECORDS
from helpers import MODEL_KINDS as KINDS
from helpers import build, needs_gpt2_tokenizer, random_model, run_processes, torchrun, write_lines
from helpers import random_hellaswag as random_examples
from helpers import save_random_model as save

from models import weights
from nanosync import hellaswag_eval as hellaswag
from nanosync.hellaswag_eval import accuracy, make_rows
from nanosync.ranks import Ranks
from nanosync.token_losses import token_losses

CPU = torch.device("cpu")


def check_processes(rank: int, world: int) -> None:
    """Shares of the examples; real ranks of one model, which see the same batches."""
    group = torch.distributed.group.WORLD
    for kind in KINDS:
        model, examples = build(kind, 2), random_examples(13)
        alone = accuracy(model, examples, 3, CPU)
        for batch_size in (1, 3, 12, 50):  # 7 and 6 examples: 7, 3, 1 and 1 batches on each
            assert accuracy(model, examples, batch_size, CPU, rank, world, group) == alone
        for n in (1, 15, 17):  # the second process has no batch, and after the last stop() an empty one
            expected = accuracy(model, random_examples(n), 1, CPU)
            assert accuracy(model, random_examples(n), 1, CPU, rank, world, group,
                            stop=lambda: stop_together(group)) == expected
        assert accuracy(model, random_examples(15), 1, CPU, rank, world, group,
                        stop=lambda: stop_together(group, rank == 1)) is None
        if kind is None:
            continue
        rows = make_rows(examples, 16)
        simulated = token_losses(model.eval(), *rows, CPU)
        model.place(Ranks(1, group))
        assert (token_losses(model, *rows, CPU) - simulated).abs().max() < 1e-12
        assert accuracy(model, examples, 4, CPU) == alone


def stop_together(group, wanted: bool = False) -> bool:
    """Return True if any process wants to stop; hangs unless all processes call it."""
    flag = torch.tensor(float(wanted))
    torch.distributed.all_reduce(flag, group=group)
    return bool(flag)


def test_processes(tmp_path):
    run_processes(2, check_processes, tmp_path)


def line_of(result: dict) -> str:
    acc, acc_norm, n = result.values()
    return f"HellaSwag: acc {acc:.4f}, acc_norm {acc_norm:.4f} on {n} examples\n"


def test_script(run_script, tmp_path):
    """A checkpoint; its weights under another schedule, on real ranks; a Hugging Face folder."""
    needs_gpt2_tokenizer()
    shape = dict(vocab_size=50304, used_vocab_size=50257, n_embd=8, block_size=32, dropout=0.1)
    model = random_model(torch.float32, **shape).eval()
    save(tmp_path / "run", 3, model=model, val_loss=1.0, meta={"tokenizer": "gpt2", "vocab_size": 50257})
    records = [RECORDS[i % 4] | {"label": label} for i in range(4) for label in range(4) if i != label][:11]
    path = write_lines(tmp_path / "x.jsonl", records)
    examples = hellaswag.load(path)
    result = accuracy(model, examples, 4, CPU)
    options = (f"--input={path}", "--device=cpu", "--batch_size=2")
    found = run_script("hellaswag.py", "--out_dir=run", *options, "--json=result.json")
    assert (found.code, found.err) == (0, "")
    assert found.out == f"run/ckpt/step-00000003: step 3, val loss 1.0000\n{line_of(result)}"
    written = json.loads((tmp_path / "result.json").read_text())
    assert {key: written[key] for key in result} == result and written["config"]["batch_size"] == 2
    assert (written["weights"], written["step"]) == ("run/ckpt/step-00000003", 3)
    dropped = weights.with_ranks(model, 2, ["parallel"] * 2)
    expected = accuracy(dropped, examples, 4, CPU)
    real = torchrun(2, "hellaswag.py", "--init_from=run", *options, "--tp_size=2", "--tp_processes=2",
                    "--block_types=['parallel']*2", cwd=tmp_path)
    assert real.code == 0, real.err
    assert "was trained as the dense function and is run as 1 syncs on 2 ranks" in real.out
    assert real.out.endswith(line_of(expected))
    model.save_pretrained(str(tmp_path / "hf"))
    of_folder = run_script("hellaswag.py", "--init_from=hf", *options, "--n_examples=5")
    assert of_folder.out == line_of(accuracy(model, examples[:5], 4, CPU))
