"""gpt-oss (OpenAI 2025): alternating sliding windows, attention sinks, biases everywhere, MXFP4 experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fp4rt.checkpoint import Scope
from fp4rt.config import Config
from fp4rt.formats import ExpertShape
from fp4rt.layers import Attention, Decoder, DecoderConfig, Progress, build_decoder
from fp4rt.loading import Loader
from fp4rt.ops import AttentionShape, Routing


@dataclass(frozen=True)
class Sizes(DecoderConfig):
    routing: Routing = Routing(1, 1)


def read(config: Config) -> Sizes:
    layers = config.integer("num_hidden_layers", most=1 << 14)
    kinds = config.get("layer_types", ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)])
    known = ("sliding_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in known for kind in kinds):
        raise config.refuse("layer_types", f"is {str(kinds)[:80]}",
                            f"expected {layers} of sliding_attention and full_attention")
    window = config.integer("sliding_window")
    if config.section("rope_parameters") is None:
        config.get("rope_scaling")  # not the plain frequencies that its absence would mean elsewhere
    for key, expected in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
        if config.number(key, expected) != expected:
            raise config.refuse(key, f"is {config.get(key)}", f"fp4rt knows this activation with {expected}")
    experts = config.integer("num_local_experts", most=1 << 14)
    top_k = config.integer("num_experts_per_tok", most=1 << 10)
    if top_k > experts:
        raise config.refuse("num_experts_per_tok", f"is {top_k}", f"there are {experts} experts")
    bias = config.flag("attention_bias", True)
    # A softmax over the chosen logits is the softmax over all, divided by the chosen ones' sum.
    return Sizes(**DecoderConfig.read(config, qkv_bias=bias, o_bias=bias, windows=tuple(
        window if kind == "sliding_attention" else None for kind in kinds)).__dict__, routing=Routing(experts, top_k))


class SinkAttention(Attention):
    """Attention whose softmax has one more learned logit per head, without a value."""

    def __init__(self, scope: Scope, config: DecoderConfig, shape: AttentionShape, rope: Any, load: Loader):
        super().__init__(scope, config, shape, rope, load)
        self.sinks = load.vector(scope, "sinks", shape.num_heads)


class Experts:
    """The router has a bias, and so have the experts, whose gate and up rows are interleaved in the file."""

    def __init__(self, scope: Scope, sizes: Sizes, load: Loader):
        self.ops, self.routing = load.ops, sizes.routing
        self.router = load.router(scope, "router", sizes.routing.num_experts, sizes.hidden_size, bias=True)
        shape = ExpertShape(sizes.routing.num_experts, sizes.hidden_size, sizes.intermediate_size, interleaved=True,
                            bias=True)
        self.gate_up_proj, self.down_proj = load.experts(scope.at("experts"), shape, sizes.routing.top_k)

    def __call__(self, h: Any, norm: Any) -> Any:
        choice = self.ops.route(h, self.router, self.routing, norm=norm)
        return self.ops.experts(h, choice, self.gate_up_proj, self.down_proj, activation="swiglu_oai", norm=norm,
                                residual=h)


def build(scope: Scope, source: Config, sizes: Sizes, load: Loader, max_positions: int, progress: Progress) -> Decoder:
    return build_decoder(scope, source, sizes, load, max_positions, progress, attention=SinkAttention,
                         mlp=lambda at, i: Experts(at, sizes, load))
