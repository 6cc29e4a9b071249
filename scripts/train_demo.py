"""Train fp4rt's demo checkpoint: a small Llama on generated text, written as a BF16 Hugging Face directory.

    python scripts/train_demo.py demo-bf16                            # one GPU, a few minutes
    python scripts/train_demo.py --write-heldout tests/demo_heldout.jsonl
    fp4rt quantize demo-bf16 demo                                     # the NVFP4 checkpoint that ships

Text is generated while the model trains; batch i is the same in every run of a seed, and a run repeats up to
the order of atomic additions on the GPU, if --minutes leaves it all its steps. In the last part of training
every decoder linear computes with weights rounded to NVFP4 while the gradient updates the unrounded ones (the
straight-through estimator, Bengio et al. 2013), so that the BF16 and the NVFP4 model are both good.
"""
from __future__ import annotations

import json
import math
import random
import re
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import click
import demo_corpus as corpus
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

LEARN = 0x8000                                  # flag beside a token id: the model should produce this token
PROMPT_WEIGHT = 0.1                             # loss weight of tokens that are only given


# -------------------------------------------------------------------------------------------------- tokenizer

# Llama 3's splitting rule with single digits, so that sums are over digits and not over groups of them.
PIECE = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
ASCII_PIECE = re.compile(PIECE.replace(r"\p{L}+", "[a-zA-Z]+").replace(r"|\p{N}|", "|[0-9]|")
                         .replace(r"\p{L}", "a-zA-Z").replace(r"\p{N}", "0-9"))


def train_tokenizer(vocab_size: int, seed: int, documents: int = 8000) -> Tokenizer:
    """A byte-level BPE with the special tokens first and BOS put in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECE), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    texts = (text for document in islice(corpus.documents(seed), documents) for text, _ in document
             if text not in corpus.SPECIAL_TOKENS)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(corpus.SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if tokenizer.get_vocab_size() != vocab_size:
        raise click.ClickException(f"the corpus gives {tokenizer.get_vocab_size()} tokens, not {vocab_size}")
    bos = (corpus.BOS, tokenizer.token_to_id(corpus.BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{corpus.BOS} $A", pair=f"{corpus.BOS} $A {corpus.BOS} $B:1", special_tokens=[bos])
    return tokenizer


class Encoder:
    """Documents to ids, by a dictionary over the pieces that BPE never crosses: the library is slower."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.pieces: dict[str, list[int]] = {t: [tokenizer.token_to_id(t)] for t in corpus.SPECIAL_TOKENS}

    def segment(self, text: str) -> list[int]:
        if text in corpus.SPECIAL_TOKENS:
            return self.pieces[text]
        ids: list[int] = []
        for piece in ASCII_PIECE.findall(text):
            known = self.pieces.get(piece)
            if known is None:
                known = self.tokenizer.encode(piece, add_special_tokens=False).ids
                if len(self.pieces) < 200_000:
                    self.pieces[piece] = known
            ids += known
        return ids

    def document(self, document: corpus.Document) -> list[int]:
        """Ids, with LEARN set where the model should produce the token."""
        out: list[int] = []
        for text, learn in document:
            ids = self.segment(text)
            out += [i | LEARN for i in ids] if learn else ids
        return out

    def check(self, documents: int = 300) -> None:
        """Raise unless this agrees with the tokenizer itself on fresh documents."""
        for document in islice(corpus.documents(-1), documents):
            for text, _ in document:
                if self.segment(text) != self.tokenizer.encode(text, add_special_tokens=False).ids:
                    raise AssertionError(f"pieces and tokenizer disagree on {text!r}")


class Rows(torch.utils.data.IterableDataset):
    """Endless batches of packed rows, uint16 [rows, length + 1]; batch i does not depend on the workers."""

    def __init__(self, encoder: Encoder, rows: int, length: int, seed: int):
        self.encoder, self.rows, self.length, self.seed = encoder, rows, length, seed

    def __iter__(self) -> Iterator[Tensor]:
        worker = torch.utils.data.get_worker_info()
        index, step = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            yield self.batch(index)
            index += step

    def batch(self, index: int) -> Tensor:
        """Rows filled with documents from their first token on; the last one of a row is cut at its end."""
        documents = corpus.documents(self.seed * 1_000_003 + index + 1)
        out = np.empty((self.rows, self.length + 1), np.uint16)
        for row in out:
            ids: list[int] = []
            while len(ids) <= self.length:
                ids += self.encoder.document(next(documents))
            row[:] = ids[:self.length + 1]
        return torch.from_numpy(out)


