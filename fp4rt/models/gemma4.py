"""Gemma 4 text models (Google 2026): norms before and after each sublayer, two kinds of attention, experts beside an MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fp4rt.checkpoint import Scope
from fp4rt.config import Config
from fp4rt.formats import ExpertShape, read_vector
from fp4rt.layers import Decoder, Progress
from fp4rt.loading import Loader
from fp4rt.ops import AttentionShape, Routing
from fp4rt.rope import inverse_frequencies

# What a multimodal checkpoint holds besides the text model; images and audio are not taken.
OTHER_TOWERS = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.", "vision_embedder.",
                "multi_modal_projector.")


@dataclass(frozen=True)
class Sizes:
    """attention[i]: the shape of layer i; sliding[i]: whether it has a window (and its own rotary frequencies)."""

    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    eps: float
    tie_word_embeddings: bool
    attention: tuple[AttentionShape, ...]
    sliding: tuple[bool, ...]
    intermediate_sizes: tuple[int, ...]
    attention_bias: bool
    softcap: float | None
    per_layer_width: int
    routing: Routing | None
    moe_intermediate_size: int


# How positions rotate where the config leaves it out.
DEFAULT_ROPE = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}}


def _layer_kinds(config: Config, layers: int) -> list[str]:
    default = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)]
    kinds = config.get("layer_types", default)
    if not isinstance(kinds, list) or len(kinds) != layers or not all(
            kind in ("sliding_attention", "full_attention") for kind in kinds):
        raise config.refuse("layer_types", f"is {str(kinds)[:80]}",
                            f"expected {layers} of sliding_attention and full_attention")
    return [*kinds[:-1], "full_attention"]  # the last layer is full whatever the list says


def _attention(config: Config, layers: int, kinds: list[str]) -> tuple[AttentionShape, ...]:
    heads = config.integer("num_attention_heads", most=1 << 12)
    kv_heads = config.integer("num_key_value_heads", most=1 << 12)
    dim, window = config.integer("head_dim", 256, most=1024), config.integer("sliding_window")
    keys_are_values = config.flag("attention_k_eq_v")
    stated = config.section("per_layer_config")  # in newer files, instead of the two global_ keys
    full_dim = config.integer("global_head_dim", dim if stated else 512, most=1024)
    full_kv = (config.integer("num_global_key_value_heads", None) if keys_are_values else None) or kv_heads
    own = layers - config.integer("num_kv_shared_layers", 0, least=0, most=layers - 1)
    shapes = []
    for i, kind in enumerate(kinds):
        full = kind == "full_attention"
        at = stated.section(str(i)) if stated else None
        layer_dim = (at.integer("head_dim", None, most=1024) if at else None) or (full_dim if full else dim)
        layer_kv = (at.integer("num_key_value_heads", None) if at else None) or (full_kv if full else kv_heads)
        if heads % layer_kv:
            raise config.refuse("num_attention_heads", f"is {heads}", f"not a multiple of layer {i}'s {layer_kv} K/V heads")
        producer = None
        if i >= own:
            producer = next((j for j in range(own - 1, -1, -1) if kinds[j] == kind), None)
            if producer is None:
                raise config.refuse("num_kv_shared_layers", f"leaves no {kind} layer to share with layer {i}")
        shapes.append(AttentionShape(heads, layer_kv, layer_dim, 1.0, None if full else window,
                                     values_are_keys=keys_are_values and full, shares=producer))
    return tuple(shapes)


def read(config: Config) -> Sizes:
    text = config.section("text_config") or config
    if text.get(text.alias("hidden_activation", "hidden_act"), "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise text.refuse("hidden_activation", "is not gelu_pytorch_tanh", "this architecture uses that")
    if text.get("use_bidirectional_attention", None) == "all":
        raise text.refuse("use_bidirectional_attention", "is 'all'", "embedding models are not supported")
    layers = text.integer("num_hidden_layers", most=1 << 14)
    kinds = _layer_kinds(text, layers)
    shared = text.integer("num_kv_shared_layers", 0, least=0, most=layers - 1)
    inner, wide = text.integer("intermediate_size", most=1 << 22), text.flag("use_double_wide_mlp")
    routing, width = None, 0
    if text.flag("enable_moe_block"):
        experts, top_k = text.integer("num_experts", most=1 << 14), text.integer("top_k_experts", most=1 << 10)
        if top_k > experts:
            raise text.refuse("top_k_experts", f"is {top_k}", f"there are {experts} experts")
        routing, width = Routing(experts, top_k), text.integer("moe_intermediate_size", most=1 << 20)
    return Sizes(
        hidden_size=text.integer("hidden_size", most=1 << 20), vocab_size=text.integer("vocab_size", most=1 << 24),
        max_position_embeddings=text.integer("max_position_embeddings"),
        eps=text.number("rms_norm_eps", 1e-6, most=1.0),
        tie_word_embeddings=text.flag("tie_word_embeddings", config.flag("tie_word_embeddings", True)),
        attention=_attention(text, layers, kinds), sliding=tuple(kind == "sliding_attention" for kind in kinds),
        intermediate_sizes=tuple(inner * (2 if wide and i >= layers - shared else 1) for i in range(layers)),
        attention_bias=text.flag("attention_bias"), softcap=text.number("final_logit_softcapping", None, least=1e-3),
        per_layer_width=text.integer("hidden_size_per_layer_input", 0, least=0, most=1 << 16),
        routing=routing, moe_intermediate_size=width)


class Attention:
    """q, k and v are normed per head (v without a weight), and scores are not scaled."""

    def __init__(self, scope: Scope, sizes: Sizes, i: int, rope: Any, load: Loader):
        self.ops, self.rope, self.shape, shape = load.ops, rope, sizes.attention[i], sizes.attention[i]
        q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        parts = {"q_proj": q}
        if shape.shares is None:
            parts["k_proj"] = kv
            if not shape.values_are_keys:
                parts["v_proj"] = kv
        self.qkv_proj = load.linear(scope, parts, sizes.hidden_size, bias=sizes.attention_bias)
        self.o_proj = load.linear(scope, {"o_proj": sizes.hidden_size}, q, bias=sizes.attention_bias)
        self.q_norm = load.norm(scope, "q_norm", shape.head_dim, sizes.eps)
        self.k_norm = load.norm(scope, "k_norm", shape.head_dim, sizes.eps) if shape.shares is None else None
        self.v_norm = load.ops.norm_weight(np.ones(shape.head_dim, np.float32), sizes.eps)

    def __call__(self, h: Any, norm: Any, batch: Any, pages: Any) -> Any:
        qkv = self.ops.linear(h, self.qkv_proj, norm=norm)
        a = self.ops.attention(qkv, batch, pages, self.shape, rope=self.rope, q_norm=self.q_norm, k_norm=self.k_norm,
                               v_norm=self.v_norm, then=self.o_proj)
        return self.ops.linear(a, self.o_proj)


class MLP:
    def __init__(self, scope: Scope, hidden: int, inner: int, load: Loader):
        self.ops = load.ops
        self.gate_up_proj = load.linear(scope, {"gate_proj": inner, "up_proj": inner}, hidden, gated=True)
        self.down_proj = load.linear(scope, {"down_proj": hidden}, inner)

    def __call__(self, h: Any, norm: Any) -> Any:
        x = self.ops.linear(h, self.gate_up_proj, norm=norm, activation="gelu_tanh", then=self.down_proj)
        return self.ops.linear(x, self.down_proj)


class MoE:
    """The router looks at the residual stream under a norm of its own, the experts under another."""

    def __init__(self, scope: Scope, sizes: Sizes, load: Loader):
        hidden, experts = sizes.hidden_size, sizes.routing.num_experts
        self.ops, self.routing = load.ops, sizes.routing
        router = scope.at("router")
        self.router_norm = load.ops.norm_weight(read_vector(router, "scale", hidden) * np.float32(hidden**-0.5), sizes.eps)
        self.router = load.router(router, "proj", experts, hidden)
        self.expert_scale = load.vector(router, "per_expert_scale", experts)
        self.norm = load.norm(scope, "pre_feedforward_layernorm_2", hidden, sizes.eps)
        at = next((scope.at(path) for path in ("moe.experts", "experts") if _holds_experts(scope.at(path))),
                  scope.at("experts"))
        self.gate_up_proj, self.down_proj = load.experts(
            at, ExpertShape(experts, hidden, sizes.moe_intermediate_size), sizes.routing.top_k)

    def route(self, h: Any) -> Any:
        return self.ops.route(h, self.router, self.routing, norm=self.router_norm, expert_scale=self.expert_scale,
                              experts_norm=self.norm, beside=True)

    def __call__(self, h: Any, choice: Any) -> Any:
        return self.ops.experts(h, choice, self.gate_up_proj, self.down_proj, activation="gelu_tanh", norm=self.norm)


def _holds_experts(scope: Scope) -> bool:
    return any(scope.has(name) for name in ("gate_up_proj", "0.down_proj.weight", "0.down_proj.weight_packed"))


class PerLayerInput:
    """What the token's own embedding for this layer adds (E2B, E4B)."""

    def __init__(self, scope: Scope, sizes: Sizes, load: Loader):
        width, hidden = sizes.per_layer_width, sizes.hidden_size
        self.ops = load.ops
        self.gate = load.linear(scope, {"per_layer_input_gate": width}, hidden)
        self.projection = load.linear(scope, {"per_layer_projection": hidden}, width)
        self.norm = load.norm(scope, "post_per_layer_input_norm", hidden, sizes.eps)

    def __call__(self, h: Any, inputs: Any, layer: int, scale: float) -> Any:
        gated = self.ops.per_layer_gate(h, self.gate, inputs, layer)
        return self.ops.merge(h, [(self.ops.linear(gated, self.projection), None)], norm=self.norm, scale=scale)


