"""vLLM's modules as far as our start of an engine looks at them, where vLLM is not installed."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from unittest import mock


@contextmanager
def fake_vllm(
    dispatch: Callable = lambda layer, remove_weight: None, on_cpu: bool = True
) -> Iterator[SimpleNamespace]:
    """
    Inside, they can be imported.

    Args:
        dispatch (`Callable`, *optional*):
            What the start of a model on a CPU calls with every layer.
        on_cpu (`bool`, *optional*, defaults to `True`):
            Whether that is where it runs.

    Yields:
        `SimpleNamespace`: `layers`, the module of `dispatch`, and `platform`, whose `is_cpu` may be changed.
    """
    names = ["vllm", "vllm.platforms", "vllm.model_executor", "vllm.model_executor.layers"]
    names.append("vllm.model_executor.layers.utils")
    modules = {name: ModuleType(name) for name in names}
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, modules[name])
    modules["vllm"].__spec__ = ModuleSpec("vllm", None)  # there, by what looks for it without an import
    layers, platform = modules[names[-1]], SimpleNamespace(is_cpu=lambda: on_cpu)
    layers.dispatch_cpu_unquantized_gemm = dispatch
    modules["vllm.platforms"].current_platform = platform
    with mock.patch.dict(sys.modules, modules):
        yield SimpleNamespace(layers=layers, platform=platform)
