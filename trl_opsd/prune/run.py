"""Run of stage 2: what its command line does once it is parsed."""

import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..adapters import merged
from ..cli import UserError, check_checkpoint, make_folder, publish, user_errors
from ..data import load_tokenizer
from ..results import write_results
from .calibration import check_rows, choose_rows, load_calibration, make_rollouts
from .config import PruneConfig
from .importance import choose_layers, choose_units, collect, measure_nll, only_layers
from .shapes import ModelShape
from .slicing import slice_model


def run(config: PruneConfig) -> None:
    """Checks what the configuration says, then prunes and saves."""
    with user_errors():
        source, output = config.model_name_or_path, Path(config.output_dir)
        check_checkpoint(source, "model_name_or_path")
        if output.resolve() == Path(source).resolve():
            raise UserError("`output_dir` is the checkpoint that is to be pruned: give another folder.")
        source = merged(source, f"{output}/start")
        shape = ModelShape(AutoConfig.from_pretrained(source))
        if config.target_ratio is None:
            sizes = shape.explicit(**config.sizes())
        else:
            sizes = shape.search(config.target_ratio, config.size_multiple)
        dataset = load_calibration(config)
        tokenizer = load_tokenizer(source)
        check_rows(config, dataset, tokenizer)
        dataset = choose_rows(config, dataset)
        make_folder(output, "output_dir")

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=config.dtype).eval()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model.to(config.device or accelerator)
    rollouts = make_rollouts(config, dataset, model, tokenizer)
    before = statistics = collect(model, shape, rollouts, config.batch_size)
    layers = choose_layers(model, before, sizes.num_layers, config.layer_importance, rollouts, config.batch_size)
    if len(layers) < shape.sizes.num_layers:
        with only_layers(model, layers):
            statistics = collect(model, shape, rollouts, config.batch_size)
    pruned = slice_model(model, shape, choose_units(statistics, sizes, shape, layers))
    row = {
        "phase": "prune",
        **{name: size for name, size in asdict(sizes).items() if size is not None},
        "layers": layers,
        "parameters_before": shape.parameters,
        "parameters": pruned.num_parameters(),
        "ratio_asked": config.target_ratio,
        "ratio": 1 - pruned.num_parameters() / shape.parameters,
        "nll_before": before.nll,
        "nll": measure_nll(pruned, rollouts, config.batch_size),
        "block_influence": [before.block_influence[layer] for layer in range(shape.sizes.num_layers)],
        "calibration_rollouts": len(rollouts),
        "calibration_tokens": sum(len(rollout.completion_ids) for rollout in rollouts),
        "wall_s": round(time.perf_counter() - start, 3),
    }

    staging = output / ".saving"
    pruned.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    publish(staging, output)
    write_results(output / "prune.json", [row], config)
    experts = "" if sizes.num_experts is None else f", {sizes.num_experts} experts"
    print(
        f"{row['parameters']:,} of {row['parameters_before']:,} parameters are left ({row['ratio']:.1%} removed): "
        f"{sizes.num_layers} layers, hidden size {sizes.hidden_size}, {sizes.num_attention_heads} heads, MLP "
        f"{sizes.intermediate_size}{experts}. A token of the rollouts: {row['nll_before']:.3f} nats before, {row['nll']:.3f} "
        f"after. Saved to {output}."
    )
