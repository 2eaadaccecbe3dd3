"""
Rows of a batch: padded, selected, gathered, and dealt out in micro-batches under a budget of tokens, so that hardly any
padding and idle time is paid for.
"""

import math
from bisect import bisect_left

import torch
from accelerate import Accelerator
from transformers import PretrainedConfig
from trl.trainer.utils import pad, split_pixel_values_by_grid, unsplit_pixel_values_by_grid


# Fields of a batch that belong to images, as `DistillationTrainer` names them
MULTIMODAL_FIELDS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)

# Fields that are padded together, by the mask that says where they are not
PADDED_FIELDS = {
    "prompt_mask": ("prompt_ids", "prompt_mask"),
    "completion_mask": ("completion_ids", "completion_mask", "tool_mask", "engine_logprobs"),
    "teacher_prompt_mask": ("teacher_prompt_ids", "teacher_prompt_mask"),
}


def padded(
    rows: list[list[int]], pad_token_id: int, padding_side: str, pad_to_multiple_of: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Token ids as tensors.

    Args:
        rows (`list[list[int]]`):
            Ids of each row.
        pad_token_id (`int`):
            What fills the shorter ones.
        padding_side (`str`):
            `"left"` or `"right"`.
        pad_to_multiple_of (`int`, *optional*):
            Number that the length is rounded up to a multiple of.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Ids and mask, both of shape `(B, L)`.
    """
    ids = [torch.tensor(row) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    how = {"padding_side": padding_side, "pad_to_multiple_of": pad_to_multiple_of}
    return pad(ids, padding_value=pad_token_id, **how), pad(mask, padding_value=0, **how)


def unpadded(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """
    Token ids as lists.

    Args:
        ids (`torch.Tensor`):
            Ids, of shape `(B, L)`.
        mask (`torch.Tensor`):
            Which of them are there, of the same shape.

    Returns:
        `list[list[int]]`: Ids of each row.
    """
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def with_completion(
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    keep_shape: bool = False,
) -> tuple[tuple[torch.Tensor, torch.Tensor | None, int], torch.Tensor]:
    """
    What a model reads of a rollout.

    With all padding on the right no position that counts can see any of it: causal attention takes no mask then, and
    without one it runs in the kernels that skip what lies ahead.

    Args:
        prompt_ids (`torch.Tensor`):
            Ids of the prompts, padded on the left, of shape `(B, P)`.
        prompt_mask (`torch.Tensor`):
            Their mask.
        completion_ids (`torch.Tensor`):
            Ids of the completions, padded on the right, of shape `(B, C)`.
        completion_mask (`torch.Tensor`):
            Their mask.
        keep_shape (`bool`, *optional*, defaults to `False`):
            Whether the padding stays where it is, rather than all of it on the right and as far as needed.

    Returns:
        `tuple`: Ids and mask, of shape `(B, L)`, and the `L - 1` positions that predict a token; and the position at which
        the completion of each row starts, of shape `(B,)`. The mask is `None` where all padding is on the right.
    """
    ids = torch.cat([prompt_ids, completion_ids], dim=1)
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    if keep_shape:
        return (ids, mask, ids.size(1) - 1), torch.full_like(prompt_mask[:, 0], prompt_ids.size(1))
    order = mask.argsort(dim=1, descending=True, stable=True)[:, : mask.sum(dim=1).max()]
    ids = ids.gather(1, order)
    return (ids, None, ids.size(1) - 1), prompt_mask.sum(dim=1)


def select_rows(batch: dict, rows: torch.Tensor, keep_shape: bool = False) -> dict:
    """
    Some rows of a batch, and no padding of others.

    Args:
        batch (`dict`):
            Batch. What has no rows, such as a count, is handed on.
        rows (`torch.Tensor`):
            Which rows, `bool`, of shape `(B,)`.
        keep_shape (`bool`, *optional*, defaults to `False`):
            Whether to leave all columns, where a fixed shape is fixed for a reason (Neuron).

    Returns:
        `dict`: Batch of those rows.
    """
    selected = {}
    for key, value in split_pixel_values_by_grid(batch).items():
        if isinstance(value, list):
            selected[key] = [item for item, keep in zip(value, rows.tolist(), strict=True) if keep]
        else:
            selected[key] = value[rows] if value.ndim > 0 else value
    selected = unsplit_pixel_values_by_grid(selected)
    # Per-token fields of images span prompt and completion
    if not keep_shape and not any(field in selected for field in MULTIMODAL_FIELDS):
        for part, fields in PADDED_FIELDS.items():
            if part in selected and selected[part].any():
                columns = selected[part].any(dim=0)
                selected.update({field: selected[field][:, columns] for field in fields if field in selected})
    return selected


def size_of(batch: dict[str, torch.Tensor]) -> tuple[int, int]:
    """
    How large the longer of the student's and the teacher's input is.

    Args:
        batch (`dict[str, torch.Tensor]`):
            Batch.

    Returns:
        `tuple[int, int]`: Its rows, and its tokens with padding.
    """
    prompt = max(batch[name].size(1) for name in ("prompt_ids", "teacher_prompt_ids") if name in batch)
    rows, completion = batch["completion_ids"].shape
    return rows, rows * (prompt + completion)


def gather_rows(batch: dict[str, torch.Tensor], accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """
    The batches of all processes as one. Called on every process.

    Args:
        batch (`dict[str, torch.Tensor]`):
            Batch of this process, of text alone.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator.

    Returns:
        `dict[str, torch.Tensor]`: Batch of all of them, in their order.
    """
    if accelerator.num_processes == 1:
        return batch
    gathered = {}
    for name, value in batch.items():
        if value.ndim == 2:
            value = accelerator.pad_across_processes(value, dim=1, pad_first="prompt" in name)
        gathered[name] = value if value.ndim == 0 else accelerator.gather(value)
    return gathered


def balanced_length(config: PretrainedConfig) -> float:
    """
    Length at which the attention of a model costs as much as all of its products with weights, in tokens.

    Args:
        config ([`~transformers.PretrainedConfig`]):
            Configuration of the model.

    Returns:
        `float`: Length, for the cost of a rollout: `L + L² / balanced_length`.
    """
    values = config.get_text_config().to_dict()
    hidden, layers = values["hidden_size"], values["num_hidden_layers"]
    neurons = values.get("intermediate_size") or 4 * hidden
    products = layers * (4 * hidden**2 + 3 * hidden * neurons) + values["vocab_size"] * hidden
    # Queries with keys and weights with values, each over half of the length on average
    return products / (layers * hidden)


def micro_batches(
    batch: dict[str, torch.Tensor],
    budget: int,
    num_processes: int,
    process: int,
    balanced_length: float = math.inf,
) -> list[dict[str, torch.Tensor]]:
    """
    The kept rollouts of a global batch, dealt out under a budget.

    Args:
        batch (`dict[str, torch.Tensor]`):
            Batch of all processes. `kept`, of shape `(N,)`, says which of its rows are trained on, by default all.
        budget (`int`):
            Most tokens of a micro-batch, see [`token_budget_batches`].
        num_processes (`int`):
            Number of processes.
        process (`int`):
            Which of them asks.
        balanced_length (`float`, *optional*, defaults to `inf`):
            Length at which attention costs as much as the rest, see [`token_budget_batches`].

    Returns:
        `list[dict[str, torch.Tensor]]`: Micro-batches of that process, as many as every other has. One that has nothing
        to train on holds a row that counts for nothing.
    """
    batch = dict(batch)
    kept = batch.pop("kept", torch.ones_like(batch["prompt_ids"][:, 0], dtype=torch.bool))
    lengths = batch["completion_mask"].sum(dim=1) + torch.stack(
        [batch[name].sum(dim=1) for name in ("prompt_mask", "teacher_prompt_mask") if name in batch]
    ).amax(dim=0)
    rows = kept.nonzero().flatten()
    steps = token_budget_batches(lengths[rows].tolist(), budget, num_processes, balanced_length)
    dealt = []
    for step in steps or [[[]] * num_processes]:
        mine = step[process]
        chosen = torch.zeros_like(kept)
        # Without a rollout it still takes part in the collectives of the others, with one that counts for nothing
        chosen[rows[mine] if mine else lengths.argmin()] = True
        micro_batch = select_rows(batch, chosen)
        if not mine:
            micro_batch["kept"] = chosen.new_zeros(1)
        dealt.append(micro_batch)
    return dealt


def token_budget_batches(
    lengths: list[int], budget: int, num_processes: int = 1, balanced_length: float = math.inf
) -> list[list[list[int]]]:
    """
    Divides the rollouts of a global batch into micro-batches of rollouts of similar length.

    Args:
        lengths (`list[int]`):
            Tokens of each rollout, with its prompt.
        budget (`int`):
            Most tokens of a micro-batch, padding included. A rollout that is longer has a micro-batch of its own.
        num_processes (`int`, *optional*, defaults to `1`):
            Processes that work side by side.
        balanced_length (`float`, *optional*, defaults to `inf`):
            A rollout of `L` tokens costs `L + L² / balanced_length`: attention is quadratic.

    Returns:
        `list[list[list[int]]]`: For each step the micro-batch of each process, as indices into `lengths`. There are as few
        steps as the budget allows, and the micro-batches of a step cost about as much. Only where there are fewer
        rollouts than processes is one of them empty. The largest come first, so that memory that does not suffice shows
        at once.
    """

    def cost(rows: list[int]) -> float:
        longest = max((lengths[row] for row in rows), default=0)
        return len(rows) * (longest + longest**2 / balanced_length)

    def fill(limit: float) -> list[list[int]]:
        rows, batches = longest_first, []
        while rows:
            size = max(min(budget // lengths[rows[0]], int(limit // cost(rows[:1]))), 1)
            batches.append(rows[:size])
            rows = rows[size:]
        return batches

    def deal(batches: list[list[int]]) -> list[list[list[int]]]:
        while len(batches) % num_processes != 0:
            largest = max(batches, key=lambda batch: (len(batch) > 1, cost(batch)))
            batches.remove(largest)
            # One row cannot be divided: its second half is empty
            half = (len(largest) + 1) // 2
            batches += [largest[:half], largest[half:]]
        batches.sort(key=cost, reverse=True)
        steps = [batches[start : start + num_processes] for start in range(0, len(batches), num_processes)]
        # The process with the largest of one step has the smallest of the next
        return [step[::-1] if index % 2 else step for index, step in enumerate(steps)]

    longest_first = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
    batches = fill(cost(longest_first) + 1)
    most = math.ceil(len(batches) / num_processes) * num_processes
    # The lowest cost of a micro-batch that takes no more steps: filled up to the budget, the last of them are half empty
    highest = math.ceil(max(map(cost, batches), default=0))
    lowest = bisect_left(range(highest), True, key=lambda limit: len(fill(limit)) <= most)
    return min(deal(fill(lowest)), deal(batches), key=lambda steps: sum(max(map(cost, step)) for step in steps))
