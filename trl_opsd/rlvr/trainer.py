import textwrap

import torch
from trl import GRPOTrainer


class RLVRTrainer(GRPOTrainer):
    """
    Trainer for reinforcement learning with verifiable rewards (RLVR), as named in [Tülu
    3](https://huggingface.co/papers/2411.15124): group-relative policy optimization on rewards that a verifier decides.

    The only change with respect to [`~trl.GRPOTrainer`] is that a truncated completion, one that does not end in an
    end-of-sequence token, never earns a positive reward. A correct answer that the model doesn't stop after is not
    correct, here as in the gate of [`~trl_opsd.OPSDTrainer`], so both stages train towards the same thing.

    Args:
        model, reward_funcs, args, train_dataset, ...:
            As in [`~trl.GRPOTrainer`]. `args` is an [`RLVRConfig`].
    """

    _tag_names = ["trl", "rlvr"]
    _name = "RLVR"
    _paper = {
        "title": "Tülu 3: Pushing Frontiers in Open Language Model Post-Training",
        "id": "2411.15124",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{lambert2024tulu3,
                title        = {{Tülu 3: Pushing Frontiers in Open Language Model Post-Training}},
                author       = {Nathan Lambert and others},
                year         = 2024,
                eprint       = {arXiv:2411.15124},
            }"""),
    }

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # of all processes
        ends = (*self.eos_token_ids, self._tokenizer.pad_token_id)
        truncated = torch.tensor([ids[-1] not in ends for ids in completion_ids_list], device=rewards.device)
        truncated = self.accelerator.gather(truncated).unsqueeze(1)
        return rewards.masked_fill(truncated & (rewards > 0), 0.0)
