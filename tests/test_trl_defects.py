"""What we mend of TRL's is broken there, or the mending can go."""

import torch

from scripts.experiments.trl_defects import autocast, merge_drift
from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.adapters import FrozenBase


def test_bf16_casts_nothing_in_the_loss_of_trl():
    assert autocast.layer_dtypes() == {torch.float32}
    assert autocast.layer_dtypes(OPSDTrainer, OPSDConfig) == {torch.bfloat16}


def test_a_push_changes_the_frozen_base_in_trl():
    assert merge_drift.changed_share(1) > 0.01
    assert merge_drift.changed_share(20) > merge_drift.changed_share(1)
    assert merge_drift.changed_share(20, around=lambda model: FrozenBase(model).restored) == 0