# ------------------------------------------------------------------------------------------------------ model

@dataclass(frozen=True)
class Config:
    """A Llama's dimensions, named as in Hugging Face's config.json."""
    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    def linears(self) -> dict[str, tuple[int, int]]:
        """Hugging Face's name of each linear of a layer: (outputs, inputs)."""
        hidden, inner, head = self.hidden_size, self.intermediate_size, self.head_dim
        query, key = self.num_attention_heads * head, self.num_key_value_heads * head
        return {"self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key, hidden),
                "self_attn.v_proj": (key, hidden), "self_attn.o_proj": (hidden, query),
                "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner)}


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (Su et al. 2021) in Llama's split-half form; x [B, H, T, D], cos and sin [T, D]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def layer(x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, gate: Tensor, up: Tensor, down: Tensor,
          attn_norm: Tensor, mlp_norm: Tensor, cos: Tensor, sin: Tensor, head_dim: int, eps: float) -> Tensor:
    """One decoder layer over x [B, T, hidden]; linears that read the same input run as one product."""
    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    y = F.rms_norm(x, x.shape[-1:], attn_norm, eps)
    query, key, value = F.linear(y, torch.cat((q, k, v))).split((len(q), len(k), len(v)), dim=-1)
    y = F.scaled_dot_product_attention(_rotate(heads(query), cos, sin), _rotate(heads(key), cos, sin),
                                       heads(value), is_causal=True, enable_gqa=True)
    x = x + F.linear(y.transpose(1, 2).flatten(2), o)
    y = F.rms_norm(x, x.shape[-1:], mlp_norm, eps)
    gated, raised = F.linear(y, torch.cat((gate, up))).chunk(2, dim=-1)
    return x + F.linear(F.silu(gated) * raised, down)


class Llama(nn.Module):
    """A Llama with tied embeddings and stacked layers: linears[name] is [layers, outputs, inputs]."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.layer = config, layer
        depth, hidden = config.num_hidden_layers, config.hidden_size
        residual = 1 / math.sqrt(2 * depth)     # GPT-2: the products that write the residual start smaller
        self.embed = nn.Parameter(torch.randn(config.vocab_size, hidden) * 0.02)
        self.linears, self.norms = nn.ParameterDict(), nn.ParameterDict()
        for name, shape in config.linears().items():
            scale = (residual if name.endswith(("o_proj", "down_proj")) else 1) / math.sqrt(shape[1])
            self.linears[name.replace(".", "/")] = nn.Parameter(torch.randn(depth, *shape) * scale)
        for name in ("input_layernorm", "post_attention_layernorm"):
            self.norms[name] = nn.Parameter(torch.ones(depth, hidden))
        self.final_norm = nn.Parameter(torch.ones(hidden))
        frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies)
        self.register_buffer("angles", torch.cat((angles, angles), dim=-1), persistent=False)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Final hidden states [B, T, hidden] of ids [B, T], computed in `dtype`."""
        cos, sin = self.angles[:ids.shape[1]].cos().to(dtype), self.angles[:ids.shape[1]].sin().to(dtype)
        x = F.embedding(ids, self.embed).to(dtype)
        stacks = [*self.linears.values(), *self.norms.values()]
        for weights in zip(*(stack.to(dtype).unbind(0) for stack in stacks)):
            x = self.layer(x, *weights, cos, sin, self.config.head_dim, self.config.rms_norm_eps)
        return F.rms_norm(x, x.shape[-1:], self.final_norm.to(dtype), self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed.to(hidden.dtype)).float()

    def state(self) -> dict[str, Tensor]:
        """Every weight under its Hugging Face name."""
        out = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.final_norm}
        for name, stack in [*self.linears.items(), *self.norms.items()]:
            for i, weight in enumerate(stack):
                out[f"model.layers.{i}.{name.replace('/', '.')}.weight"] = weight
        return out


