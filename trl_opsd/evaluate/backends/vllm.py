"""vLLM in this process."""

import importlib.util
import json
import os
import uuid
from collections.abc import Container, Iterator

from accelerate import PartialState

from ...cli import UserError, check_vllm
from ..checkpoint import base_of
from ..config import EvaluateConfig
from .engine import Request, Sampling


def has_vllm() -> bool:
    """Whether vLLM is installed here."""
    return importlib.util.find_spec("vllm") is not None


class VllmEngine:
    """
    vLLM in this process.

    Args:
        config ([`EvaluateConfig`]):
            The checkpoint, its precision, the number of completions at a time, and `vllm_kwargs`.

    Raises:
        UserError: If vLLM is not installed, or is a version that is not supported.
    """

    def __init__(self, config: EvaluateConfig):
        # Its core in this process: no second one to lose track of, and one peak of memory to read
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        check_vllm("`backend: vllm` needs")
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        self._params, self._kind = SamplingParams, RequestOutputKind
        path = config.model_name_or_path
        base = base_of(path)
        if "worker_extension_cls" in (config.vllm_kwargs or {}):
            raise UserError(
                "`vllm_kwargs` has `worker_extension_cls`, by which memory is measured here: leave it out."
            )
        options = {}
        if base != path:
            with open(os.path.join(path, "adapter_config.json"), encoding="utf-8") as file:
                options = {"enable_lora": True, "max_lora_rank": json.load(file)["r"]}
        if PartialState().num_processes > 1:  # each with an engine of its own, which starts no processes
            options["distributed_executor_backend"] = "external_launcher"
        self.lora = LoRARequest("adapter", 1, path) if base != path else None
        self.engine = LLM(
            model=base,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            max_num_seqs=config.batch_size,
            worker_extension_cls="trl_opsd.evaluate.memory.WorkerMemory",
            **{**options, **(config.vllm_kwargs or {})},
        ).llm_engine
        self.count = 0

    def generate(
        self, requests: list[Request], sampling: Sampling, done: Container[int] = ()
    ) -> Iterator[tuple[int, list[int]]]:
        under_way = {}
        for index, request in enumerate(requests):
            if index not in done:
                under_way[self._add(request, sampling, self._kind.FINAL_ONLY)] = index
        while under_way:
            for output in self.engine.step():
                if output.finished:
                    yield under_way.pop(output.request_id), list(output.outputs[0].token_ids)

    def serve(self, requests, sampling, concurrency, on_start, on_token) -> None:
        under_way, position = {}, 0
        salt = uuid.uuid4().hex  # what was cached without it is not found
        while under_way or position < len(requests):
            while len(under_way) < concurrency and position < len(requests):
                on_start(position)
                under_way[self._add(requests[position], sampling, self._kind.DELTA, salt)] = position
                position += 1
            for output in self.engine.step():
                for _ in output.outputs[0].token_ids:
                    on_token(under_way[output.request_id])
                if output.finished:
                    del under_way[output.request_id]

    def reset_peak_memory(self) -> None:
        self.engine.collective_rpc("reset_worker_memory")

    def peak_memory(self) -> int:
        return sum(self.engine.collective_rpc("worker_memory"))  # one process for each part of the model

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self.engine.engine_core.shutdown()
        del self.engine
        cleanup_dist_env_and_memory()

    def _add(self, request: Request, sampling: Sampling, kind, salt: str | None = None) -> str:
        params = self._params(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=sampling.limit(request),
            stop_token_ids=list(sampling.eos_ids),
            stop=list(sampling.stop),
            seed=request.seed if sampling.temperature > 0 else None,
            detokenize=bool(sampling.stop),  # which is how it finds them
            output_kind=kind,
        )
        self.count += 1
        name = str(self.count)
        prompt = {"prompt_token_ids": request.prompt_ids} | ({} if salt is None else {"cache_salt": salt})
        self.engine.add_request(name, prompt, params, lora_request=self.lora)
        return name
