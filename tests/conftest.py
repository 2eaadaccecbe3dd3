import pytest
import torch
from datasets import Dataset

from trl_opsd.tiny.model import make_model
from trl_opsd.tiny.task import TinyConfig, problems, row
from trl_opsd.tiny.tokenizer import make_tokenizer


SMALL = TinyConfig(hidden_size=32, num_layers=2, num_heads=2, num_key_value_heads=1, intermediate_size=48)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def small_model(tokenizer):
    """Builds an untrained model of 20k parameters. The logits are spread, so that distributions differ visibly."""

    def build(seed: int = 0, **changes):
        config = TinyConfig(**{**SMALL.__dict__, **changes})
        model = make_model(config, tokenizer, seed)
        with torch.no_grad():
            model.lm_head.weight.mul_(4)
        return model

    return build


@pytest.fixture(scope="session")
def rows() -> Dataset:
    return Dataset.from_list([row(problem) for problem in problems(TinyConfig(), "train", 64, seed=0)])


@pytest.fixture
def checkpoint(tmp_path, small_model, tokenizer):
    """Saves a model as an ordinary checkpoint and returns its folder."""

    def save(seed: int = 0, **changes) -> str:
        folder = tmp_path / f"model-{seed}-{len(changes)}"
        small_model(seed, **changes).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save
