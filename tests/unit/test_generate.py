"""Generation: the KV cache against the model without one, the sliding window, sampling. CPU; seconds.

    python -m pytest tests/unit/test_generate.py

The same code with Triton's kernels is tested in test_kernels.py, CUDA graphs by bench.py --mode=generate.
"""

import pytest
import torch
from helpers import compare_with_uncached, random_model, tokens

from nanosync.errors import UserError
from nanosync.generation import Decoder, Sampling


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prompt", [1, 7, 16, 23])
def test_cache_gives_the_logits_of_the_whole_window(bias, prompt):
    """Prefill and every step, also past block_size (16) and for prompts longer than it."""
    model = random_model(bias=bias).eval()
    decoder = Decoder(model, 3)
    # fp64: the same sums in another order
    assert compare_with_uncached(model, decoder, tokens(3, prompt), 30) < 1e-12
    assert compare_with_uncached(model, decoder, tokens(3, prompt, seed=5), 30) < 1e-12  # a used decoder


@pytest.mark.parametrize("slide", [2, 5, 16])
def test_sliding_by_more_at_once(slide):
    model = random_model().eval()
    assert compare_with_uncached(model, Decoder(model, 2, slide=slide), tokens(2, 5), 50, slide) < 1e-12


def test_greedy_is_the_most_likely_token_of_nanogpts_window():
    model = random_model().eval()
    idx = tokens(2, 4)
    out = model.generate(idx, 30, temperature=0.0)
    expected = idx
    for _ in range(30):
        expected = torch.cat((expected, model(expected[:, -16:])[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(out, expected)


def test_rows_do_not_meet():
    model = random_model().eval()
    idx = tokens(3, 5)
    together = model.generate(idx, 20, temperature=0.0)
    for row in range(3):
        assert torch.equal(model.generate(idx[row:row + 1], 20, temperature=0.0)[0], together[row])


def test_stream_and_generate_agree_and_seeds_repeat():
    model = random_model(torch.float32).eval()
    idx = tokens(2, 5)
    torch.manual_seed(3)
    whole = model.generate(idx, 25, temperature=0.9, top_k=10)
    decoder = Decoder(model, 2, temperature=0.9, top_k=10)
    torch.manual_seed(3)
    assert [list(column) for column in whole[:, 5:].T.tolist()] == list(decoder.stream(idx, 25))
    torch.manual_seed(4)
    assert not torch.equal(decoder.generate(idx, 25), whole)
    assert list(decoder.stream(idx, 0)) == [] and torch.equal(decoder.generate(idx, 0), idx)


def test_stop_token():
    model = random_model().eval()
    idx = tokens(4, 5)
    free = model.generate(idx, 40, temperature=0.0)[:, 5:]
    stop = free[0, 7].item()
    out = model.generate(idx, 40, stop_token=stop, temperature=0.0)
    ends = [row.tolist().index(stop) if stop in row else 39 for row in free]
    assert out.shape[1] == 5 + max(ends) + 1
    for row, expected, end in zip(out[:, 5:].tolist(), free.tolist(), ends):
        assert row[:end + 1] == expected[:end + 1] and set(row[end + 1:]) <= {stop}


def test_padding_is_never_sampled():
    model = random_model(torch.float32, vocab_size=64, used_vocab_size=5).eval()
    with torch.no_grad():
        model.lm_head.weight[5:] *= 100  # the model itself would choose padding
    for options in (dict(), dict(temperature=0.0), dict(top_k=50), dict(top_p=0.9)):
        assert model.generate(tokens(8, 3, vocab_size=5), 40, **options).max() < 5


def test_under_autocast_a_copy_of_the_weights_is_used():
    model = random_model(torch.float32).eval()
    with torch.autocast("cpu", torch.bfloat16):
        decoder = Decoder(model, 2)
        logits = [decoder.logits.clone() for _ in decoder.run(tokens(2, 5), 20)]
    assert decoder.model.lm_head.weight.dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.float32
    exact = Decoder(model, 2)
    for _ in exact.run(tokens(2, 5), 1):
        assert torch.allclose(logits[0], exact.logits, atol=0.1, rtol=0.1)


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])


@pytest.mark.parametrize("options, kept, temperature", [
    (dict(), [0, 1, 2, 3, 4], 1.0),
    (dict(temperature=0.5), [0, 1, 2, 3, 4], 0.5),
    (dict(top_k=2), [0, 1], 1.0),
    (dict(top_k=99), [0, 1, 2, 3, 4], 1.0),
    (dict(top_p=0.75), [0, 1], 1.0),  # probabilities 0.56, 0.21, 0.12, 0.08, 0.03
    (dict(top_p=0.5), [0], 1.0),
    (dict(top_p=1.0), [0, 1, 2, 3, 4], 1.0),
    (dict(top_k=3, top_p=0.8), [0, 1], 1.0),
    (dict(temperature=2.0, top_p=0.5), [0, 1], 2.0),
])
def test_sampling_draws_from_the_distribution(options, kept, temperature):
    """Frequencies of 40,000 draws within four standard errors of the probabilities, whatever the order."""
    n = 40_000
    torch.manual_seed(1)
    order = torch.stack([torch.randperm(5) for _ in range(7)]).repeat(-(-n // 7), 1)[:n]
    drawn = order.gather(1, Sampling(**options).draw(LOGITS[order])[:, None])[:, 0]
    probs = torch.zeros(5)
    probs[kept] = (LOGITS[kept] / temperature).softmax(0)
    frequencies = drawn.bincount(minlength=5) / n
    assert ((frequencies - probs).abs() <= 4 * (probs * (1 - probs) / n).sqrt()).all()


@pytest.mark.parametrize("options", [dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.1),
                                     dict(slide=0), dict(slide=17)])
def test_impossible_settings(options):
    with pytest.raises(UserError):
        Decoder(random_model(), 1, **options)


def test_empty_prompt():
    with pytest.raises(UserError, match="prompt is empty"):
        random_model().generate(torch.zeros(1, 0, dtype=torch.int64), 3)
