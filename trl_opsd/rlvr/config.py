from dataclasses import dataclass

from trl import GRPOConfig


@dataclass
class RLVRConfig(GRPOConfig):
    """
    Configuration class for the [`RLVRTrainer`].

    It has the parameters of [`~trl.GRPOConfig`] and no others.
    """
