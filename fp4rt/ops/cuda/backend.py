"""CudaOps: the operations of ops.Ops on one GPU, each handed to the module that wraps its kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import cupy
import numpy as np

from fp4rt.batch import Batch
from fp4rt.errors import Fp4rtError
from fp4rt.formats import Weight
from fp4rt.ops import AttentionShape, MambaShape, SamplerRow
from fp4rt.ops.cuda import attention, batch, embedding, linear, rms_norm, sample
from fp4rt.ops.cuda.activation import Activation
from fp4rt.ops.cuda.device import Device, Fetched


def missing(what: str) -> Fp4rtError:
    return Fp4rtError("device", f"the CUDA backend does not run {what} yet; use device='reference'")


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

    deterministic: one kernel family for any number of tokens, so a token's numbers never depend on its company.
    """

    name = "cuda"
    step_tokens = 2048
    lookahead = 8

    def __init__(self, arch: str | None = None, gpu_memory: int | None = None, deterministic: bool = False):
        self.gpu = Device(arch, gpu_memory)
        self.device = f"{self.gpu.name} ({self.gpu.arch})"
        self.deterministic = deterministic

    # -- At load --------------------------------------------------------------------------------------------------

    def linear_weight(self, parts: Sequence[Weight], *, gated: bool = False) -> linear.CudaLinear:
        return linear.linear_weight(self.gpu, parts, gated=gated)

    def norm_weight(self, weight: np.ndarray, eps: float) -> rms_norm.Norm:
        return rms_norm.norm_weight(self.gpu, weight, eps)

    def expert_weight(self, experts: Sequence[Sequence[Weight]], *, gated: bool = False) -> Any:
        raise missing("mixtures of experts")

    def mamba_weight(self, shape: MambaShape, *values: Any) -> Any:
        raise missing("Mamba2 layers")

    def embedding_weight(self, weight: Weight, *, tied_to: linear.CudaLinear | None = None,
                         scale: float = 1.0) -> embedding.Embedding:
        if scale != 1.0:
            raise missing("scaled embeddings")
        return embedding.embedding_weight(self.gpu, weight, tied_to=tied_to)

    def rope_table(self, inv_freq: np.ndarray, attention_factor: float, max_positions: int) -> cupy.ndarray:
        return attention.rope_table(self.gpu, inv_freq, attention_factor, max_positions)

    def kv_pages(self, shape: AttentionShape, num_pages: int, group: int = 0) -> attention.Pages:
        return attention.kv_pages(self.gpu, shape, num_pages, group)

    def kv_page_bytes(self, shape: AttentionShape) -> int:
        return attention.kv_page_bytes(shape)

    # -- A step ---------------------------------------------------------------------------------------------------

    def batch(self, work: Batch, into: batch.DeviceBatch | None = None) -> batch.DeviceBatch:
        return batch.put_batch(self.gpu, work, into)

    def embed(self, work: batch.DeviceBatch, table: embedding.Embedding) -> cupy.ndarray:
        return embedding.embed(self.gpu, work.tokens, table)

    def linear(self, x: cupy.ndarray | Activation, weight: linear.CudaLinear, *, norm: rms_norm.Norm | None = None,
               activation: str | None = None, residual: cupy.ndarray | None = None) -> cupy.ndarray | Activation:
        if norm is not None:
            x = rms_norm.rms_norm(self.gpu, x, norm)
        return linear.linear(self.gpu, x, weight, activation=activation, residual=residual,
                             deterministic=self.deterministic)

    def attention(self, qkv: Activation, work: batch.DeviceBatch, pages: attention.Pages, shape: AttentionShape, *,
                  rope: cupy.ndarray | None, q_norm: rms_norm.Norm | None = None,
                  k_norm: rms_norm.Norm | None = None, v_norm: rms_norm.Norm | None = None,
                  sinks: Any = None) -> Activation:
        if v_norm is not None or sinks is not None or shape.values_are_keys or shape.shares is not None:
            raise missing("attention of this kind")
        return attention.attention(self.gpu, qkv, work, pages, shape, rope=rope, q_norm=q_norm, k_norm=k_norm,
                                   deterministic=self.deterministic)

    def logits(self, h: cupy.ndarray, work: batch.DeviceBatch, norm: rms_norm.Norm, head: linear.CudaLinear, *,
               softcap: float | None = None) -> cupy.ndarray:
        if softcap is not None:
            raise missing("softcapped logits")
        if not work.is_decode:
            h = embedding.gather_rows(self.gpu, work.rows, h)
        return linear.linear(self.gpu, rms_norm.rms_norm(self.gpu, h, norm), head, logits=True,
                             deterministic=self.deterministic)

    # -- Tokens ---------------------------------------------------------------------------------------------------

    def sampler(self, rows: Sequence[SamplerRow], vocab_size: int,
                into: sample.Sampler | None = None) -> sample.Sampler:
        return sample.put_sampler(self.gpu, rows, vocab_size, into)

    def sample(self, logits: cupy.ndarray, sampler: sample.Sampler) -> cupy.ndarray:
        return sample.sample(self.gpu, logits, sampler)

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
                graph = self.gpu.stream.end_capture()

        def replay() -> Any:
            with self.gpu:
                graph.launch(self.gpu.stream)
            return result

        return replay

    def is_finite(self, x: cupy.ndarray) -> bool:
        return batch.is_finite(self.gpu, x)

    # -- Room -----------------------------------------------------------------------------------------------------

    def free_memory(self) -> int:
        return self.gpu.budget.free()

    def reserve(self, step: Callable[[], object]) -> int:
        self.gpu.reserve(0)
        nbytes = self.gpu.rehearse(step)
        if nbytes > self.gpu.budget.free():
            raise Fp4rtError("memory", f"one step's work needs {nbytes / 2**20:.0f} MiB of GPU memory and "
                                       f"{self.gpu.budget.free() / 2**20:.0f} MiB are free; use a smaller model or "
                                       "free GPU memory")
        self.gpu.reserve(nbytes)
        return nbytes

    def synchronize(self) -> None:
        self.gpu.stream.synchronize()

    def close(self) -> None:
        self.gpu.close()
