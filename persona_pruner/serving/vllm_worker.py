"""vLLM's `worker_extension_cls`: what the front end may ask a worker.

Every worker imports it before it loads a model, with or without the entry point: an engine that was started with our
options never runs without masks.
"""

from persona_pruner.serving.vllm_plugin import register

register()


class PersonaWorker:
    def persona_stats(self) -> dict[str, float]:
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        compact = model.compact_ffns.stats() if model.compact_ffns else {}
        return model.mask_table.stats() | compact
