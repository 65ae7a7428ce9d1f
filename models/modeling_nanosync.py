"""Models of nanoSync that no class of transformers has: TP ranks that synchronise less often, and the
speedruns.

convert.py copies this file into an exported folder, and transformers loads it from there:

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

It needs torch and transformers only. The forward pass is plain PyTorch for any device. All TP ranks run in
this process. There is no key-value cache: each new token runs the whole context, the last block_size tokens.
A batch of prompts must be of one length.

Shapes: B sequences, T tokens, C channels, H heads, D = C / H, R TP ranks. Parameters have nanoSync's names.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

EPS = 1e-6  # of rms_norm
GATE = 12  # channels that a gate of the fast speedrun reads
LEVELS = 6  # of matches in the fast speedrun: 1, 2, 4, 8, 16 and 32 tokens
TABLES = {"bigram": "pairs", "trigram": "triples"}  # of the fast speedrun: setting -> parameter


class NanoSyncConfig(PretrainedConfig):
    """The `model` entry of a checkpoint, and the sync schedule."""

    model_type = "nanosync"

    def __init__(self, kind: str = "gpt", architecture: dict | None = None, schedule: dict | None = None,
                 untied: bool = False, **options):
        """Store the description of a model.

        kind: 'gpt', 'speedrun_gpt' or 'fast_gpt'; architecture: its fields.
        schedule: {"ranks", "width", "sublayers": [{"sync", "delay", "sees"}, ...]}; None: one rank.
        untied: True if the head of a fast_gpt is a matrix of its own.
        """
        options.setdefault("tie_word_embeddings", False)  # tied heads are no parameters here
        options["use_cache"] = False
        super().__init__(**options)
        self.kind, self.architecture, self.untied = kind, dict(architecture or {}), untied
        self.schedule = schedule
        a = self.architecture
        self.vocab_size = a.get("used_vocab_size", 0)
        self.hidden_size, self.num_hidden_layers = a.get("n_embd", 0), a.get("n_layer", 0)
        self.num_attention_heads = a.get("n_head", 0)
        self.max_position_embeddings = a.get("block_size", a.get("sequence_length", 0))


def rms_norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


def relu_squared(x):
    return F.relu(x).square()


def rotate(x, cos, sin):
    """Rotate x (B, T, H, D) by cos and sin (T, D / 2)."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x.dtype)


def hashed(idx, begins, n: int, rows: int):
    """Return the row of each token and the n - 1 before it, (B, T); the last if a document begins between.

    begins: True where a document begins, (B, T).
    """
    T, idx = idx.size(1), idx.long()  # products exceed int32
    row, alone = 36313 * idx, begins | (torch.arange(T, device=idx.device) < n - 1)
    for back, factor in zip(range(1, n), (27191, 50591)):
        row = row ^ (factor * F.pad(idx, (back, 0))[:, :T])
        if back < n - 1:
            alone = alone | F.pad(begins, (back, 0))[:, :T]
    return torch.where(alone, rows - 1, row % (rows - 1))


def suffix_matches(idx, document):
    """Return the token after the longest match of each position, and its level, 0 without one, (B, T) each.

    A match of level i + 1 is the last earlier position up to which the 2**i tokens are the same. document:
    first token of each token's document, (B, T).
    """
    T, keys, token, level = idx.size(1), idx, torch.zeros_like(idx), torch.zeros_like(idx)
    for i in range(LEVELS):
        ordered = (keys * T + torch.arange(T, device=keys.device)).sort(dim=1).values
        order, ordered = ordered % T, ordered // T
        same = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
        before = torch.where(same, order.roll(1, dims=1), -1)
        previous = torch.empty_like(order).scatter(1, order, before)
        ranks = torch.empty_like(order).scatter(1, order, (~same).cumsum(1) - 1)
        matches = previous - (2**i - 1) >= document
        token = torch.where(matches, idx.gather(1, previous + 1), token)
        level = torch.where(matches, i + 1, level)
        keys = ranks * T + F.pad(ranks, (2**i, 0))[:, :T]  # the same for the same 2**(i + 1) tokens
    return token, level


