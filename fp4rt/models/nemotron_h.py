"""Nemotron-H and Nemotron 3 (NVIDIA 2025): one mixer per layer - Mamba2, attention without positions, MLP or experts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fp4rt.checkpoint import Scope
from fp4rt.config import Config
from fp4rt.formats import ExpertShape, has_weight, read_vector, read_weight
from fp4rt.layers import Decoder, Progress
from fp4rt.loading import Loader
from fp4rt.ops import AttentionShape, MambaShape, Routing

# One letter per layer, in hub files; words, in re-saved ones.
PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
WORDS = {"mamba": "mamba", "linear_attention": "mamba", "attention": "attention", "full_attention": "attention",
         "mlp": "mlp", "moe": "moe"}


@dataclass(frozen=True)
class Sizes:
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    eps: float
    tie_word_embeddings: bool
    kinds: tuple[str, ...]
    attention: AttentionShape | None
    attention_bias: bool
    mamba: MambaShape | None
    mamba_bias: bool
    conv_bias: bool
    intermediate_size: int
    mlp_bias: bool
    routing: Routing | None = None
    moe_intermediate_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    moe_latent_size: int | None = None


def _kinds(config: Config) -> tuple[str, ...]:
    key = config.alias("layers_block_type", "layer_types", "hybrid_override_pattern")
    pattern = config.get(key)
    table = PATTERN if isinstance(pattern, str) else WORDS
    if not isinstance(pattern, (str, list)) or not pattern or not all(
            isinstance(one, str) and one in table for one in pattern):
        raise config.refuse(key, f"is {str(pattern)[:80]}", f"expected layers out of {', '.join(table)}")
    layers = config.integer("num_hidden_layers", len(pattern))
    if layers != len(pattern):
        raise config.refuse("num_hidden_layers", f"is {layers}", f"{key} names {len(pattern)} layers")
    return tuple(table[one] for one in pattern)


def _check_dt_limit(config: Config) -> None:
    """dt is not clamped here. (time_step_min and _max are for initialising a model and mean nothing afterwards.)"""
    limit = config.get(config.alias("time_step_limit", "mamba_dt_limit"), None)
    if limit is None:
        return
    values = [one.get("__float__") if isinstance(one, dict) else one for one in limit] if isinstance(limit, list) else []
    try:
        low, high = (float(one) for one in values)
    except (TypeError, ValueError):
        raise config.refuse("time_step_limit", f"is {limit!r}", "expected two numbers") from None
    if low != 0 or high != math.inf:
        raise config.refuse("time_step_limit", f"is {limit!r}", "only [0, Infinity] is supported: dt is not clamped")


def read(config: Config) -> Sizes:
    kinds = _kinds(config)
    attention = mamba = routing = None
    if "attention" in kinds:
        heads, kv_heads = config.integer("num_attention_heads"), config.integer("num_key_value_heads")
        dim = config.integer(config.alias("head_dim", "attention_head_dim"), most=1024)
        if heads % kv_heads:
            raise config.refuse("num_attention_heads", f"is {heads}", f"not a multiple of num_key_value_heads {kv_heads}")
        attention = AttentionShape(heads, kv_heads, dim, dim**-0.5)
    if "mamba" in kinds:
        _check_dt_limit(config)
        mamba = MambaShape(config.integer("mamba_num_heads", most=1 << 16),
                           config.integer("mamba_head_dim", most=1 << 12),
                           config.integer(config.alias("n_groups", "mamba_n_groups", "mamba_num_groups"), most=1 << 12),
                           config.integer(config.alias("ssm_state_size", "mamba_state_dim"), most=1 << 12),
                           config.integer(config.alias("conv_kernel", "mamba_d_conv"), least=2, most=16))
        if mamba.num_heads % mamba.num_groups:
            raise config.refuse("mamba_num_heads", f"is {mamba.num_heads}", f"not a multiple of {mamba.num_groups} groups")
    if "moe" in kinds:
        experts, top_k = config.integer("n_routed_experts"), config.integer("num_experts_per_tok")
        groups, kept = config.integer("n_group", 1), config.integer("topk_group", 1)
        if top_k > experts or experts % groups or kept > groups:
            raise config.refuse("n_routed_experts", f"is {experts}", f"{top_k} of them in {kept} of {groups} groups "
                                                                     "cannot be chosen")
        routing = Routing(experts, top_k, "sigmoid", config.flag("norm_topk_prob", True),
                          config.number("routed_scaling_factor", 1.0), groups, kept)
    if config.get("mlp_hidden_act", "relu2") != "relu2":
        raise config.refuse("mlp_hidden_act", f"is {config.get('mlp_hidden_act')!r}", "this architecture uses relu2")
    return Sizes(
        hidden_size=config.integer("hidden_size", most=1 << 20), vocab_size=config.integer("vocab_size", most=1 << 24),
        max_position_embeddings=config.integer("max_position_embeddings"),
        eps=config.number(config.alias("layer_norm_epsilon", "norm_eps", "rms_norm_eps"), 1e-5, most=1.0),
        tie_word_embeddings=config.flag("tie_word_embeddings"), kinds=kinds, attention=attention,
        attention_bias=config.flag("attention_bias"), mamba=mamba,
        mamba_bias=config.flag(config.alias("use_bias", "mamba_proj_bias")),
        conv_bias=config.flag(config.alias("use_conv_bias", "mamba_conv_bias"), True),
        intermediate_size=config.integer("intermediate_size", most=1 << 22), mlp_bias=config.flag("mlp_bias"),
        routing=routing,
        moe_intermediate_size=config.integer("moe_intermediate_size") if routing else 0,
        moe_shared_expert_intermediate_size=config.integer("moe_shared_expert_intermediate_size") if routing else 0,
        moe_latent_size=config.integer("moe_latent_size", None))


class Mamba:
    """in_proj, convolution and selective state space, gated norm, out_proj."""

    def __init__(self, scope: Scope, sizes: Sizes, load: Loader):
        self.ops, self.shape, shape = load.ops, sizes.mamba, sizes.mamba
        self.in_proj = load.linear(scope, {"in_proj": shape.input_width}, sizes.hidden_size, bias=sizes.mamba_bias)
        self.out_proj = load.linear(scope, {"out_proj": sizes.hidden_size}, shape.inner, bias=sizes.mamba_bias)
        heads, width = shape.num_heads, shape.conv_width
        conv = read_vector(scope, "conv1d.weight", width * shape.conv_kernel).reshape(width, shape.conv_kernel)
        self.weight = load.ops.mamba_weight(
            shape, conv, read_vector(scope, "conv1d.bias", width) if sizes.conv_bias else np.zeros(width, np.float32),
            -np.exp(read_vector(scope, "A_log", heads)), read_vector(scope, "D", heads),
            read_vector(scope, "dt_bias", heads), read_vector(scope, "norm.weight", shape.inner), sizes.eps)

    def __call__(self, h: Any, norm: Any, batch: Any, state: Any) -> Any:
        y = self.ops.mamba(self.ops.linear(h, self.in_proj, norm=norm), batch, state, self.weight, self.shape)
        return self.ops.linear(y, self.out_proj, residual=h)


class Attention:
    """Grouped-query attention without rotary or any other positions."""

    def __init__(self, scope: Scope, sizes: Sizes, load: Loader):
        self.ops, self.shape, shape = load.ops, sizes.attention, sizes.attention
        q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        bias = sizes.attention_bias and scope.has("q_proj.bias")  # transformers has none, whatever config.json says
        self.qkv_proj = load.linear(scope, {"q_proj": q, "k_proj": kv, "v_proj": kv}, sizes.hidden_size, bias=bias)
        self.o_proj = load.linear(scope, {"o_proj": sizes.hidden_size}, q, bias=bias)

    def __call__(self, h: Any, norm: Any, batch: Any, pages: Any) -> Any:
        a = self.ops.attention(self.ops.linear(h, self.qkv_proj, norm=norm), batch, pages, self.shape, rope=None,
                               then=self.o_proj)
        return self.ops.linear(a, self.o_proj, residual=h)


class MLP:
    """down(max(up(x), 0)^2): no gate."""

    def __init__(self, scope: Scope, sizes: Sizes, load: Loader, width: int | None = None):
        width = width or sizes.intermediate_size
        self.ops = load.ops
        self.up_proj = load.linear(scope, {"up_proj": width}, sizes.hidden_size, bias=sizes.mlp_bias)
        self.down_proj = load.linear(scope, {"down_proj": sizes.hidden_size}, width, bias=sizes.mlp_bias)

    def __call__(self, h: Any, norm: Any, batch: Any = None, memory: Any = None, *, onto: Any = None) -> Any:
        """h + mlp(norm(h)), or onto + mlp(norm(h))."""
        x = self.ops.linear(h, self.up_proj, norm=norm, activation="relu2", then=self.down_proj)
        return self.ops.linear(x, self.down_proj, residual=h if onto is None else onto)


class MoE:
    """Routed experts, in a narrower latent space where the model has one, and a shared expert that every token takes."""

    def __init__(self, scope: Scope, sizes: Sizes, load: Loader):
        hidden, latent, routing, bias = sizes.hidden_size, sizes.moe_latent_size, sizes.routing, sizes.mlp_bias
        shared, width = scope.at("shared_experts"), sizes.moe_shared_expert_intermediate_size
        self.ops = load.ops
        self.gate = load.router(scope, "gate", routing.num_experts, hidden)
        self.correction = load.vector(scope, "gate.e_score_correction_bias", routing.num_experts)
        self.fc1_latent_proj = load.linear(scope, {"fc1_latent_proj": latent}, hidden, bias=bias) if latent else None
        self.fc2_latent_proj = load.linear(scope, {"fc2_latent_proj": hidden}, latent, bias=bias) if latent else None
        self.up_proj, self.down_proj, always = load.experts_and_shared(
            scope.at("experts"),
            ExpertShape(routing.num_experts, latent or hidden, sizes.moe_intermediate_size, gated=False), routing.top_k,
            [read_weight(shared.at("up_proj"), width, hidden, bias=bias)],
            read_weight(shared.at("down_proj"), hidden, width, bias=bias))
        self.routing = replace(routing, always=always)
        self.shared_experts = None if always else MLP(shared, sizes, load, width)

    def __call__(self, h: Any, norm: Any, batch: Any, memory: None) -> Any:
        ops = self.ops
        choice = ops.route(h, self.gate, self.routing, norm=norm, correction=self.correction)
        shared = self.shared_experts and ops.linear(h, self.shared_experts.up_proj, norm=norm, activation="relu2")
        if self.fc1_latent_proj is None:
            h = ops.experts(h, choice, self.up_proj, self.down_proj, activation="relu2", norm=norm, residual=h)
        else:
            latent = ops.linear(h, self.fc1_latent_proj, norm=norm)
            routed = ops.experts(latent, choice, self.up_proj, self.down_proj, activation="relu2")
            h = ops.linear(routed, self.fc2_latent_proj, residual=h)
        return ops.linear(shared, self.shared_experts.down_proj, residual=h) if self.shared_experts else h


class Layer:
    """h + mixer(norm(h))."""

    def __init__(self, norm: Any, mixer: Any):
        self.norm, self.mixer = norm, mixer

    def __call__(self, h: Any, batch: Any, memory: Any) -> Any:
        return self.mixer(h, self.norm, batch, memory)


MIXERS = {"mamba": Mamba, "attention": Attention, "mlp": MLP, "moe": MoE}


def build(scope: Scope, source: Config, sizes: Sizes, load: Loader, max_positions: int, progress: Progress) -> Decoder:
    prefix = next((p for p in ("backbone", "model") if scope.has(f"{p}.norm_f.weight")), "backbone")
    body = scope.at(prefix)
    table = next((n for n in ("embeddings", "embedding", "embed_tokens") if has_weight(body.at(n))), "embeddings")
    memory = [load.remembered(body.at(f"layers.{i}.mixer"), sizes.attention) if kind == "attention" else
              sizes.mamba if kind == "mamba" else None for i, kind in enumerate(sizes.kinds)]
    embed_tokens, lm_head = load.embedding_and_head(
        body.at(table), scope.at("lm_head"), sizes.vocab_size, sizes.hidden_size, tied=sizes.tie_word_embeddings)
    norm = load.norm(body, "norm_f", sizes.hidden_size, sizes.eps)
    layers = []
    for i in progress(range(len(sizes.kinds))):
        at = body.at(f"layers.{i}")
        layers.append(Layer(load.norm(at, "norm", sizes.hidden_size, sizes.eps),
                            MIXERS[sizes.kinds[i]](at.at("mixer"), sizes, load)))
    return Decoder(sizes, load.ops, memory, embed_tokens, layers, norm, lm_head, prefix=prefix)


def skipped(name: str, sizes: Sizes) -> str | None:
    if name.startswith(("mtp.", "backbone.mtp.", "model.mtp.")):
        return "heads that predict several tokens ahead are not used"
    return None
