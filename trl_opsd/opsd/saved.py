"""What a checkpoint holds beside the weights, for a resumed run to go on in the same way."""

import json
import os
from abc import ABC, abstractmethod
from typing import Any


class Saved(ABC):
    """Something whose state is a JSON file of its own in every checkpoint."""

    file: str  # its name
    missing: str  # what a checkpoint without it means, and what to do

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """
        Returns:
            `dict[str, Any]`: What a resumed run needs to go on in the same way, as JSON holds it.
        """

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Args:
            state (`dict[str, Any]`):
                What [`state_dict`] gave.
        """

    def save(self, folder: str) -> None:
        """
        Writes what a resumed run needs into a checkpoint.

        Args:
            folder (`str`):
                Folder of the checkpoint. A missing one is made.
        """
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, self.file)
        with open(f"{path}.tmp", "w") as file:
            json.dump(self.state_dict(), file)
        os.replace(f"{path}.tmp", path)

    def load(self, folder: str) -> None:
        """
        Reads what [`save`] wrote.

        Args:
            folder (`str`):
                Folder of the checkpoint.

        Raises:
            ValueError: If it has no such file.
        """
        path = os.path.join(folder, self.file)
        if not os.path.isfile(path):
            raise ValueError(f"`{folder}` has no {self.file}, so {self.missing}.")
        with open(path) as file:
            self.load_state_dict(json.load(file))
