# What was run on an H100, nine of these side by side: bash commands.sh ARM, in the root of the repository.
# START is what RLVR has left, TEACHER what OPSD with `concise` has made of it on a CPU, merged; DATA is runs/smollm2-cpu/sft/data.
set -eu
OUT=runs/smollm2-gpu/$1
STUDENT="--use_cpu false --model_name_or_path $START --dataset_name $DATA --max_completion_length 256"
RECOVER="--config recipes/recover.yaml --teacher_model_name_or_path $TEACHER --chat_template_kwargs {} --use_cpu false
    --gradient_accumulation_steps 1 --max_tokens_per_microbatch 16384 --gradient_checkpointing false
    --max_completion_length 256"
CONCISE='{prompt}

Reason as concisely as you can, without restatements or repeated checks.'
SIBLING='{prompt}

A short and correct way to solve it: {sibling}

Solve it as briefly.'
opsd() { python -m trl_opsd.opsd --config "recipes/small/smollm2_cpu_$1.yaml" $STUDENT --output_dir "$OUT/opsd" "${@:2}"; }
evaluate() {
    python -m trl_opsd.evaluate --config recipes/small/evaluate.yaml --dataset_name "$DATA" --dtype bfloat16 \
        --max_completion_length 256 --batch_size 256 --max_samples 512 --model_name_or_path "$1" --output "$2" "${@:3}"
}
case $1 in
    measured)
        evaluate "$START" "$OUT/rlvr.json"
        evaluate "$START" "$OUT/asked.json" --prompt_template "$CONCISE"
        evaluate "$TEACHER" "$OUT/teacher.json" --decoding greedy sampled ;;
    concise) opsd opsd --seed "$2" && evaluate "$OUT/opsd" "$OUT/concise-$2.json" ;;  # 42 (in the files: 0), 1, 2
    gate-four)
        opsd opsd --teacher_gate 1.0 --teacher_gate_rollouts 4
        evaluate "$OUT/opsd" "$OUT/gate-four.json" ;;
    solution) opsd solution && evaluate "$OUT/opsd" "$OUT/solution.json" ;;
    sibling)
        opsd solution --teacher_prompt_template "$SIBLING" --num_generations 8
        evaluate "$OUT/opsd" "$OUT/sibling.json" ;;
    grpo-penalty)
        python -m trl_opsd.rlvr --config recipes/small/smollm2_cpu_rlvr.yaml $STUDENT --output_dir "$OUT/rlvr" \
            --reward_funcs math_reward length_reward --gradient_accumulation_steps 3 --max_steps 24
        evaluate "$OUT/rlvr" "$OUT/grpo-penalty.json" ;;
    half)
        python - "$OUT/data" <<'P'
import json, pathlib, sys
from trl_opsd.small.task import problems, row
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
drawn = problems("train", 4000, 777, ("chain_sum", "simple_equations"), 2)[:2560]
(folder / "train.jsonl").write_text("".join(json.dumps(row(problem)) + "\n" for problem in drawn))
P
        python -m trl_opsd.compress.bank --model_name_or_path "$TEACHER" --dataset_name "$OUT/data" --dataset_split train \
            --reward_funcs math_reward --max_completion_length 256 --batch_size 512 --dtype bfloat16 --temperature 1.0 \
            --rollouts_per_prompt 2 --bank "$OUT/bank" --output "$OUT/bank.json"
        python -m trl_opsd.prune --model_name_or_path "$TEACHER" --calibration_dataset "$OUT/bank" --target_ratio 0.5 \
            --size_multiple 32 --calibration_samples 128 --batch_size 8 --dtype float32 --output_dir "$OUT/pruned"
        python -m trl_opsd.opsd $RECOVER --model_name_or_path "$OUT/pruned" --dataset_name "$OUT/bank" \
            --output_dir "$OUT/recovered" --learning_rate 1e-3 --warmup_steps 10 --per_device_train_batch_size 64 --max_steps 400
        python -m trl_opsd.opsd $RECOVER --model_name_or_path "$OUT/recovered" --dataset_name "$OUT/bank" \
            --output_dir "$OUT/more" --learning_rate 3e-4 --warmup_steps 5 --per_device_train_batch_size 64 --max_steps 200
        python -m trl_opsd.opsd $RECOVER --model_name_or_path "$OUT/recovered" --dataset_name "$OUT/data" \
            --reward_funcs math_reward --lmbda 1.0 --gate all --beta 1.0 --output_dir "$OUT/onpolicy" --learning_rate 5e-5 \
            --warmup_steps 2 --per_device_train_batch_size 128 --num_iterations 2 --max_steps 24
        for student in recovered more onpolicy; do
            evaluate "$OUT/$student" "$OUT/half-$student.json" --decoding greedy sampled
        done ;;
esac