class Layer:
    def __init__(self, scope: Scope, sizes: Sizes, i: int, rope: Any, load: Loader):
        def norm(name: str) -> Any:
            return load.norm(scope, name, sizes.hidden_size, sizes.eps)

        self.ops = load.ops
        self.index = i
        self.input_layernorm, self.post_attention_layernorm = norm("input_layernorm"), norm("post_attention_layernorm")
        self.pre_feedforward_layernorm = norm("pre_feedforward_layernorm")
        self.post_feedforward_layernorm = norm("post_feedforward_layernorm")
        self.self_attn = Attention(scope.at("self_attn"), sizes, i, rope, load)
        self.mlp = MLP(scope.at("mlp"), sizes.hidden_size, sizes.intermediate_sizes[i], load)
        self.moe = None
        if sizes.routing:
            self.moe = MoE(scope, sizes, load)
            self.post_feedforward_layernorm_1 = norm("post_feedforward_layernorm_1")
            self.post_feedforward_layernorm_2 = norm("post_feedforward_layernorm_2")
        self.per_layer_input = PerLayerInput(scope, sizes, load) if sizes.per_layer_width else None
        self.layer_scalar = float(read_vector(scope, "layer_scalar", 1)[0])

    def __call__(self, h: Any, batch: Any, pages: Any, per_layer_inputs: Any = None) -> Any:
        a = self.self_attn(h, self.input_layernorm, batch, pages)
        h = self.ops.merge(h, [(a, self.post_attention_layernorm)])
        choice = self.moe.route(h) if self.moe else None  # beside the dense MLP, which needs nothing of it
        m = self.mlp(h, self.pre_feedforward_layernorm)
        branches = [(m, None)]
        if self.moe:
            branches = [(m, self.post_feedforward_layernorm_1),
                        (self.moe(h, choice), self.post_feedforward_layernorm_2)]
        last = self.per_layer_input is None
        h = self.ops.merge(h, branches, norm=self.post_feedforward_layernorm, scale=self.layer_scalar if last else 1.0)
        return h if last else self.per_layer_input(h, per_layer_inputs, self.index, self.layer_scalar)


