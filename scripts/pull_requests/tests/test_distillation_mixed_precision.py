import torch
from datasets import load_dataset
from testing_utils import TrlTestCase
from transformers.testing_utils import torch_device
from trl import DistillationConfig, DistillationTrainer


class TestDistillationMixedPrecision(TrlTestCase):
    def test_bf16_reaches_the_loss(self):
        dataset = load_dataset("trl-internal-testing/zen", "standard_prompt_only", split="train")
        training_args = DistillationConfig(
            output_dir=self.tmp_dir,
            bf16=True,
            use_cpu=torch_device == "cpu",
            per_device_train_batch_size=3,  # reduce the batch size to reduce memory usage
            max_completion_length=8,  # reduce the completion length to reduce memory usage
            max_steps=1,
            report_to="none",
        )
        trainer = DistillationTrainer(
            model="trl-internal-testing/tiny-Qwen3ForCausalLM",
            teacher_model="trl-internal-testing/small-Qwen3ForCausalLM",
            args=training_args,
            train_dataset=dataset,
        )
        assert trainer.model.dtype == torch.float32

        # A linear layer with float32 weights returns bfloat16 only under autocast. Generation, which runs outside of the
        # loss, takes no gradients.
        dtypes = set()
        trainer.model.model.layers[0].self_attn.q_proj.register_forward_hook(
            lambda module, inputs, output: dtypes.add(output.dtype) if torch.is_grad_enabled() else None
        )

        trainer.train()

        assert dtypes == {torch.bfloat16}
