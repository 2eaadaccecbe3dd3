"""The table of what fits: its rows follow from the recipe and the plan."""

import pytest

from scripts.benchmarks import what_fits
from scripts.harness.results import RESULTS, read


ROWS = {(row["model"], row["gpus"]): row for row in read(RESULTS / "what_fits" / "plan.json")}


@pytest.mark.parametrize(("model", "gpus"), [("Qwen3-1.7B", 4), ("R1-Distill-Qwen-7B", 1)])
def test_a_row_is_what_the_plan_says_today(model, gpus):
    found, kept = what_fits.row(model, gpus), ROWS[model, gpus]
    assert found.keys() == kept.keys()
    for name, value in kept.items():
        assert found[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name


@pytest.mark.parametrize(
    ("model", "billions"),
    [("Qwen3-4B", 4.02), ("Qwen3-8B", 8.19), ("R1-Distill-Qwen-1.5B", 1.78), ("R1-Distill-Qwen-7B", 7.62)]
    + [("R1-Distill-Llama-8B", 8.03)],
)
def test_models_have_the_sizes_of_their_cards(model, billions):
    assert what_fits.MODELS[model][0].total == pytest.approx(billions * 1e9, rel=0.01)


def test_more_gpus_hold_less_each_and_take_no_longer():
    for (model, gpus), row in ROWS.items():
        if gpus == 8 and row["launch"] == "fsdp2":
            four = ROWS[model, 4]
            assert row["training_gib"] < four["training_gib"] and row["hours"] <= four["hours"]