class PerLayerEmbedding:
    """The second embedding table of E2B and E4B: a vector for each token and layer, from host memory."""

    def __init__(self, body: Scope, sizes: Sizes, load: Loader):
        layers, width, hidden = len(sizes.attention), sizes.per_layer_width, sizes.hidden_size
        self.ops = load.ops
        self.table = load.host_embedding(body.at("embed_tokens_per_layer"), sizes.vocab_size, layers * width,
                                         width**0.5)
        self.projection = load.linear(body, {"per_layer_model_projection": layers * width}, hidden)
        self.norm = load.norm(body, "per_layer_projection_norm", width, sizes.eps)

    def __call__(self, h: Any, batch: Any) -> Any:
        return self.ops.per_layer_inputs(h, batch, self.table, self.projection, self.norm)


@dataclass
class Gemma4(Decoder):
    per_layer_embedding: PerLayerEmbedding | None = None

    def residuals(self, batch: Any, pages: Any):
        h = self.ops.embed(batch, self.embed_tokens)
        yield f"{self.prefix}.embed_tokens", h
        inputs = self.per_layer_embedding(h, batch) if self.per_layer_embedding else None
        for i, layer in enumerate(self.layers):
            h = layer(h, batch, pages[i], inputs)
            yield f"{self.prefix}.layers.{i}", h


