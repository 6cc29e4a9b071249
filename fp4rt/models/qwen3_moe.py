"""Qwen3-MoE (Yang et al. 2025): Qwen3 whose MLP is, on sparse layers, the sum of a few of many small experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fp4rt.checkpoint import Scope
from fp4rt.config import Config
from fp4rt.formats import ExpertShape
from fp4rt.layers import Decoder, DecoderConfig, GatedMLP, Progress, build_decoder
from fp4rt.loading import Loader
from fp4rt.models.qwen3 import read as read_qwen3
from fp4rt.ops import Routing


@dataclass(frozen=True)
class Sizes(DecoderConfig):
    """sparse[i]: whether layer i has experts, of width moe_intermediate_size, instead of a dense MLP."""

    routing: Routing = Routing(1, 1)
    moe_intermediate_size: int = 0
    sparse: tuple[bool, ...] = ()


def read(config: Config) -> Sizes:
    dense = read_qwen3(config)
    experts = config.integer("num_experts", None, most=1 << 14) or config.integer("num_local_experts", most=1 << 14)
    top_k = config.integer("num_experts_per_tok", most=1 << 10)
    if top_k > experts:
        raise config.refuse("num_experts_per_tok", f"is {top_k}", f"there are {experts} experts")
    window = config.integer("sliding_window") if config.flag("use_sliding_window") else None
    step = config.integer("decoder_sparse_step", 1)
    only_dense = config.get("mlp_only_layers", [])
    if not isinstance(only_dense, list) or not all(isinstance(i, int) for i in only_dense):
        raise config.refuse("mlp_only_layers", f"is {str(only_dense)[:80]}", "expected a list of layer numbers")
    windows = (window,) * dense.num_hidden_layers  # unlike the dense models, whatever max_window_layers says
    return Sizes(**dense.__dict__ | {"windows": windows},
                 routing=Routing(experts, top_k, normalize=config.flag("norm_topk_prob")),
                 moe_intermediate_size=config.integer("moe_intermediate_size", most=1 << 20),
                 sparse=tuple(i not in only_dense and (i + 1) % step == 0 for i in range(dense.num_hidden_layers)))


class SparseMLP:
    """The router's softmax picks top_k experts; their gated MLPs, weighed, are added to the residual stream."""

    def __init__(self, scope: Scope, sizes: Sizes, load: Loader):
        self.ops, self.routing = load.ops, sizes.routing
        self.gate = load.router(scope, "gate", sizes.routing.num_experts, sizes.hidden_size)
        self.gate_up_proj, self.down_proj = load.experts(
            scope.at("experts"), ExpertShape(sizes.routing.num_experts, sizes.hidden_size, sizes.moe_intermediate_size),
            sizes.routing.top_k)

    def __call__(self, h: Any, norm: Any) -> Any:
        choice = self.ops.route(h, self.gate, self.routing, norm=norm)
        return self.ops.experts(h, choice, self.gate_up_proj, self.down_proj, activation="silu", norm=norm, residual=h)


def build(scope: Scope, source: Config, sizes: Sizes, load: Loader, max_positions: int, progress: Progress) -> Decoder:
    return build_decoder(scope, source, sizes, load, max_positions, progress, mlp=lambda at, i: (
        SparseMLP(at, sizes, load) if sizes.sparse[i] else GatedMLP(at, sizes, load)))