def attend(q, k, v, mask=None, scale: float | None = None):
    """Attend: q, k, v (B, T, H, D) -> (B, T, H * D). mask: (B, T, T) bool; None for all tokens before."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask[:, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return y.transpose(1, 2).flatten(2)


def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)


class Stream:
    """The residual stream of R ranks: what they share, and what each has not sent or is in flight."""

    def __init__(self, base, ranks: int, width: int):
        """Begin with the embeddings (B, T, C). width: number of channels that are synchronised."""
        self.base, self.width, self.flight = base, width, []
        self.pending = base.new_zeros(ranks, *base.shape)  # (R, B, T, C)

    def read(self, number: int, sees: float):
        """Let packets land that are due before a sublayer; return what its ranks read, (R, B, T, C)."""
        landing = [packet for due, packet in self.flight if due <= number]
        self.flight = [(due, packet) for due, packet in self.flight if due > number]
        self.base = self.base + sum((self.whole(packet.sum(0)) for packet in landing), 0.0)
        unsent = self.pending + sum((self.whole(packet) for _, packet in self.flight), 0.0)
        return self.base + sees * unsent

    def add(self, number: int, outputs, bias, sync: bool, delay: int):
        """Add a sublayer's partial outputs (R, B, T, C) and its bias (C,), which is added once."""
        self.pending = self.pending + outputs
        if bias is not None:
            self.base = self.base + bias
        if sync:
            self.flight.append((number + 1 + delay, self.pending[..., :self.width]))
            self.pending = torch.cat((torch.zeros_like(self.pending[..., :self.width]),
                                      self.pending[..., self.width:]), dim=-1)

    def close(self):
        return self.base + self.pending.sum(0) + sum((self.whole(p.sum(0)) for _, p in self.flight), 0.0)

    def whole(self, part):
        return F.pad(part, (0, self.base.size(-1) - self.width))