def build(scope: Scope, source: Config, sizes: Sizes, load: Loader, max_positions: int, progress: Progress) -> Decoder:
    text = source.section("text_config") or source
    prefix = next((p for p in ("model.language_model", "language_model.model", "model") if scope.has(f"{p}.norm.weight")),
                  "model.language_model")
    body = scope.at(prefix)
    ropes = {}
    for kind in {"sliding_attention" if sliding else "full_attention" for sliding in sizes.sliding}:
        first = next(shape for shape, sliding in zip(sizes.attention, sizes.sliding) if sliding == (kind[0] == "s"))
        stated = text.section("rope_parameters")
        own = stated.section(kind) if stated else None
        ropes[kind[0] == "s"] = load.ops.rope_table(
            *inverse_frequencies(Config({"rope_parameters": own.values if own else DEFAULT_ROPE[kind]}, text.file,
                                        text.path), first.head_dim), max_positions)
    # A BF16 run of the original rounds this factor to BF16; here everything between weights is float32.
    embed_tokens, lm_head = load.embedding_and_head(
        body.at("embed_tokens"), scope.at("lm_head"), sizes.vocab_size, sizes.hidden_size,
        tied=sizes.tie_word_embeddings, scale=sizes.hidden_size**0.5)
    norm = load.norm(body, "norm", sizes.hidden_size, sizes.eps)
    per_layer = PerLayerEmbedding(body, sizes, load) if sizes.per_layer_width else None
    layers = [Layer(body.at(f"layers.{i}"), sizes, i, ropes[sizes.sliding[i]], load)
              for i in progress(range(len(sizes.attention)))]
    memory = [load.remembered(body.at(f"layers.{i}.self_attn"), shape) for i, shape in enumerate(sizes.attention)]
    return Gemma4(sizes, load.ops, memory, embed_tokens, layers, norm, lm_head, sizes.softcap, prefix,
                  per_layer)


def skipped(name: str, sizes: Sizes) -> str | None:
    """The other towers, and projections of layers that read another layer's keys and values."""
    if name.removeprefix("model.").startswith(OTHER_TOWERS):
        return "images and audio are not taken; this part of the model is left out"
    parts = name.split(".")
    if "layers" not in parts or not parts[parts.index("layers") + 1].isdigit():
        return None
    layer = int(parts[parts.index("layers") + 1])
    shares = layer < len(sizes.attention) and sizes.attention[layer].shares is not None
    if shares and any(part in ("k_proj", "v_proj", "k_norm") for part in parts):
        return "this layer reads an earlier layer's keys and values"
    return None
