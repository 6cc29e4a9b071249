"""Mixtral (Jiang et al. 2024): Mistral whose MLP is the sum of a few of many experts, called w1, w3 and w2."""

from __future__ import annotations

from fp4rt.checkpoint import Scope
from fp4rt.config import Config
from fp4rt.layers import Decoder, Progress, build_decoder
from fp4rt.loading import Loader
from fp4rt.models.mistral import read as read_mistral
from fp4rt.models.qwen3_moe import Sizes, SparseMLP
from fp4rt.ops import Routing


def read(config: Config) -> Sizes:
    dense = read_mistral(config, default_window=None)
    experts = config.integer("num_local_experts", most=1 << 14)
    top_k = config.integer("num_experts_per_tok", most=1 << 10)
    if top_k > experts:
        raise config.refuse("num_experts_per_tok", f"is {top_k}", f"there are {experts} experts")
    return Sizes(**dense.__dict__ | {"default_theta": 1e6}, routing=Routing(experts, top_k),
                 moe_intermediate_size=dense.intermediate_size)


def build(scope: Scope, source: Config, sizes: Sizes, load: Loader, max_positions: int, progress: Progress) -> Decoder:
    def mlp(at: Scope, i: int) -> SparseMLP:
        """Published files call it block_sparse_moe; transformers 5 calls it mlp."""
        return SparseMLP(at if at.has("gate.weight") else scope.at(f"model.layers.{i}.block_sparse_moe"), sizes, load)

    return build_decoder(scope, source, sizes, load, max_positions, progress, mlp=mlp)
