"""Who wrote the rollouts of a bank: which model, and in the ids of which tokenizer."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.hub import cached_file, extract_commit_hash

from ..results import write_text


FILE = "bank.json"


@dataclass(frozen=True)
class Writer:
    """
    Who writes a bank. Of an RLVR run it is the model that the run starts from.

    Args:
        model (`str`):
            Folder or id of the model, for messages alone.
        weights (`str`):
            See [`hash_weights`].
        vocabulary (`str`):
            See [`hash_vocabulary`].
        context (`str`, *optional*):
            Prompt template that it was asked in. `None` for the plain prompt, and in files from before this was kept.
    """

    model: str
    weights: str
    vocabulary: str
    context: str | None = None

    def __str__(self) -> str:
        asked = "" if self.context is None else f", asked in `{self.context}`"
        return f"`{self.model}` (weights {self.weights[:8]}, vocabulary {self.vocabulary[:8]}{asked})"

    def is_same(self, other: "Writer") -> bool:
        """Whether it is the same model with the same tokenizer, wherever they lie, asked in the same way."""
        own, others = ((writer.weights, writer.vocabulary, writer.context) for writer in (self, other))
        return own == others

    def save(self, folder: Path) -> None:
        """Writes it into the folder of a bank."""
        write_text(folder / FILE, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")


def read_writer(folder: str | Path) -> Writer | None:
    """
    Reads who wrote a bank.

    Args:
        folder (`str` or `Path`):
            Folder of the bank.

    Returns:
        [`Writer`] or `None`: `None` where there is no bank.

    Raises:
        ValueError: If there are rollouts and nothing says whose they are.
    """
    folder = Path(folder)
    if not (folder / FILE).is_file():
        if any(folder.glob("*/*.parquet")):
            raise ValueError(
                f"The rollout bank at `{folder}` does not say who wrote it, because `{FILE}` is missing: put the file back, "
                "or move the folder away and fill another one."
            )
        return None
    try:
        return Writer(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (TypeError, ValueError):
        raise ValueError(
            f"`{folder / FILE}` is damaged, so nothing says who wrote the rollout bank: put the file back, or move the "
            "folder away and fill another one."
        ) from None


def check_writer(folder: str | Path, writer: Writer) -> None:
    """
    Checks that a bank may be gone on with.

    Args:
        folder (`str` or `Path`):
            Folder of the bank, which need not exist.
        writer ([`Writer`]):
            Who is to go on with it.

    Raises:
        ValueError: If another model, or one with another tokenizer, wrote it, naming both.
    """
    found = read_writer(folder)
    if found is not None and not found.is_same(writer):
        raise ValueError(
            f"The rollout bank at `{folder}` is of {found}, and this run is of {writer}: their rollouts are not mixed, so "
            "give another `output_dir`, or move the bank away."
        )


def check_vocabulary(folder: str | Path, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Checks that the token ids of a bank mean the same text to a model.

    Args:
        folder (`str` or `Path`):
            Folder of the bank.
        model (`str`):
            Folder or id of the model, for the message.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.

    Raises:
        ValueError: If they do not, or nothing says it, naming both models.
    """
    found, vocabulary = read_writer(folder), hash_vocabulary(tokenizer)
    if found is not None and found.vocabulary != vocabulary:
        raise ValueError(
            f"The rollout bank at `{folder}` holds token ids of {found}, and `{model}` has another tokenizer (vocabulary "
            f"{vocabulary[:8]}), in which they mean other text: give a bank that was written with it, or prompts alone."
        )


def hash_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """
    Returns what a tokenizer's ids mean, as 64 hexadecimal digits: SHA-256 of its tokens with their ids, added ones too.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
    """
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def hash_weights(model: str | PreTrainedModel, revision: str | None = None) -> str:
    """
    Returns what a model's weights are, as 64 hexadecimal digits.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Folder of a checkpoint, or of an adapter, which counts with its base: SHA-256 of name, type, shape and bytes of
            every weight, in whichever files they lie. Id on the Hub: of the id with its commit. Or a model in memory.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.

    Raises:
        ValueError: If the model is in memory, and cut up by ZeRO-3.
    """
    digest = hashlib.sha256()
    if not isinstance(model, str):
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "The rollout bank says whose it is by the weights, and under ZeRO-3 no process holds them: give the model "
                "by its name or path, or set `bank_rollouts_per_prompt=0`."
            )
        for name, weight in sorted(model.state_dict().items()):
            _add(digest, name, weight)
        return digest.hexdigest()
    folder = Path(model)
    if not folder.is_dir():
        # The file's place in the cache says the commit, and nothing of the model's code is run
        commit = extract_commit_hash(cached_file(model, "config.json", revision=revision), None)
        return hashlib.sha256(f"{model}@{commit}".encode()).hexdigest()
    if (folder / "adapter_config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        digest.update(hash_weights(base).encode())
    where = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            where.update(dict.fromkeys(weights.keys(), file))
    for name, file in sorted(where.items()):
        with safe_open(file, framework="pt") as weights:
            _add(digest, name, weights.get_tensor(name))
    if not where:
        for file in sorted(folder.glob("*_model*.bin")):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", name: str, weight: torch.Tensor) -> None:
    digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} ".encode())
    digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
