"""
Under `bf16=True`, DistillationTrainer trains float32 weights in float32.

    python -m scripts.experiments.trl_defects.autocast        # or the file itself, with TRL alone

accelerate wraps the forward of the model in autocast. The loss calls the model within another method, by
`_forward_redirection`, which puts that method in the place of the wrapped forward: inside, nothing casts. The dtype that a
linear layer gives in the loss should be bfloat16. Mended by `with self.accelerator.autocast():` in `_compute_loss`.
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import DistillationConfig, DistillationTrainer


def layer_dtypes(
    trainer_class: type = DistillationTrainer, config_class: type = DistillationConfig
) -> set[torch.dtype]:
    """Dtypes that the first projection of the student gives where gradients are taken, in a step under `bf16=True`."""
    words = Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1, "one": 2, "two": 3}, unk_token="one"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
    config = Qwen3Config(
        vocab_size=4,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        eos_token_id=0,
        pad_token_id=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=Qwen3ForCausalLM(config),
            teacher_model=Qwen3ForCausalLM(config),
            args=config_class(
                folder,
                bf16=True,
                use_cpu=not torch.cuda.is_available(),
                max_steps=1,
                max_completion_length=4,
                per_device_train_batch_size=2,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["one two", "two one"] * 2}),
            processing_class=tokenizer,
        )
        dtypes = set()
        trainer.model.model.layers[0].self_attn.q_proj.register_forward_hook(
            lambda module, inputs, output: dtypes.add(output.dtype) if torch.is_grad_enabled() else None
        )
        trainer.train()
    return dtypes


if __name__ == "__main__":
    found = layer_dtypes()
    print(
        f"A linear layer gives {found} in the loss under bf16=True:", "right" if found == {torch.bfloat16} else "WRONG"
    )
