import pytest
import torch
from accelerate import Accelerator
from testing_utils import TrlTestCase, require_peft
from transformers import AutoModelForCausalLM
from transformers.testing_utils import torch_device
from transformers.utils import is_peft_available
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration


if is_peft_available():
    from peft import LoraConfig, get_peft_model


class TestVLLMGenerationMerge(TrlTestCase):
    @require_peft
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sync_leaves_the_base_weights_as_they_are(self, dtype):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained("trl-internal-testing/tiny-Qwen3ForCausalLM", dtype=dtype)
        model = get_peft_model(model.to(torch_device), LoraConfig(target_modules="all-linear"))
        base = {name: value for name, value in model.named_parameters() if ".base_layer." in name}
        assert base
        before = {name: value.detach().clone() for name, value in base.items()}

        # The engine takes no part in this
        generation = object.__new__(VLLMGeneration)
        generation.model = model
        generation._dist = DistributedBackend(Accelerator(cpu=torch_device == "cpu"))
        for _ in range(3):
            with torch.no_grad():  # as a training step would, so that every sync merges another adapter
                for name, value in model.named_parameters():
                    if "lora_B" in name:
                        value.add_(torch.randn_like(value), alpha=1e-3)
            for _ in generation._iter_named_params():
                pass

        for name, value in base.items():
            assert torch.equal(value, before[name]), f"{name} has changed."