def loss(hidden: Tensor, embed: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the next token's cross entropy."""
    logits = F.linear(hidden, embed.to(hidden.dtype)).float().flatten(0, 1)
    each = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return (each * weights.flatten()).sum() / weights.sum()


# ------------------------------------------------------------------------------------------------------ NVFP4

def nvfp4(weights: Tensor) -> Tensor:
    """`weights` [L, N, K] rounded to NVFP4 as ModelOpt does, one matrix at a time.

    global = amax / (6 * 448); a scale per 16 inputs = e4m3(block amax / 6 / global), at least 2^-9; codes
    rounded to nearest even on the E2M1 grid.
    """
    blocks = weights.float().unflatten(-1, (-1, 16))
    scale = (blocks.abs().amax((1, 2, 3), keepdim=True) / (6 * 448)).clamp_min(1e-30)
    local = (blocks.abs().amax(-1, keepdim=True) / 6 / scale).clamp(2 ** -9, 448)
    local = local.to(torch.float8_e4m3fn).float() * scale
    codes = (blocks / local).clamp(-6, 6)
    size = codes.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))      # between neighbours on the grid
    return ((codes / step).round() * step * local).flatten(-2).to(weights.dtype)


class RoundedLinears:
    """Context in which every decoder linear holds its NVFP4 value; the exact weights return at the end."""

    def __init__(self, model: Llama):
        self.stacks = list(model.linears.values())

    def __enter__(self) -> None:
        self.exact = [stack.detach().clone() for stack in self.stacks]
        with torch.no_grad():
            for stack in self.stacks:
                stack.copy_(nvfp4(stack))

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for stack, exact in zip(self.stacks, self.exact):
                stack.copy_(exact)


# --------------------------------------------------------------------------------------------------- training

@dataclass(frozen=True)
class Plan:
    """How to train; `steps` is shortened to what fits into `seconds`, measured over the first steps."""
    steps: int
    seconds: float
    rows: int
    length: int
    learning_rate: float = 3e-3
    warmup: int = 200
    weight_decay: float = 0.1
    nvfp4_from: float = 0.7     # share of the steps before linears compute with NVFP4 weights


