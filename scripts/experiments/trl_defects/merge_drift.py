"""
Pushing LoRA weights to vLLM changes the frozen base in half precision, a little with every push.

    python -m scripts.experiments.trl_defects.merge_drift     # or the file itself, with TRL alone

`VLLMGeneration._iter_named_params` merges the adapter into the base and takes it out again. (w + d) - d is not w where both
are rounded to bfloat16. The base is what the reference of GRPO, or a teacher without adapter, is made of. The engine itself
takes no part in this. Mended by keeping a copy of the layers that have an adapter, and writing it back.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration


def changed_share(
    pushes: int, around: Callable[[torch.nn.Module], Callable[[], AbstractContextManager]] | None = None
) -> float:
    """
    Share of the base weights under an adapter that are not what they were after some pushes of the weights. `around` makes,
    of the model, what is entered around each of them.
    """
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    base = Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).bfloat16()
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    frozen = {name: value for name, value in model.named_parameters() if ".base_layer." in name}
    before = {name: value.detach().clone() for name, value in frozen.items()}
    engine = object.__new__(VLLMGeneration)
    engine.model, engine._dist = model, DistributedBackend(Accelerator(cpu=not torch.cuda.is_available()))
    context = nullcontext if around is None else around(model)
    for _ in range(pushes):
        with torch.no_grad():  # a step of training, so that each push merges another adapter
            for name, value in model.named_parameters():
                if "lora_B" in name:
                    value.add_(torch.randn_like(value), alpha=1e-3)
        with context():
            for _name, _value in engine._iter_named_params():
                pass
    changed = sum((value != before[name]).sum().item() for name, value in frozen.items())
    return changed / sum(value.numel() for value in frozen.values())


if __name__ == "__main__":
    for pushes in (1, 10, 100):
        print(f"{pushes:4d} pushes: {100 * changed_share(pushes):.1f}% of the frozen weights have changed")
