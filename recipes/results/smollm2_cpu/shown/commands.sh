# What was run on a CPU, in the root of the repository, after smollm2_cpu_sft.yaml and smollm2_cpu_rlvr.yaml. Seed 1 was run for
# what has the bank alone, into folders of its own; the results are called solution, bank, sft_gold and sft_bank.
set -eu
export OMP_NUM_THREADS=1
R=runs/smollm2-cpu
measure() {
    python -m trl_opsd.evaluate --config recipes/small/evaluate.yaml --dataset_name $R/sft/data --dtype bfloat16 \
        --max_completion_length 256 --batch_size 32 --max_samples 512 --model_name_or_path "$R/$1" --output "$R/shown/$1.json"
}
sft() {
    python -m trl.scripts.sft --config recipes/tiny/size_sft.yaml --model_name_or_path $R/rlvr-merged --dataset_name "$R/$1_rows" \
        --output_dir "$R/sft_$1" --seed "${SEED:-42}" --dtype bfloat16 --use_peft true --lora_r 64 --lora_alpha 64 \
        --lora_target_modules down_proj o_proj --per_device_train_batch_size 48 --max_steps 24 --learning_rate 3e-4 \
        --warmup_steps 2 --bf16 true --logging_steps 1
    measure "sft_$1"
}
# What RLVR has left is an adapter, which TRL's SFT would go on with: merged, as the stages here do it by themselves
python -c "from trl_opsd.adapters import merged; print(merged('$R/rlvr', '$R/rlvr-merged'))"

python -m trl_opsd.opsd --config recipes/small/smollm2_cpu_solution.yaml
measure opsd_solution

# The bank's writer has begun from the warm start, which RLVR has merged to begin from
python -m trl_opsd.opsd --config recipes/small/smollm2_cpu_opsd.yaml --model_name_or_path $R/rlvr/start --output_dir $R/opsd-warm
python -m trl_opsd.compress.bank --model_name_or_path $R/opsd-warm --dataset_name $R/sft/data --dataset_split train \
    --reward_funcs math_reward --max_completion_length 256 --batch_size 64 --dtype bfloat16 --bank $R/bank --output $R/bank.json
python -m trl_opsd.opsd --config recipes/small/smollm2_cpu_solution.yaml --solution bank --rollout_bank $R/bank \
    --output_dir $R/opsd_bank --seed "${SEED:-42}"
measure opsd_bank

python - $R <<'P'
import json, sys
from pathlib import Path
from datasets import load_dataset
root = Path(sys.argv[1])
rows = [json.loads(line) for line in (root / "sft/data/train.jsonl").read_text().splitlines()]
gold = [{"prompt": row["prompt"], "completion": [{"role": "assistant", "content": row["solution"]}]} for row in rows]
own = load_dataset("parquet", data_dir=str(root / "bank/rollouts"), split="train")
for name, pairs in (("gold", gold), ("bank", [{key: row[key] for key in ("prompt", "completion")} for row in own])):
    (root / f"{name}_rows").mkdir(exist_ok=True)
    (root / f"{name}_rows/train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
P
sft gold
sft bank
