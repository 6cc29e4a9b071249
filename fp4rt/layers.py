"""The blocks that several decoder models use unchanged: attention, gated MLP, the pre-norm layer, the whole decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fp4rt.checkpoint import Scope
from fp4rt.config import Config
from fp4rt.errors import shown
from fp4rt.loading import Loader
from fp4rt.ops import AttentionShape, Linear, MambaShape, Ops
from fp4rt.rope import DEFAULT_THETA, inverse_frequencies

Block = Callable[..., Any]
Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a dense decoder, from config.json in Hugging Face's names.

    qkv_bias, o_bias, mlp_bias: whether those linears have one. qk_norm: RMSNorm on each head of q and k.
    windows: per layer, how many keys a query sees, itself included; None for all. default_theta: the rotary base where
    config.json states none.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    default_theta: float = DEFAULT_THETA

    @staticmethod
    def read(config: Config, **differences: Any) -> DecoderConfig:
        """What all dense decoders spell alike; `differences` are the fields an architecture defines itself."""
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise config.refuse("hidden_act", f"is {shown(config.get('hidden_act'))}", "this architecture uses silu")
        heads = config.integer("num_attention_heads", most=1 << 16)
        kv_heads = config.integer("num_key_value_heads", heads, most=1 << 16)
        hidden = config.integer("hidden_size", most=1 << 20)
        layers = config.integer("num_hidden_layers", most=1 << 14)
        if heads % kv_heads:
            raise config.refuse("num_attention_heads", f"is {heads}", f"not a multiple of num_key_value_heads {kv_heads}")
        if config.get("head_dim", None) is None and hidden % heads:
            raise config.refuse("hidden_size", f"is {hidden}", f"not a multiple of num_attention_heads {heads}")
        fields = dict(
            hidden_size=hidden,
            intermediate_size=config.integer("intermediate_size", most=1 << 22),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=config.integer("head_dim", hidden // heads, most=1024),
            vocab_size=config.integer("vocab_size", most=1 << 24),
            max_position_embeddings=config.integer("max_position_embeddings"),
            rms_norm_eps=config.number("rms_norm_eps", 1e-6, most=1.0),
            tie_word_embeddings=config.flag("tie_word_embeddings"),
            windows=(None,) * layers,
        )
        return DecoderConfig(**{**fields, **differences})

    def attention_shape(self, layer: int) -> AttentionShape:
        return AttentionShape(self.num_attention_heads, self.num_key_value_heads, self.head_dim,
                              self.head_dim**-0.5, self.windows[layer])


class Attention:
    """Grouped-query attention with rotary positions, o_proj added to the residual stream."""

    def __init__(self, scope: Scope, config: DecoderConfig, shape: AttentionShape, rope: Any, load: Loader):
        q, kv, hidden = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim, config.hidden_size
        self.shape, self.rope, self.ops = shape, rope, load.ops
        self.qkv_proj = load.linear(scope, {"q_proj": q, "k_proj": kv, "v_proj": kv}, hidden, bias=config.qkv_bias)
        self.o_proj = load.linear(scope, {"o_proj": hidden}, q, bias=config.o_bias)
        self.q_norm = self.k_norm = self.sinks = None
        if config.qk_norm:
            self.q_norm, self.k_norm = (load.norm(scope, name, shape.head_dim, config.rms_norm_eps)
                                        for name in ("q_norm", "k_norm"))

    def __call__(self, h: Any, norm: Any, batch: Any, pages: Any) -> Any:
        qkv = self.ops.linear(h, self.qkv_proj, norm=norm)
        a = self.ops.attention(qkv, batch, pages, self.shape, rope=self.rope, q_norm=self.q_norm, k_norm=self.k_norm,
                               sinks=self.sinks, then=self.o_proj)
        return self.ops.linear(a, self.o_proj, residual=h)


class GatedMLP:
    """down(silu(gate(x)) * up(x)), added to the residual stream (SwiGLU, Shazeer 2020)."""

    def __init__(self, scope: Scope, config: DecoderConfig, load: Loader):
        inner, hidden, bias = config.intermediate_size, config.hidden_size, config.mlp_bias
        self.ops = load.ops
        self.gate_up_proj = load.linear(scope, {"gate_proj": inner, "up_proj": inner}, hidden, bias=bias, gated=True)
        self.down_proj = load.linear(scope, {"down_proj": hidden}, inner, bias=bias)

    def __call__(self, h: Any, norm: Any) -> Any:
        x = self.ops.linear(h, self.gate_up_proj, norm=norm, activation="silu", then=self.down_proj)
        return self.ops.linear(x, self.down_proj, residual=h)


class DecoderLayer:
    """h + attention(norm(h)), then h + mlp(norm(h)); `mlp` takes the residual stream and its norm."""

    def __init__(self, scope: Scope, config: DecoderConfig, load: Loader, self_attn: Block, mlp: Block):
        self.input_layernorm, self.post_attention_layernorm = (
            load.norm(scope, name, config.hidden_size, config.rms_norm_eps)
            for name in ("input_layernorm", "post_attention_layernorm"))
        self.self_attn, self.mlp = self_attn, mlp

    def __call__(self, h: Any, batch: Any, pages: Any) -> Any:
        h = self.self_attn(h, self.input_layernorm, batch, pages)
        return self.mlp(h, self.post_attention_layernorm)


@dataclass
class Decoder:
    """Embedding, layers, final norm, head. memory[i] says what layers[i] remembers, None for nothing."""

    config: Any  # at least vocab_size and max_position_embeddings
    ops: Ops
    memory: Sequence[AttentionShape | MambaShape | None]
    embed_tokens: Any
    layers: Sequence[Block]
    norm: Any
    lm_head: Linear
    softcap: float | None = None
    prefix: str = "model"

    def residuals(self, batch: Any, pages: Sequence[Any]) -> Iterator[tuple[str, Any]]:
        """The residual stream after the embedding and after each layer, with the name of what produced it."""
        h = self.ops.embed(batch, self.embed_tokens)
        yield f"{self.prefix}.embed_tokens", h
        for i, layer in enumerate(self.layers):
            h = layer(h, batch, pages[i])
            yield f"{self.prefix}.layers.{i}", h

    def __call__(self, batch: Any, pages: Sequence[Any]) -> Any:
        """Logits float32 [R, vocab_size] of the batch's wanted rows; pages: one memory handle per layer."""
        for _, h in self.residuals(batch, pages):
            pass
        return self.ops.logits(h, batch, self.norm, self.lm_head, softcap=self.softcap)


