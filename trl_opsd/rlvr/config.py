from dataclasses import dataclass, field

from trl import GRPOConfig


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")


@dataclass
class RLVRConfig(GRPOConfig):
    """
    Configuration class for the [`RLVRTrainer`].

    The only changes with respect to [`~trl.GRPOConfig`] are the parameters below. The other choices of
    [DAPO](https://huggingface.co/papers/2503.14476) are TRL's: `loss_type="dapo"`, `epsilon_high`,
    `mask_truncated_completions`.

    Parameters:
        > Parameters that control which rollouts are trained on

        max_generation_rounds (`int`, *optional*, defaults to `1`):
            How often rollouts are generated for one batch at most. Groups that the verifiers find all right or all wrong
            (whose rewards of verifiers are all the same) teach nothing: while there are some, and rounds left, they are
            replaced by those of other prompts, drawn from the training set (DAPO's dynamic sampling, by accuracy). `1`
            replaces none.
        soft_punish_cache (`int`, *optional*):
            Number of tokens before `max_completion_length` from which on a completion is punished for its length, by a
            reward that falls from 0 to -1 ([`~trl.rewards.get_soft_overlong_punishment`]). It is one more reward
            function, the last one for `reward_weights`. `None` is no punishment.

        > Parameters that control the rollout bank

        bank_rollouts_per_prompt (`int`, *optional*, defaults to `4`):
            Correct rollouts to keep for each prompt, the shortest, in the folder `bank` of `output_dir` (see
            [`~trl_opsd.rlvr.bank.RolloutBank`]). `0` keeps no bank.

        > Parameters that control what is logged

        log_engine_mismatch (`bool`, *optional*, defaults to `False`):
            Whether to log `sampling/kl` beside what [`~trl.GRPOTrainer`] logs of the difference between the
            log-probabilities of vLLM and those of the policy: the KL divergence of the policy from the engine, over all
            tokens of a batch. Needs `vllm_importance_sampling_correction`.
    """

    # Parameters that control which rollouts are trained on
    max_generation_rounds: int = field(
        default=1,
        metadata={
            "help": "How often rollouts are generated for one batch at most: groups that the verifiers find "
            "all right or all wrong are replaced by those of other prompts of the training set. 1 replaces none."
        },
    )
    soft_punish_cache: int | None = field(
        default=None,
        metadata={
            "help": "Number of tokens before `max_completion_length` from which on a completion is punished for its "
            "length, by one more reward function that falls from 0 to -1. None is no punishment."
        },
    )

    # Parameters that control the rollout bank
    bank_rollouts_per_prompt: int = field(
        default=4,
        metadata={
            "help": "Correct rollouts to keep for each prompt, the shortest, in the folder `bank` of `output_dir`. 0 "
            "keeps no bank."
        },
    )

    # Parameters that control what is logged
    log_engine_mismatch: bool = field(
        default=False,
        metadata={
            "help": "Log the KL divergence of the policy from vLLM, `sampling/kl`, beside the differences of "
            "log-probabilities that are logged anyway. Needs `vllm_importance_sampling_correction`."
        },
    )

    def __post_init__(self):
        super().__post_init__()

        # Which TRL looks at when a loss is computed, or a batch scored
        for name, choices in (
            ("loss_type", LOSS_TYPES),
            ("scale_rewards", ("group", "batch", "none")),
            ("importance_sampling_level", ("token", "sequence")),
            ("vllm_mode", ("server", "colocate")),
        ):
            if (value := vars(self)[name]) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, and is {value!r}.")
        if self.log_engine_mismatch and not (self.use_vllm and self.vllm_importance_sampling_correction):
            raise ValueError(
                "`log_engine_mismatch` compares vLLM's log-probabilities with the policy's: set `use_vllm: true` and leave "
                "`vllm_importance_sampling_correction` on, or drop it."
            )
        if self.max_generation_rounds < 1:
            raise ValueError(f"`max_generation_rounds` must be at least 1, and is {self.max_generation_rounds}.")
        by_batch = {
            "scale_rewards='batch'": self.scale_rewards == "batch",
            "multi_objective_aggregation='normalize_then_sum'": self.multi_objective_aggregation
            != "sum_then_normalize",
        }
        for name, is_set in by_batch.items():
            if is_set and self.max_generation_rounds > 1:
                raise ValueError(
                    f"`max_generation_rounds={self.max_generation_rounds}` and `{name}` exclude each other: rewards "
                    "that are scaled by the batch would be scaled by another batch in each round. Drop one."
                )
        if self.soft_punish_cache is not None:
            if self.max_completion_length is None or not 0 < self.soft_punish_cache <= self.max_completion_length:
                raise ValueError(
                    f"`soft_punish_cache` must be from 1 to `max_completion_length`, which is "
                    f"{self.max_completion_length}, and is {self.soft_punish_cache}: use None for no punishment."
                )
        if self.bank_rollouts_per_prompt < 0:
            raise ValueError(
                f"`bank_rollouts_per_prompt` must be at least 0, and is {self.bank_rollouts_per_prompt}: use 0 for no "
                "bank."
            )

    def check_num_prompts(self, num_prompts: int) -> None:
        """
        Checks that the training data fills a batch, because the sampler leaves out what does not.

        Args:
            num_prompts (`int`):
                Rows of the training data.

        Raises:
            ValueError: If a batch takes more, so that there would be no step at all.
        """
        batch = self.generation_batch_size // self.num_generations
        if num_prompts < batch:
            raise ValueError(
                f"The training data has {num_prompts} prompts and a batch takes {batch}, so there would be no step at "
                "all: give more prompts, or lower `per_device_train_batch_size` or `gradient_accumulation_steps`."
            )