def partial_outputs(x, block, n_head: int, ranks: int, attention: bool, mix):
    """Return each rank's output of a sublayer without its bias: x (R, B, T, C) -> (R, B, T, C).

    mix: function (q, k, v) (B, T, H / R, D) -> (B, T, C / R) of attention; activation of an MLP.
    """
    C = x.size(-1)
    first = block.attn.c_attn if attention else block.mlp.c_fc
    second = (block.attn if attention else block.mlp).c_proj
    weights = first.weight.view(3 if attention else 1, -1, C)
    biases = None if first.bias is None else first.bias.view(3 if attention else 1, -1)
    size, outputs = weights.size(1) // ranks, []
    for r in range(ranks):
        rows = slice(r * size, (r + 1) * size)
        bias = None if biases is None else biases[:, rows].flatten()
        h = F.linear(x[r], weights[:, rows].flatten(0, 1), bias)
        if attention:
            y = mix(*h.unflatten(-1, (3, n_head // ranks, C // n_head)).unbind(2))
        else:
            y = mix(h)
        outputs.append(F.linear(y, second.weight[:, rows]))
    return torch.stack(outputs)


class Block(nn.Module):
    """Weights of a layer of GPT-2, or without norms and biases of the speedrun."""

    def __init__(self, C: int, bias: bool, norms: bool):
        super().__init__()
        if norms:
            self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=bias), nn.LayerNorm(C, bias=bias)
        self.attn = nn.ModuleDict(dict(c_attn=linear(C, 3 * C, bias), c_proj=linear(C, C, bias)))
        self.mlp = nn.ModuleDict(dict(c_fc=linear(C, 4 * C, bias), c_proj=linear(4 * C, C, bias)))


class Gate(nn.Module):
    """A number between 0 and 1 for each head, from the first channels of a stream."""

    def __init__(self, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, GATE))

    def forward(self, x):
        return F.linear(x[..., :GATE], self.weight).sigmoid()


class FastBlock(Block):
    """Weights of a layer of the fast speedrun."""

    def __init__(self, a: dict, layer: int):
        super().__init__(a["n_embd"], bias=False, norms=False)
        self.factors = nn.Parameter(torch.zeros(4))
        if a["attention_gate"]:
            self.attn["gate"] = Gate(a["n_head"])
        if layer in a["value_layers"]:
            self.attn["value_gate"] = Gate(a["n_head"])
        if layer in a["exclusive_layers"]:
            self.attn.own_share = nn.Parameter(torch.zeros(a["n_head"]))


class NanoSyncForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanoSyncConfig
    _supports_sdpa = True

    def __init__(self, config: NanoSyncConfig):
        super().__init__(config)
        a = config.architecture
        V, C, L = a["vocab_size"], a["n_embd"], a["n_layer"]
        self.transformer = nn.ModuleDict(dict(wte=nn.Embedding(V, C)))
        if config.kind == "gpt":
            self.transformer["wpe"] = nn.Embedding(a["block_size"], C)
            self.transformer["h"] = nn.ModuleList([Block(C, a["bias"], norms=True) for _ in range(L)])
            self.transformer["ln_f"] = nn.LayerNorm(C, bias=a["bias"])
        elif config.kind == "speedrun_gpt":
            self.transformer["h"] = nn.ModuleList([Block(C, bias=False, norms=False) for _ in range(L)])
        else:
            self.transformer["h"] = nn.ModuleList([FastBlock(a, i) for i in range(L)])
            self._fast_parameters(a)
        self.post_init()

    def _fast_parameters(self, a: dict) -> None:
        V, C = a["vocab_size"], a["n_embd"]
        self.lm_head = linear(C, V)
        self.values = nn.ParameterDict({name: torch.zeros(V, C)
                                        for name in sorted(set(self._tables(a).values()))})
        for setting, name in TABLES.items():
            if a.get(setting):
                self.register_parameter(name, nn.Parameter(torch.zeros(5 * V, C)))
        if a.get("suffix_match"):
            self.match = nn.ParameterDict(dict(shares=torch.zeros(a["n_layer"], LEVELS),
                                               rows=torch.zeros(LEVELS, C)))
        if a["smear"]:
            self.smear, self.smear_factor = Gate(1), nn.Parameter(torch.zeros(1))

    @staticmethod
    def _tables(a: dict) -> dict[int, str]:
        """Return layer -> name of the table that the layer adds to its values."""
        layers = sorted(set(a["value_layers"]))
        return {i: str(layers[n % (a["value_tables"] or len(layers))]) for n, i in enumerate(layers)}

    def get_input_embeddings(self):
        return self.transformer["wte"]

    def _init_weights(self, module) -> None:
        """Do nothing: all parameters are in the file."""

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **_):
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        """Map token ids (B, T) to logits of the used vocabulary; only the last block_size tokens are run."""
        if attention_mask is not None and attention_mask.dim() == 2 and not attention_mask.bool().all():
            raise ValueError("padding is not supported: give prompts of one length, or one prompt at a time")
        idx = input_ids[:, -self.config.max_position_embeddings:]
        x = {"gpt": self.gpt, "speedrun_gpt": self.speedrun, "fast_gpt": self.fast}[self.config.kind](idx)
        head = self.lm_head if self.config.untied else self.transformer["wte"]
        logits = F.linear(x, head.weight[:self.config.vocab_size])
        if self.config.architecture.get("softcap"):
            logits = 23.0 * ((logits.float() + 5.0) / 7.5).sigmoid()
        loss = None
        if labels is not None:
            targets = labels[:, -self.config.max_position_embeddings:][:, 1:]
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def _schedule(self, C: int) -> tuple[int, int, list[dict]]:
        """Return ranks, width and sublayers; without a schedule, one rank that synchronises everywhere."""
        L = self.config.architecture["n_layer"]
        s = self.config.schedule or {"ranks": 1, "width": C, "sublayers": [{"sync": True}] * (2 * L)}
        return s["ranks"], s["width"], [{"delay": 0, "sees": 1.0} | sublayer for sublayer in s["sublayers"]]

    def _run(self, base, norms, mixers):
        """Run all sublayers by the schedule; return the stream (B, T, C).

        norms: function (layer, attention) -> norm; mixers: of attention and MLP, see partial_outputs.
        """
        ranks, width, sublayers = self._schedule(base.size(-1))
        stream, n_head = Stream(base, ranks, width), self.config.architecture["n_head"]
        for j, sublayer in enumerate(sublayers):
            block, attention = self.transformer["h"][j // 2], j % 2 == 0
            x = norms(block, attention)(stream.read(j, sublayer["sees"]))
            y = partial_outputs(x, block, n_head, ranks, attention, mixers[j % 2])
            bias = (block.attn if attention else block.mlp)["c_proj"].bias
            stream.add(j, y, bias, sublayer["sync"], sublayer["delay"])
        return stream.close()

    def gpt(self, idx):
        """GPT-2 with a sync schedule: hidden states (B, T, C)."""
        t = self.transformer
        x = t["wte"](idx) + t["wpe"](torch.arange(idx.size(1), device=idx.device))
        x = self._run(x, lambda block, attention: block.ln_1 if attention else block.ln_2,
                      (attend, lambda h: F.gelu(h, approximate="tanh")))
        return t["ln_f"](x)

    def _rotations(self, T: int, speeds):
        angles = torch.outer(torch.arange(T), speeds).to(self.transformer["wte"].weight.device)
        return angles.cos(), angles.sin()

    def speedrun(self, idx):
        """The speedrun's GPT: rotary embedding, norms without weights, ReLU squared."""
        a = self.config.architecture
        D = a["n_embd"] // a["n_head"]
        cos, sin = self._rotations(idx.size(1), 10000 ** -(torch.arange(0, D, 2) / D))

        def mix(q, k, v):
            return attend(rotate(rms_norm(q), cos, sin), rotate(rms_norm(k), cos, sin), v)

        x = self.transformer["wte"](idx)
        if a["variant"] != "palm":
            return rms_norm(self._run(x, lambda block, attention: rms_norm, (mix, relu_squared)))
        for block in self.transformer["h"]:
            y = rms_norm(x)[None]
            outputs = (partial_outputs(y, block, a["n_head"], 1, attention, mixer)[0]
                       for attention, mixer in ((True, mix), (False, relu_squared)))
            x = x + sum(outputs) * 2**-0.5
        return rms_norm(x)

    def fast(self, idx):
        """The fast speedrun's GPT: windows, gates, and tables of values, pairs and triples."""
        a, tables, T = self.config.architecture, self._tables(self.config.architecture), idx.size(1)
        D, half = a["n_embd"] // a["n_head"], a["half_rotary"]
        turning = D // 4 if half else D // 2
        speeds = 1024 ** -(torch.arange(turning) / max(1, turning - 1))
        rotations = self._rotations(T, torch.cat((speeds, torch.zeros(D // 2 - turning))))
        eot = a["end_of_text"]
        begins = torch.zeros_like(idx, dtype=torch.bool) if eot is None else idx == eot  # of documents
        x, ngram = self._fast_embedding(idx, begins)
        x0 = x = rms_norm(x)
        middle, at = None, (2 * a["n_layer"] - 1) // 3
        t = torch.arange(T, device=idx.device)
        document = torch.where(begins, t, 0).cummax(dim=1).values  # first token of each token's document
        match = self._fast_match(idx, document) if a.get("suffix_match") else None
        for i, block in enumerate(self.transformer["h"]):
            first = torch.maximum(document, t - (a["windows"][i in a["long_layers"]] - 1))
            mask = (t[None, None] >= first[:, :, None]) & (t[None, None] <= t[None, :, None])  # (B, T, T)
            value = F.embedding(idx, self.values[tables[i]]) if i in tables else None
            source = middle if a["late_attention"] and middle is not None else x
            attended = self._fast_attention(rms_norm(source), block, rotations, first, mask, value,
                                            half and i in a["offset_layers"])
            a_, b, c, d = block.factors.unbind()
            x = a_ * x + attended
            if a["embedding_skip"]:
                x = x + b * x0
            if ngram is not None:
                x = x + c * ngram
            if match is not None:
                x = x + match[0] * match[1][..., i:i + 1]
            y = relu_squared(block.mlp["c_fc"](rms_norm(x)))
            x = d * x + block.mlp["c_proj"](y)
            if i == at and i < a["n_layer"] - 1:
                middle = x
        return rms_norm(x - 0.5 * middle if a["backout"] and middle is not None else x)

    def _fast_embedding(self, idx, begins):
        """Return embeddings, smeared, and the sum of the rows of pairs and triples or None, (B, T, C)."""
        a, x, ngram = self.config.architecture, self.transformer["wte"](idx), None
        for n, (setting, name) in enumerate(TABLES.items(), 2):
            if a.get(setting):
                table = getattr(self, name)
                row = F.embedding(hashed(idx, begins, n, len(table)), table)
                ngram = row if ngram is None else ngram + row
        if a["smear"]:
            share = self.smear_factor * self.smear(x[:, 1:]) * ~begins[:, 1:, None]
            x = torch.cat((x[:, :1], x[:, 1:] + share * x[:, :-1]), dim=1)
        return x, ngram

    def _fast_match(self, idx, document):
        """Return the row of the token after the longest match, (B, T, C), and its shares, (B, T, layers)."""
        token, level = suffix_matches(idx, document)
        none, at = (level == 0)[..., None], (level - 1).clamp(min=0)
        row = rms_norm(self.transformer["wte"](token)) + self.match["rows"][at]
        return row, self.match["shares"].T[at].masked_fill(none, 0.0)

    def _fast_attention(self, x, block, rotations, first, mask, value, offset: bool):
        """Return the output of attention, (B, T, C). first: first token that each token sees, (B, T)."""
        n_head, (B, T, C) = self.config.architecture["n_head"], x.shape
        qkv = block.attn["c_attn"](x).view(B, T, 3, n_head, C // n_head)
        q, k, v = qkv.unbind(2)
        q, k = (rotate(rms_norm(y), *rotations) for y in (q, k))
        if value is not None:
            share = 2 * block.attn["value_gate"](torch.cat((x[..., :GATE // 2], value[..., :GATE // 2]), -1))
            v = v + share[..., None] * value.view_as(v)
        if offset:  # channels that do not turn have the previous token's key
            D, t = k.size(-1), torch.arange(T, device=x.device)
            still = torch.arange(D, device=x.device) % (D // 2) >= D // 4
            k = torch.where((first < t)[:, :, None, None] & still, torch.cat((k[:, :1], k[:, :-1]), dim=1), k)
        y = attend(q, k, v, mask, scale=0.1).view(B, T, n_head, -1)
        if hasattr(block.attn, "own_share"):  # less of the token's own value
            along = (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp(min=1e-8)
            y = y - block.attn.own_share.tanh()[:, None] * along * v
        if "gate" in block.attn:
            y = y * block.attn["gate"](x)[..., None]
        return block.attn["c_proj"](y.flatten(2))


NanoSyncConfig.register_for_auto_class()
NanoSyncForCausalLM.register_for_auto_class("AutoModelForCausalLM")
