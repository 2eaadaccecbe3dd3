"""The order of prompts, which a resumed run goes on in."""

from collections.abc import Callable, Iterator

import torch
from transformers import TrainerState
from trl.trainer import utils


class RepeatSampler(utils.RepeatSampler):
    """
    The order of prompts of TRL's trainers.

    The only changes with respect to [`~trl.trainer.utils.RepeatSampler`] are

    - that the order of a pass is drawn by its number: TRL's draws each from where the last one has left the generator, so a
      run that is resumed in its third pass goes on in the order of the first;
    - that there is nothing after the last step, of which transformers makes one more when a run is resumed there.

    Args:
        args:
            As in [`~trl.trainer.utils.RepeatSampler`].
        current_state (`Callable`):
            State of the training, which says which pass begins and which step is the last.
        kwargs:
            As in [`~trl.trainer.utils.RepeatSampler`].
    """

    def __init__(self, *args, current_state: Callable[[], TrainerState], **kwargs):
        super().__init__(*args, **kwargs)
        self._current_state = current_state

    def __iter__(self) -> Iterator[int]:
        state = self._current_state()
        if 0 < state.max_steps <= state.global_step:
            return iter(())
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(int(state.epoch or 0)):  # those that TRL's has drawn by now
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()
