"""vLLM as the engine. It pins its own transformers, so it lives in an environment of its own (`make vllm`); nothing of
this is imported unless `engine: vllm` is set."""


def register() -> None:
    """vLLM calls this in each of its processes (entry point vllm.general_plugins, pyproject.toml)."""
    from vllm import ModelRegistry

    import owl_model.modeling
    import owl_model.processing  # noqa: F401  both make Owl known to transformers

    ModelRegistry.register_model("OwlForConditionalGeneration", "pipelines.serving.vllm.model:OwlForVllm")
