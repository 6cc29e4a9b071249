"""CudaOps: the operations of ops.Ops on one GPU, each handed to the module that wraps its kernel."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import cupy
import numpy as np

from fp4rt.batch import Batch
from fp4rt.errors import Fp4rtError
from fp4rt.formats import Weight
from fp4rt.ops import AttentionShape, MambaShape, Routing, SamplerRow
from fp4rt.ops.cuda import (attention, batch, embedding, experts, layouts, linear, logprobs, mamba, merge, per_layer,
                            rms_norm, route, sample, warpgroup)
from fp4rt.ops.cuda.activation import Activation
from fp4rt.ops.cuda.copies import Fetched
from fp4rt.ops.cuda.device import Device

_BESIDE_TOKENS = 256  # measured up to 32, where it gains 3 % of a step; a prompt of thousands fills the chip by itself


def _on_device(cls: type) -> type:
    """Every public method runs with the device's context current and leaves the thread's own as it was."""
    def wrap(method: Callable) -> Callable:
        @functools.wraps(method)
        def run(self: CudaOps, *args: Any, **kwargs: Any) -> Any:
            with self.gpu:
                return method(self, *args, **kwargs)
        return run

    for name, member in vars(cls).copy().items():
        if callable(member) and not name.startswith("_"):
            setattr(cls, name, wrap(member))
    return cls


@_on_device
class CudaOps:
    """Ops on the current CUDA device; see Device for `arch` and `gpu_memory` (bytes).

    deterministic: one order of additions for any number of tokens, so a token's numbers never depend on its company.
    """

    name = "cuda"
    notice = ""
    step_tokens = 2048
    lookahead = 4
    shared_as_experts = True  # linears of a few MB cost the time between kernels, not that of their bytes

    def __init__(self, arch: str | None = None, gpu_memory: int | None = None, deterministic: bool = False):
        self.gpu = Device(arch, gpu_memory)
        self.device = f"{self.gpu.name} ({self.gpu.arch})"
        self.deterministic = deterministic
        self._prepared: dict[ModuleType, set[str]] = {linear: set(), experts: set()}
        for module in (embedding, batch, sample, logprobs):  # what any model may launch first after loading
            for stem, defines, _ in module.variants(self.gpu.capability):
                self.gpu.prepare(stem, defines)

    # -- At load --------------------------------------------------------------------------------------------------

    def linear_weight(self, parts: Sequence[Weight], *, gated: bool = False) -> linear.CudaLinear:
        self._prepare(linear, parts)
        return linear.linear_weight(self.gpu, parts, gated=gated)

    def _prepare(self, module: ModuleType, parts: Sequence[Weight]) -> None:
        """Compile what linears of these formats may launch, while their bytes are on the way."""
        stems = {layouts.choose_layout(part)[0].stem for part in parts} - self._prepared[module]
        self._prepared[module] |= stems
        for stem, defines, _ in module.variants(self.gpu.capability) if stems else ():
            needed = self.deterministic or "SUM_WARPS" not in defines
            if stem in stems and needed and not warpgroup.replaces(self.gpu, defines):
                self.gpu.prepare(stem, defines)

    def norm_weight(self, weight: np.ndarray, eps: float) -> rms_norm.Norm:
        return rms_norm.norm_weight(self.gpu, weight, eps)

    def expert_weight(self, weights: Sequence[Sequence[Weight]], *, gated: bool = False) -> experts.CudaExperts:
        self._prepare(experts, weights[0])
        return experts.expert_weight(self.gpu, weights, gated=gated)

    def vector(self, values: np.ndarray) -> route.Vector:
        return route.vector(self.gpu, values)

    def embedding_weight(self, weight: Weight, *, tied_to: linear.CudaLinear | None = None,
                         scale: float = 1.0) -> embedding.Embedding:
        return embedding.embedding_weight(self.gpu, weight, tied_to=tied_to, scale=scale)

    def host_embedding_weight(self, weight: Weight, scale: float) -> per_layer.HostTable:
        return per_layer.host_table(self.gpu, weight, scale)

    def rope_table(self, inv_freq: np.ndarray, attention_factor: float, max_positions: int) -> cupy.ndarray:
        return attention.rope_table(self.gpu, inv_freq, attention_factor, max_positions)

    def kv_pages(self, shape: AttentionShape, num_pages: int, group: int = 0) -> attention.Pages:
        return attention.kv_pages(self.gpu, shape, num_pages, group)

    def kv_page_bytes(self, shape: AttentionShape) -> int:
        return attention.kv_page_bytes(shape)

    def mamba_weight(self, shape: MambaShape, conv: np.ndarray, conv_bias: np.ndarray, A: np.ndarray, D: np.ndarray,
                     dt_bias: np.ndarray, norm: np.ndarray, eps: float) -> mamba.Mamba:
        return mamba.mamba_weight(self.gpu, shape, conv, conv_bias, A, D, dt_bias, norm, eps)

    def mamba_state(self, shape: MambaShape, num_slots: int) -> mamba.State:
        return mamba.mamba_state(self.gpu, shape, num_slots)

    def mamba_state_bytes(self, shape: MambaShape) -> int:
        return mamba.mamba_state_bytes(shape)

    # -- A step ---------------------------------------------------------------------------------------------------

    def batch(self, work: Batch, into: batch.DeviceBatch | None = None) -> batch.DeviceBatch:
        return batch.put_batch(self.gpu, work, into)

    def feed(self, work: batch.DeviceBatch, ids: cupy.ndarray) -> None:
        batch.feed(self.gpu, work, ids)

    def embed(self, work: batch.DeviceBatch, table: embedding.Embedding) -> cupy.ndarray:
        return embedding.embed(self.gpu, work.tokens, table)

    def linear(self, x: cupy.ndarray | Activation, weight: linear.CudaLinear, *, norm: rms_norm.Norm | None = None,
               activation: str | None = None, residual: cupy.ndarray | None = None,
               then: linear.CudaLinear | None = None) -> cupy.ndarray | Activation:
        if norm is not None:
            x = rms_norm.Normed(x, norm)
        y = linear.linear(self.gpu, x, weight, activation=activation, residual=residual,
                          deterministic=self.deterministic, then=then)
        return y if norm is not None or x.rows is None else dataclasses.replace(y, rows=x.rows)

    def attention(self, qkv: Activation, work: batch.DeviceBatch, pages: attention.Pages, shape: AttentionShape, *,
                  rope: cupy.ndarray | None, q_norm: rms_norm.Norm | None = None,
                  k_norm: rms_norm.Norm | None = None, v_norm: rms_norm.Norm | None = None,
                  sinks: route.Vector | None = None, then: linear.CudaLinear | None = None) -> Activation:
        return attention.attention(self.gpu, qkv, work, pages, shape, rope=rope, q_norm=q_norm, k_norm=k_norm,
                                   v_norm=v_norm, sinks=sinks and sinks.data, then=then,
                                   deterministic=self.deterministic)

    def route(self, x: cupy.ndarray | Activation, router: linear.CudaLinear, routing: Routing, *,
              norm: rms_norm.Norm | None = None, correction: route.Vector | None = None,
              expert_scale: route.Vector | None = None, experts_norm: rms_norm.Norm | None = None,
              beside: bool = False) -> route.Choice:
        with self.gpu.beside() if beside and x.shape[0] <= _BESIDE_TOKENS else contextlib.nullcontext():
            return route.route(self.gpu, x, router, routing, norm, correction, expert_scale, experts_norm or norm,
                               self.deterministic)

    def experts(self, x: cupy.ndarray | Activation, choice: route.Choice, up: experts.CudaExperts,
                down: experts.CudaExperts, *, activation: str, norm: rms_norm.Norm | None = None,
                residual: cupy.ndarray | None = None) -> cupy.ndarray | Activation:
        self.gpu.join()
        if norm is not None:
            kept = choice.normed
            x = kept if kept and kept.x is x and kept.norm is norm else rms_norm.Normed(x, norm)
            x = x.computed(self.gpu)
        return experts.experts(self.gpu, x, choice, up, down, activation=activation, residual=residual,
                               deterministic=self.deterministic)

    def merge(self, residual: cupy.ndarray, branches: Sequence[tuple[Any, rms_norm.Norm | None]], *,
              norm: rms_norm.Norm | None = None, scale: float = 1.0) -> cupy.ndarray:
        return merge.merge(self.gpu, residual, branches, norm, scale)

    def per_layer_inputs(self, h: cupy.ndarray, work: batch.DeviceBatch, table: per_layer.HostTable,
                         projection: linear.CudaLinear, norm: rms_norm.Norm) -> Activation:
        return per_layer.per_layer_inputs(self.gpu, h, work.tokens, table, projection, norm,
                                          deterministic=self.deterministic)

    def per_layer_gate(self, h: cupy.ndarray, gate: linear.CudaLinear, inputs: Activation, layer: int) -> Activation:
        return per_layer.per_layer_gate(self.gpu, h, gate, inputs, layer, deterministic=self.deterministic)

    def mamba(self, projected: Activation, work: batch.DeviceBatch, state: mamba.State, weight: mamba.Mamba,
              shape: MambaShape) -> Activation:
        return mamba.mamba(self.gpu, projected, work, state, weight, shape)

    def copy_mamba_state(self, state: mamba.State, source: int, target: int) -> None:
        mamba.copy_mamba_state(self.gpu, state, source, target)

    def logits(self, h: cupy.ndarray, work: batch.DeviceBatch, norm: rms_norm.Norm, head: linear.CudaLinear, *,
               softcap: float | None = None) -> cupy.ndarray:
        if not work.is_decode:
            h = embedding.gather_rows(self.gpu, work.rows, h)
        y = linear.linear(self.gpu, rms_norm.Normed(h, norm), head, logits=True,
                          deterministic=self.deterministic)
        return y if softcap is None else embedding.softcap(self.gpu, y, softcap)

    # -- Tokens ---------------------------------------------------------------------------------------------------

    def sampler(self, rows: Sequence[SamplerRow], vocab_size: int,
                into: sample.Sampler | None = None) -> sample.Sampler:
        return sample.put_sampler(self.gpu, rows, vocab_size, into)

    def batch_bytes(self, sequences: int, pages: int) -> int:
        return batch.batch_bytes(sequences, pages)

    def sampler_bytes(self, vocab_size: int) -> int:
        return sample.sampler_bytes(vocab_size)

    def history(self, prompt: Sequence[int], generated: Sequence[int], vocab_size: int) -> cupy.ndarray:
        return sample.count_tokens(self.gpu, prompt, generated, vocab_size)

    def sample(self, logits: cupy.ndarray, sampler: sample.Sampler) -> cupy.ndarray:
        return sample.sample(self.gpu, logits, sampler)

    def logprobs(self, logits: cupy.ndarray, ids: cupy.ndarray | np.ndarray, top: int) -> cupy.ndarray:
        return logprobs.logprobs(self.gpu, logits, ids, top)

    def advance(self, work: batch.DeviceBatch, ids: cupy.ndarray) -> None:
        batch.advance(self.gpu, work, ids)

    def fetch(self, array: cupy.ndarray) -> Fetched:
        return self.gpu.fetch(array)

    def record(self, step: Callable[[], Any]) -> Callable[[], Any]:
        self.gpu.rehearse(step)  # loads kernels and bounds, which a capture must not
        with self.gpu.stream:
            self.gpu.stream.begin_capture()
            try:
                result = step()
            finally:
                self.gpu.join()
                graph = self.gpu.stream.end_capture()

        def replay() -> Any:
            with self.gpu:
                self.gpu.drain()
                graph.launch(self.gpu.stream)
            return result

        return replay

    def is_finite(self, x: cupy.ndarray) -> bool:
        return batch.is_finite(self.gpu, x)

    # -- Room -----------------------------------------------------------------------------------------------------

    def free_memory(self) -> int:
        return self.gpu.budget.free()

    def expect(self, nbytes: int) -> None:
        self.gpu.memory.reserve(nbytes)

    def reserve(self, step: Callable[[], object]) -> int:
        self.gpu.reserve(0)
        nbytes = self.gpu.rehearse(step)
        if nbytes > self.gpu.budget.free():
            raise Fp4rtError("memory", f"one step's work needs {nbytes / 2**20:.0f} MiB of GPU memory and "
                                       f"{self.gpu.budget.free() / 2**20:.0f} MiB are free; use a smaller model or "
                                       "free GPU memory")
        self.gpu.reserve(nbytes)
        return nbytes

    def rehearse(self, step: Callable[[], object]) -> None:
        self.gpu.rehearse(step)

    def synchronize(self) -> None:
        self.gpu.synchronize()

    def close(self) -> None:
        self.gpu.close()