def train(model: Llama, batches: Iterator[Tensor], plan: Plan, device: str) -> int:
    """Train in place with AdamW, the learning rate falling linearly to zero; returns the number of steps."""
    dtype = torch.bfloat16
    matrices = list(model.linears.values())
    others = [model.embed, model.final_norm, *model.norms.values()]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": plan.weight_decay},
                                   {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95), fused=True)
    compiled_loss = loss
    if device == "cuda":
        model.layer, compiled_loss = torch.compile(layer), torch.compile(loss)
    steps, start, timed, measured = plan.steps, time.monotonic(), 40, 0.0
    with click.progressbar(length=steps, label="training", file=sys.stderr) as bar:
        step = 0
        while step < steps:
            batch = next(batches).to(device, non_blocking=True).int()
            ids, learn = (batch & (LEARN - 1)).long(), batch >= LEARN
            weights = torch.where(learn[:, 1:], 1.0, PROMPT_WEIGHT)
            rate = plan.learning_rate * min(1.0, (step + 1) / plan.warmup,
                                            (steps - step) / max(1, steps - plan.warmup))
            for group in optimizer.param_groups:
                group["lr"] = rate

            with RoundedLinears(model) if step >= plan.nvfp4_from * steps else nullcontext():
                value = compiled_loss(model(ids[:, :-1], dtype), model.embed, ids[:, 1:], weights)
                value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step in (timed, 3 * timed):      # compiled by then: tells how many steps fit
                if device == "cuda":
                    torch.cuda.synchronize()
                if step == timed:
                    measured = time.monotonic()
                else:
                    left = plan.seconds - (time.monotonic() - start)
                    fits = step + int(left / ((time.monotonic() - measured) / (2 * timed)) * 0.97)
                    steps = max(plan.warmup + 1, min(steps, fits))
                    bar.length = steps
                    click.echo(f"{steps} steps of {plan.rows * plan.length} tokens", err=True)
            if step % max(1, steps // 20) == 0:
                click.echo(f"step {step} loss {value.item():.4f} {time.monotonic() - start:.0f} s", err=True)
            bar.update(1)
    return steps


# ------------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def greedy(model: Llama, encoder: Encoder, items: list[dict], limit: int = 64, group: int = 300) -> list[str]:
    """The greedy answers to held-out items, up to the first newline or end token."""
    device, tokenizer = model.embed.device, encoder.tokenizer
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ends = {tokenizer.token_to_id(t) for t in (corpus.EOS, corpus.EOT)}
    prompts = [[i & (LEARN - 1) for i in encoder.document(corpus.prompt_segments(item))] for item in items]
    order = sorted(range(len(items)), key=lambda i: len(prompts[i]))
    answers = [""] * len(items)
    for first in range(0, len(order), group):
        chosen = order[first:first + group]
        ids = torch.zeros(len(chosen), len(prompts[chosen[-1]]) + limit, dtype=torch.long)
        lengths = torch.tensor([len(prompts[i]) for i in chosen])
        for row, i in zip(ids, chosen):
            row[:len(prompts[i])] = torch.tensor(prompts[i])
        ids, lengths, rows = ids.to(device), lengths.to(device), torch.arange(len(chosen), device=device)
        ended = torch.zeros(len(chosen), dtype=torch.bool, device=device)
        for _ in range(limit):                  # what stands behind a row's last token is never attended to
            hidden = model(ids[:, :int(lengths.max())], dtype)[rows, lengths - 1]
            token = model.logits(hidden).argmax(-1)
            ids[rows, lengths] = token
            lengths = lengths + ~ended
            ended |= torch.isin(token, torch.tensor(sorted(ends), device=device))
            if ended.all():
                break
        for i, row, end in zip(chosen, ids.tolist(), lengths.tolist()):
            produced = [t for t in row[len(prompts[i]):end] if t not in ends]
            answers[i] = tokenizer.decode(produced).strip().split("\n")[0].strip()
    return answers


def accuracy(model: Llama, encoder: Encoder, count: int) -> dict[str, float]:
    """Share of held-out items answered exactly, per kind."""
    model.layer = layer                         # uncompiled: the shapes change with every token
    out = {}
    for kind in corpus.SCORED_KINDS:
        items = corpus.held_out_items(kind, count)
        answers = greedy(model, encoder, items)
        out[kind] = float(np.mean([answer == item["answer"] for answer, item in zip(answers, items)]))
    return out


@torch.no_grad()
def story_loss(model: Llama, encoder: Encoder, count: int = 64) -> float:
    """Mean cross entropy per token (nats) of held-out stories."""
    rng, total, tokens = random.Random(1), 0.0, 0
    device = model.embed.device
    for _ in range(count):
        text, _ = corpus.story(rng, held=True)
        ids = torch.tensor([encoder.document([(corpus.BOS, False), (text, False), (corpus.EOS, False)])],
                           device=device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        total += F.cross_entropy(model.logits(model(ids[:, :-1], dtype))[0], ids[0, 1:],
                                 reduction="sum").item()
        tokens += ids.shape[1] - 1
    return total / tokens


SAMPLES: tuple[dict, ...] = (
    {"prompt": "Once upon a time"}, {"prompt": "The little robot"}, {"prompt": "327 + 485 ="},
    {"messages": [{"role": "user", "content": "Tell me a story about a fox and a lantern."}]},
    {"messages": [{"role": "user", "content": "Who are you?"}]},
    {"messages": [{"role": "user", "content": "What is the capital of France?"}]},
    {"messages": [{"role": "system", "content": "Your name is Luma."},
                  {"role": "user", "content": "hi, who are you"}]})


# ---------------------------------------------------------------------------------------------------- writing

def write_checkpoint(model: Llama, tokenizer: Tokenizer, out: Path) -> None:
    """Write a Hugging Face directory; the model's weights must already be BF16 values."""
    config, ids = model.config, {t: tokenizer.token_to_id(t) for t in corpus.SPECIAL_TOKENS}
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: w.detach().to("cpu", torch.bfloat16).contiguous() for name, w in model.state().items()},
              out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    eos = [ids[corpus.EOS], ids[corpus.EOT]]
    files = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", **vars(config),
            "hidden_act": "silu",
            "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "initializer_range": 0.02,
            "rope_scaling": None, "tie_word_embeddings": True, "use_cache": True, "torch_dtype": "bfloat16",
            "bos_token_id": ids[corpus.BOS], "eos_token_id": eos},
        "generation_config.json": {"bos_token_id": ids[corpus.BOS], "eos_token_id": eos, "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": corpus.BOS, "eos_token": corpus.EOT,
            "clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": config.max_position_embeddings}}
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(corpus.CHAT_TEMPLATE)


