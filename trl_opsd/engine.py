"""What the trainers of all stages need to know of TRL's vLLM engine."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps

from trl.generation.vllm_generation import VLLMGeneration


def around_syncs(engine: VLLMGeneration, *contexts: Callable[[], AbstractContextManager]) -> None:
    """
    Enters contexts around every push of the weights, whoever asks for it: the trainer after a step, and the engine itself,
    whose sleep forgets them.

    Args:
        engine ([`~trl.generation.vllm_generation.VLLMGeneration`]):
            Engine.
        *contexts (`Callable`):
            Context managers.
    """
    sync_weights = engine.sync_weights

    @wraps(sync_weights)
    def guarded() -> None:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            sync_weights()

    engine.sync_weights = guarded


@contextmanager
def awake(engine: VLLMGeneration) -> Iterator[None]:
    """
    Inside, an engine in sleep mode that has generated stays awake, and goes to sleep at the end. By itself it goes to sleep
    after each call, and because its sleep forgets the weights, a push of all of them precedes each one.

    Args:
        engine ([`~trl.generation.vllm_generation.VLLMGeneration`]):
            Engine.
    """
    if engine.mode != "colocate" or not engine.enable_sleep_mode:
        yield
        return
    generate = engine.generate

    def woken(*args, **kwargs):
        if engine.enable_sleep_mode:
            if engine._llm_weights_sleeping:
                engine.sync_weights()
            engine.llm.wake_up(tags=["kv_cache"])
            engine.enable_sleep_mode = False  # to `generate` it is an engine that is always awake
        return generate(*args, **kwargs)

    engine.generate = woken
    try:
        yield
    finally:
        engine.generate = generate
        if not engine.enable_sleep_mode:
            engine.enable_sleep_mode = True
            engine.llm.sleep(level=2)
            engine._llm_weights_sleeping = True