def build_decoder(scope: Scope, source: Config, config: DecoderConfig, load: Loader, max_positions: int,
                  progress: Progress, *, attention: Callable[..., Block] = Attention,
                  mlp: Callable[[Scope, int], Block] | None = None) -> Decoder:
    """A decoder of pre-norm layers in Llama's tensor names; `attention` and `mlp` make the blocks that differ."""
    memory = [load.remembered(scope.at(f"model.layers.{i}.self_attn"), config.attention_shape(i))
              for i in range(config.num_hidden_layers)]
    rope = load.ops.rope_table(*inverse_frequencies(source, config.head_dim, config.default_theta), max_positions)
    embed_tokens, lm_head = load.embedding_and_head(
        scope.at("model.embed_tokens"), scope.at("lm_head"), config.vocab_size, config.hidden_size,
        tied=config.tie_word_embeddings)
    norm = load.norm(scope, "model.norm", config.hidden_size, config.rms_norm_eps)
    layers = []
    for i in progress(range(config.num_hidden_layers)):
        at = scope.at(f"model.layers.{i}")
        layers.append(DecoderLayer(at, config, load, attention(at.at("self_attn"), config, memory[i], rope, load),
                                   mlp(at.at("mlp"), i) if mlp else GatedMLP(at.at("mlp"), config, load)))
    return Decoder(config, load.ops, memory, embed_tokens, layers, norm, lm_head)
