"""Figures for Prometheus under vLLM's names, with the prefix fp4rt: in place of vllm:."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from fp4rt.async_llm import AsyncLLM, Delta, Request

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5, 10, 20, 40, 80, 160, 320)
TOKENS = tuple(2**i for i in range(0, 18))


class Metrics:
    """A registry of its own: counters as requests go by, and the engine's state when it is asked for."""

    def __init__(self, llm: AsyncLLM, model: str):
        self.registry = CollectorRegistry()
        self._llm, self._model = llm, model

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"fp4rt:{name}", text, ["model_name"], registry=self.registry, buckets=buckets)
            return made.labels(model)

        self._first = histogram("time_to_first_token_seconds", "From a request to its first token.", SECONDS)
        self._between = histogram("inter_token_latency_seconds", "Between one token and the next.", SECONDS)
        self._whole = histogram("e2e_request_latency_seconds", "From a request to its last token.", SECONDS)
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._generation = histogram("request_generation_tokens", "Tokens of a reply.", TOKENS)
        self.responses = Counter("fp4rt:http_responses", "Responses by path and status.", ["path", "status"],
                                 registry=self.registry)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)  # memory, processor time and open files, under their usual names

    async def watch(self, request: Request) -> AsyncIterator[Delta]:
        """The request's deltas, counted as they come."""
        started = last = time.perf_counter()
        seen = 0
        async for delta in request:
            now = time.perf_counter()
            new = delta.generated_tokens - seen
            if seen == 0 and new:
                self._first.observe(now - started)
            elif new:
                self._between.observe((now - last) / new)
            seen, last = delta.generated_tokens, now
            yield delta
            if delta.finish_reason:
                self._whole.observe(now - started)
                self._prompt.observe(delta.prompt_tokens)
                self._generation.observe(seen)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """The engine's state, for the registry."""
        stats = self._llm.stats()
        for kind, name, text, value in (
                (GaugeMetricFamily, "num_requests_running", "Requests in the steps.", stats.running),
                (GaugeMetricFamily, "num_requests_waiting", "Requests that wait to be run.", stats.waiting),
                (GaugeMetricFamily, "kv_cache_usage_perc", "Share of the K/V pages in use, 0 to 1.",
                 stats.kv_pages_in_use / max(1, stats.kv_pages)),
                (CounterMetricFamily, "prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_tokens_asked),
                (CounterMetricFamily, "prefix_cache_hits", "Prompt tokens found.", stats.prefix_tokens_found),
                (CounterMetricFamily, "spec_decode_num_draft_tokens", "Tokens guessed.", stats.drafted_tokens),
                (CounterMetricFamily, "spec_decode_num_accepted_tokens", "Guesses that were right.",
                 stats.accepted_tokens),
                (CounterMetricFamily, "num_preemptions", "Requests set back to be computed again.", stats.preemptions),
                (CounterMetricFamily, "prompt_tokens", "Prompt tokens taken in.", stats.prompt_tokens),
                (CounterMetricFamily, "generation_tokens", "Tokens generated.", stats.generated_tokens)):
            family = kind(f"fp4rt:{name}", text, labels=["model_name"])
            family.add_metric([self._model], value)
            yield family
        finished = CounterMetricFamily("fp4rt:request_success", "Requests that ended, by reason.",
                                       labels=["model_name", "finished_reason"])
        for reason, count in sorted(stats.finished.items()):
            finished.add_metric([self._model, reason], count)
        yield finished

    def text(self) -> bytes:
        """The exposition format that Prometheus scrapes."""
        return generate_latest(self.registry)
