"""What generates: transformers, vLLM in this process, or a server that runs or is started. A backend is a class that is an [`Engine`]."""

from transformers import PreTrainedTokenizerBase

from ..checkpoint import Checkpoint
from ..config import EvaluateConfig
from ..thinking import find_tags
from .engine import Engine, Request, Sampling
from .server import ChatFormat, ServerEngine, served_model
from .started import StartedServer
from .transformers import TransformersEngine, load_model
from .vllm import VllmEngine, has_vllm


__all__ = ["Engine", "Request", "Sampling", "ServerEngine", "TransformersEngine", "VllmEngine", "load_engine"]
__all__ += ["ChatFormat", "StartedServer", "has_vllm", "served_model"]


def load_engine(config: EvaluateConfig, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """
    Loads a checkpoint in its backend.

    Args:
        config ([`EvaluateConfig`]):
            Which backend, and how.
        checkpoint ([`~trl_opsd.evaluate.checkpoint.Checkpoint`]):
            What is loaded, unless a server has it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.

    Returns:
        [`Engine`]: What generates.

    Raises:
        UserError: If the weights are not those of the model or not finite, or the backend is not there.
    """
    if checkpoint.model is not None:
        return TransformersEngine(checkpoint.model, tokenizer.pad_token_id, config.batch_size, tokenizer)
    if config.backend == "server" and config.server_url is not None:
        tags = find_tags(tokenizer, config.thinking_tags)
        chat = ChatFormat(tokenizer, tags, config.chat_template_kwargs) if config.server_api == "chat" else None
        return ServerEngine(config.server_url, config.server_model, config.batch_size, chat)
    checkpoint.check_loadable()
    if config.backend == "server":
        return StartedServer(config)
    if config.backend == "vllm":
        return VllmEngine(config)
    return TransformersEngine(load_model(config), tokenizer.pad_token_id, config.batch_size, tokenizer)
