# /// script
# dependencies = [
#     "trl",
#     "peft",
#     "math-verify",
#     "trackio",
# ]
# ///

# docstyle-ignore
"""
# Shorter answers from a model of your own, which is its own teacher, asked to be concise:
```
python examples/scripts/opsd.py \
    --model_name_or_path Qwen/Qwen3-1.7B \
    --dataset_name trl-lib/DeepMath-103K \
    --teacher_context concise \
    --num_generations 4 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 8 \
    --learning_rate 1e-6 \
    --max_completion_length 4096 \
    --max_steps 100 \
    --output_dir Qwen3-1.7B-OPSD
```

# LoRA: add --use_peft --lora_r 64 --lora_alpha 128 --learning_rate 2e-5

# A larger teacher: add --teacher_model_name_or_path Qwen/Qwen3-8B
"""

import os

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config
from trl.experimental.opsd import OPSDConfig, OPSDTrainer
from trl.rewards import accuracy_reward


# Enable logging in a Hugging Face Space
os.environ.setdefault("TRACKIO_SPACE_ID", "trl-trackio")


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, OPSDConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }

    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)

    trainer = OPSDTrainer(
        model=model_args.model_name_or_path,
        teacher_model=training_args.teacher_model_name_or_path,
        reward_funcs=accuracy_reward,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()

    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