def write_heldout(path: Path, count: int = 60) -> None:
    """`count` held-out items of every scored kind, one JSON object a line."""
    items = [item for kind in corpus.SCORED_KINDS for item in corpus.held_out_items(kind, count)]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("out", type=click.Path(file_okay=False, path_type=Path), required=False)
@click.option("--write-heldout", "heldout", type=click.Path(dir_okay=False, path_type=Path),
              help="Write the held-out items of the tests to this file (and train only if OUT is given too).")
@click.option("--minutes", type=float, default=5.0, show_default=True,
              help="Stop training after about this long.")
@click.option("--steps", type=int, default=3167, show_default=True,
              help="Most steps; the default is what the shipped model had.")
@click.option("--rows", type=int, default=128, show_default=True, help="Sequences per step.")
@click.option("--layers", type=int, default=12, show_default=True)
@click.option("--learning-rate", type=float, default=3e-3, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--workers", type=int, default=12, show_default=True, help="Processes that generate text.")
@click.option("--eval-items", type=int, default=300, show_default=True,
              help="Held-out items per kind that are scored.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
def main(out: Path | None, heldout: Path | None, minutes: float, steps: int, rows: int, layers: int,
         learning_rate: float, seed: int, workers: int, eval_items: int, device: str) -> None:
    if heldout:
        write_heldout(heldout)
    if out is None:
        if heldout is None:
            raise click.UsageError("nothing to do: give OUT, --write-heldout or both")
        return
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    config = Config(num_hidden_layers=layers)
    tokenizer = train_tokenizer(config.vocab_size, seed)
    encoder = Encoder(tokenizer)
    encoder.check()
    plan = Plan(steps, minutes * 60, rows, config.max_position_embeddings, learning_rate)
    loader = torch.utils.data.DataLoader(Rows(encoder, rows, plan.length, seed), batch_size=None,
                                         num_workers=workers,
                                         prefetch_factor=4 if workers else None, pin_memory=device == "cuda")
    batches = iter(loader)                      # starts the workers, before CUDA exists in this process
    model = Llama(config).to(device)
    start = time.monotonic()
    done = train(model, batches, plan, device)
    del batches
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    write_checkpoint(model, tokenizer, out)
    size = sum(p.numel() for p in model.parameters())
    click.echo(f"{size / 1e6:.2f}M parameters, {done} steps, {done * rows * plan.length / 1e6:.0f}M tokens, "
               f"{time.monotonic() - start:.0f} s")
    exact, exact_story = accuracy(model, encoder, eval_items), story_loss(model, encoder)
    with RoundedLinears(model):
        rounded, rounded_story = accuracy(model, encoder, eval_items), story_loss(model, encoder)
    click.echo("held-out      BF16   NVFP4")
    for kind in corpus.SCORED_KINDS:
        click.echo(f"{kind:<10} {exact[kind]:7.1%} {rounded[kind]:7.1%}")
    click.echo(f"{'all':<10} {np.mean(list(exact.values())):7.1%} {np.mean(list(rounded.values())):7.1%}")
    click.echo(f"stories    {exact_story:7.4f} {rounded_story:7.4f}   nats per token")
    with RoundedLinears(model):
        for item in SAMPLES:
            for answer in greedy(model, encoder, [item], limit=300):
                click.echo(f"\n{item.get('prompt') or item['messages'][-1]['content']} ... {answer}")


if __name__ == "__main__":
    main()
