"""Attention that does not cross documents, in the models and their set-up. CPU, no processes; a second.

    python -m pytest tests/unit/test_document_mask.py
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import BLOCKS, build, gradients, largest_difference, tokens, write_dataset

import model as model_module
from nanosync.dataloader import open_dataset
from nanosync.errors import UserError
from nanosync.recompute import use_activation_checkpointing

EOT = 7
MODELS = [(None, 1), (dict(block_types=BLOCKS[0]), 2), (dict(block_types=BLOCKS[3]), 2),
          (dict(block_types=BLOCKS[4]), 4), (dict(sync_strategy="grouped", layers_per_group=2), 2)]


def rows() -> torch.Tensor:
    """Three rows of 16 tokens: documents of 1 to 8 tokens; one that begins the row; none."""
    idx = tokens(3, 16)
    idx[idx == EOT] = 0
    idx[0, [3, 4, 11, 15]] = EOT
    idx[1, [0, 8]] = EOT
    return idx


def documents(row: torch.Tensor) -> list[tuple[int, int]]:
    starts = sorted({0, *(row == EOT).nonzero().flatten().tolist()})
    return list(zip(starts, [*starts[1:], len(row)]))


def each_document_alone(model, idx, y):
    """The mean loss of a model without a mask that sees each document as a sequence of its own, at the
    positions that it has in the row."""
    losses = []
    for row, targets in zip(idx, y):
        for a, b in documents(row):
            model.embed = lambda part, a=a, b=b: \
                model.transformer.wte(part) + model.transformer.wpe(torch.arange(a, b))
            logits = model(row[None, a:b], all_logits=True)[0][0]
            losses.append(F.cross_entropy(logits, targets[a:b], ignore_index=-1, reduction="sum"))
    del model.embed
    return sum(losses) / (y != -1).sum()


@pytest.mark.parametrize("schedule, R", MODELS)
@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
def test_gradients_are_those_of_each_document_alone(schedule, R, recompute):
    """fp64; sums in another order. The targets include the end-of-text token of the next document."""
    model, idx, y = build(schedule, R), rows(), tokens(3, 16, seed=5)
    y[0, :2] = -1
    expected_loss = each_document_alone(model, idx, y)
    expected = gradients(model, expected_loss)
    unmasked = model(idx, y)[1].item()
    use_activation_checkpointing(model, recompute)
    model.end_of_text = EOT
    loss = model(idx, y)[1]
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)
    assert abs(loss.item() - unmasked) > 1e-3
    assert largest_difference(gradients(model, loss), expected) < 1e-12


@pytest.mark.parametrize("schedule, R", MODELS)
def test_a_document_does_not_change_another(schedule, R):
    model, idx = build(schedule, R), rows()
    model.end_of_text = EOT
    before = model(idx, all_logits=True)[0]
    for a, b in documents(idx[0]):
        other = idx.clone()
        other[0, a:b][other[0, a:b] != EOT] = 11
        after = model(other, all_logits=True)[0]
        outside = torch.ones(16, dtype=torch.bool)
        outside[a:b] = False
        assert torch.allclose(before[0, outside], after[0, outside], rtol=0, atol=1e-13)
        assert torch.equal(before[1:], after[1:])


def test_without_the_setting_nothing_changes(monkeypatch):
    """Not one operation; and decoding ignores the mask."""
    model, idx = build(None), rows()
    expected = model(idx, idx)[1]
    model.end_of_text = EOT
    assert compare_masked_decoder(model) == compare_masked_decoder(model, None) == 0
    for name in ("first_visible", "interval_attention"):
        monkeypatch.setattr(model_module, name, None)
    model.end_of_text = None
    assert torch.equal(model(idx, idx)[1], expected)


def compare_masked_decoder(model, end_of_text: int | None = EOT) -> float:
    """Difference of the prefill's hidden states from those of a prompt without a mask."""
    model.end_of_text = None
    prompt, config = rows()[:1], model.config
    cache = torch.zeros(config.n_layer, 2, 1, config.n_head, 16, config.n_embd // config.n_head,
                        dtype=torch.float64)
    expected = model.hidden(prompt, cache)
    model.end_of_text = end_of_text
    return (model.hidden(prompt, cache) - expected).abs().max().item()


def test_the_token_that_begins_documents(tmp_path):
    counting = np.arange(300) % 26
    write_dataset(tmp_path / "chars", counting, counting, 26)
    with pytest.raises(UserError, match=r"needs an end-of-text token, and .* has none: leave document_mask"):
        open_dataset(str(tmp_path / "chars"), 16).document_token()
    folder = write_dataset(tmp_path / "named", counting, counting, 26, end_of_text=25)
    assert open_dataset(str(folder), 16).document_token() == 25
    (counting % 25).astype("<u2").tofile(folder / "train.bin")
    with pytest.raises(UserError, match=r"have no end-of-text token \(25\), so they are one document"):
        open_dataset(str(folder), 16).document_token()
    (folder / "meta.json").unlink()
    np.append(counting, 50256).astype("<u2").tofile(folder / "train.bin")
    assert open_dataset(str(folder), 16).document_token() == 50256
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "gpt2", "vocab_size": 50257}))
    assert open_dataset(str(folder), 16).document_token() == 50256
