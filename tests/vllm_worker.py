"""A command line whose engine has an accident, or whose server cannot be sent weights because there is no GPU."""

import importlib
import sys
from unittest import mock


def even(completions, **kwargs) -> list[float]:
    """A verifier for models that know nothing: right is what has an even number of characters."""
    return [float(len(completion[0]["content"]) % 2 == 0) for completion in completions]


def main(stage: str, accident: str, *arguments: str) -> None:
    from trl.generation.vllm_client import VLLMClient
    from vllm import LLM

    calls, generate, send = [], LLM.generate, VLLMClient.generate

    def dies(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("EngineCore encountered an issue.\nSee stack trace above for the root cause.")
        return generate(self, *args, **kwargs)

    def gone(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            self.base_url = "http://127.0.0.1:9"  # where nobody listens
            self.session.adapters["http://"].max_retries.total = 0
        return send(self, *args, **kwargs)

    def walk(self, metadata, named_params):
        assert [name for name, *_ in metadata] == [name for name, _ in named_params]

    run = importlib.import_module(f"trl_opsd.{stage}.run")
    patches = {"engine dies": [mock.patch.object(LLM, "generate", dies)]}
    patches["server"] = [
        mock.patch.object(run, "check_engine"),
        mock.patch.object(VLLMClient, "init_communicator"),
        mock.patch.object(VLLMClient, "update_named_params", walk),
    ]
    patches["server goes"] = [*patches["server"], mock.patch.object(VLLMClient, "generate", gone)]
    for patch in patches[accident]:
        patch.start()
    importlib.import_module(f"trl_opsd.{stage}.__main__").main(list(arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
