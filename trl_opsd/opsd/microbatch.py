"""Micro-batches by a budget of tokens, so that hardly any padding and idle time is paid for."""

import math
from bisect import bisect_left


def token_budget_batches(lengths: list[int], budget: int, num_processes: int = 1) -> list[list[list[int]]]:
    """
    Divides the rollouts of a global batch into micro-batches of rollouts of similar length.

    Args:
        lengths (`list[int]`):
            Tokens of each rollout, with its prompt.
        budget (`int`):
            Most tokens of a micro-batch, padding included. A rollout that is longer has a micro-batch of its own.
        num_processes (`int`, *optional*, defaults to `1`):
            Processes that work side by side.

    Returns:
        `list[list[list[int]]]`: For each step the micro-batch of each process, as indices into `lengths`. There are as few
        steps as the budget allows, and the micro-batches of a step have about as many tokens. Only where there are fewer
        rollouts than processes is one of them empty. The largest come first, so that memory that does not suffice shows
        at once.
    """

    def tokens(rows: list[int]) -> int:
        return len(rows) * max((lengths[row] for row in rows), default=0)

    def fill(budget: int) -> list[list[int]]:
        rows, batches = longest_first, []
        while rows:
            size = max(budget // lengths[rows[0]], 1)
            batches.append(rows[:size])
            rows = rows[size:]
        return batches

    def deal(batches: list[list[int]]) -> list[list[list[int]]]:
        while len(batches) % num_processes != 0:
            largest = max(batches, key=lambda batch: (len(batch) > 1, tokens(batch)))
            batches.remove(largest)
            # One row cannot be divided: its second half is empty
            half = (len(largest) + 1) // 2
            batches += [largest[:half], largest[half:]]
        batches.sort(key=tokens, reverse=True)
        steps = [batches[start : start + num_processes] for start in range(0, len(batches), num_processes)]
        # The process with the largest of one step has the smallest of the next
        return [step[::-1] if index % 2 else step for index, step in enumerate(steps)]

    longest_first = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
    batches = fill(budget)
    most = math.ceil(len(batches) / num_processes) * num_processes
    # The smallest budget that takes no more steps: filled up to the given one, the last of them are half empty
    smallest = bisect_left(range(budget), True, key=lambda tokens: len(fill(tokens)) <= most)
    return min(deal(fill(smallest)), deal(batches), key=lambda steps: sum(max(map(tokens, step)) for step in steps))
