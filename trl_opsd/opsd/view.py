"""
What people look at: a table of the rollouts of a step, and a page that shows a few of them with every token coloured by
how much the teacher disagrees.
"""

import importlib
import math
import os
import unicodedata
from bisect import bisect_right
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase
from transformers.utils import is_rich_available
from trl.trainer.utils import print_prompt_completions_sample


# Rollouts on a page, where `num_completions_to_print` does not say
NUM_SHOWN = 8

# Nats at which the next colour begins. The same on every page, so that steps can be compared.
EDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

# From the lowest colour to the highest: background and text, on light and on dark
LIGHT = ("#fff1d0 #222", "#fed89a #222", "#fdb56b #222", "#f6814a #222", "#d7401f #fff", "#8f0000 #fff")
DARK = ("#33271a #ddd", "#5a3816 #eee", "#864a10 #fff", "#b8620c #fff", "#e88d24 #111", "#ffd36b #111")

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #222; --dim: #666; --line: #ddd; --box: #f6f6f6; }
@media (prefers-color-scheme: dark) {
  :root { --bg: #15181b; --fg: #ddd; --dim: #999; --line: #363b40; --box: #1e2226; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--bg); color: var(--fg);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.25rem; margin: 0; }
h2 { display: flex; flex-wrap: wrap; gap: .3rem; font-size: 1rem; margin: 0 0 .5rem; font-weight: normal; }
h3 { font-size: .8rem; margin: .6rem 0 .2rem; font-weight: normal; color: var(--dim); }
p { margin: .3rem 0; color: var(--dim); font-size: .85rem; }
article { border-top: 1px solid var(--line); margin-top: 1.2rem; padding-top: .9rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.7 ui-monospace, monospace; }
pre.prompt { background: var(--box); border-radius: .3rem; padding: .4rem .6rem; max-height: 12rem; overflow: auto;
  line-height: 1.45; }
pre span:hover { outline: 2px solid var(--fg); }
.legend { display: flex; flex-wrap: wrap; gap: .3rem; margin: .6rem 0; font-size: .8rem; }
.legend span { padding: 0 .4rem; border-radius: .2rem; border: 1px solid var(--line); }
.chip { border: 1px solid var(--line); border-radius: .8rem; padding: 0 .55rem; font-size: .85rem; }
.chip.kept { border-color: currentColor; font-weight: bold; }
i { opacity: .5; font-style: normal; }
"""


@dataclass
class Rollout:
    """
    What is known of a rollout.

    Args:
        prompt (`str`):
            Prompt of the student, without special tokens.
        completion (`str`):
            What the student wrote, without special tokens.
        num_tokens (`int`):
            Tokens of it.
        kept (`bool`):
            Whether it is trained on.
        rewards (`dict[str, float]`, *optional*):
            Reward of each verifier (`rewards/{name}`), and what they add up to (`reward`).
        extra (`dict[str, Any]`, *optional*):
            What the verifiers logged of it with `log_extra`.
        kl (`float`, *optional*):
            Divergence before the clip, mean over its tokens, in nats. `None` where it was not measured.
        token_ids (`list[int]`, *optional*):
            Its tokens, if it is to be shown.
        prompt_ids (`list[int]`, *optional*):
            Those of the prompt, if it is to be shown.
        teacher_prompt_ids (`list[int]`, *optional*):
            Those of the teacher's prompt, if it is to be shown and the teacher has one of its own.
        token_kl (`list[float]`, *optional*):
            Divergence at each token, in nats; NaN where the token is not the student's own.
    """

    prompt: str
    completion: str
    num_tokens: int
    kept: bool
    rewards: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    kl: float | None = None
    token_ids: list[int] | None = None
    prompt_ids: list[int] | None = None
    teacher_prompt_ids: list[int] | None = None
    token_kl: list[float] | None = None


class RolloutLog:
    """
    Keeps, on each process, the rollouts since the last log: all of them for the table, the tokens of a few for the page.

    Args:
        trainer ([`OPSDTrainer`]):
            Trainer whose rollouts they are.
        num_kept (`int`, *optional*):
            Number of rollouts from which on the oldest are forgotten. Defaults to those of a step on this process.
    """

    def __init__(self, trainer, num_kept: int | None = None):
        self.trainer = trainer
        args = trainer.args
        self.num_shown = NUM_SHOWN if args.num_completions_to_print is None else args.num_completions_to_print
        self.num_kept = num_kept or args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.rollouts: dict[str, dict[int, Rollout]] = {"train": {}, "eval": {}}
        # Divergence at each token, by the number of the rollout. It may have been written by another process
        self.measured: dict[str, dict[int, list[float]]] = {"train": {}, "eval": {}}
        self.count = 0

    def add(self, mode: str, output: dict[str, Any]) -> None:
        """
        Takes up the rollouts of a batch, and numbers them in `output["rollout"]`, of shape `(B,)`, so that what is
        measured of them later finds them wherever they have been shuffled to.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
            output (`dict[str, Any]`):
                The batch. `rewards`, of shape `(B, functions + 1)` with their total last, and `extra`, what the
                verifiers logged by column, are taken out of it.

        Raises:
            ValueError: If a verifier logged another number of values than there are rollouts.
        """
        ids = _unpadded(output["completion_ids"], output["completion_mask"])
        prompt_ids = _unpadded(output["prompt_ids"], output["prompt_mask"])
        kept = output["kept"].tolist() if "kept" in output else [True] * len(ids)
        rewards, extra = [{}] * len(ids), output.pop("extra", {})
        if "rewards" in output:
            names = [*(f"rewards/{name}" for name in self.trainer.reward_func_names), "reward"]
            rewards = [dict(zip(names, row, strict=True)) for row in output.pop("rewards").tolist()]
        for column, values in extra.items():
            if len(values) != len(ids):
                raise ValueError(
                    f"A reward function logged {len(values)} values of `{column}` with `log_extra` for a batch of "
                    f"{len(ids)} rollouts: log one for each."
                )
        prompts, completions = (
            self.trainer._tokenizer.batch_decode(texts, skip_special_tokens=True) for texts in (prompt_ids, ids)
        )
        batch = [
            Rollout(*row, extra={column: values[i] for column, values in extra.items()})
            for i, row in enumerate(zip(prompts, completions, map(len, ids), kept, rewards, strict=True))
        ]
        for i in sorted(range(len(ids)), key=lambda i: not kept[i])[: self.num_shown]:
            batch[i].token_ids, batch[i].prompt_ids = ids[i], prompt_ids[i]
            if "teacher_prompt_ids" in output:
                rows = (output[name][i : i + 1] for name in ("teacher_prompt_ids", "teacher_prompt_mask"))
                batch[i].teacher_prompt_ids = _unpadded(*rows)[0]
        rollouts = self.rollouts[mode]
        for old in list(rollouts)[: max(0, len(rollouts) + len(batch) - self.num_kept)]:
            del rollouts[old]
        accelerator = self.trainer.accelerator
        numbers = [
            number * accelerator.num_processes + accelerator.process_index
            for number in range(self.count, self.count + len(batch))
        ]
        self.count += len(batch)
        rollouts.update(zip(numbers, batch, strict=True))
        output["rollout"] = torch.tensor(numbers, device=output["completion_ids"].device)

    def measure(self, mode: str, numbers: torch.Tensor, valid: torch.Tensor, kl: torch.Tensor) -> None:
        """
        Takes up what the loss measured.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
            numbers (`torch.Tensor`):
                Numbers of the rollouts, of shape `(B,)`.
            valid (`torch.Tensor`):
                Which positions of the completions count, of shape `(B, C)`.
            kl (`torch.Tensor`):
                Divergence of each of those, in nats, of shape `(N,)`.
        """
        values = torch.full(valid.shape, torch.nan, device=valid.device)
        values[valid] = kl.detach().float()
        for number, row, counts in zip(numbers.tolist(), values.cpu(), valid.cpu(), strict=True):
            if counts.any():
                self.measured[mode][number] = row[: counts.nonzero().max() + 1].tolist()
        for old in list(self.measured[mode])[: -self.num_kept]:
            del self.measured[mode][old]

    def own(self, mode: str) -> list[Rollout]:
        """
        Rollouts of this process, with what it has measured of them.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.

        Returns:
            `list[Rollout]`: In the order in which they were taken up.
        """
        return _with_kl(self.rollouts[mode], self.measured[mode])

    def write(self, mode: str) -> None:
        """
        Prints, saves and reports the table, and writes the page. To be called on every process.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
        """
        rollouts, measured = (gather_object(list(own[mode].items())) for own in (self.rollouts, self.measured))
        rollouts = _with_kl(dict(rollouts), dict(measured))
        self.rollouts[mode].clear()
        self.measured[mode].clear()
        if not rollouts or not self.trainer.accelerator.is_main_process:
            return
        args, step = self.trainer.args, self.trainer.state.global_step
        measured = {
            "kept": [rollout.kept for rollout in rollouts],
            "tokens": [rollout.num_tokens for rollout in rollouts],
            "kl": [rollout.kl for rollout in rollouts],
        }
        rewards = {name: [rollout.rewards[name] for rollout in rollouts] for name in rollouts[0].rewards}
        columns = dict.fromkeys(name for rollout in rollouts for name in rollout.extra)
        extra = {name: [rollout.extra.get(name) for rollout in rollouts] for name in columns}
        prompts, completions = ([vars(rollout)[name] for rollout in rollouts] for name in ("prompt", "completion"))
        if is_rich_available():
            print_prompt_completions_sample(
                [visible(prompt) for prompt in prompts],
                [visible(completion) for completion in completions],
                rewards,
                None,
                step,
                args.num_completions_to_print,
                extra={
                    **{name: [visible(str(value)) for value in values] for name, values in extra.items()},
                    "kept": ["yes" if kept else "no" for kept in measured["kept"]],
                    "tokens": measured["tokens"],
                    "KL": ["" if kl is None else f"{kl:.3f}" for kl in measured["kl"]],
                },
            )

        import pandas as pd

        table = {"prompt": prompts, "completion": completions, **extra, **rewards, **measured}
        table = pd.DataFrame({"step": step, **table})
        name = "completions" if mode == "train" else "eval_completions"
        path = os.path.join(args.output_dir, "completions", f"{name}_{step:05d}.parquet")
        table.to_parquet(f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
        if args.log_unique_prompts:
            table = table.drop_duplicates(subset=["prompt"])
        for backend in ("wandb", "trackio"):
            if backend in args.report_to:
                backend = importlib.import_module(backend)
                if backend.__name__ == "trackio" or backend.run is not None:
                    backend.log({name: backend.Table(dataframe=table)})
        page = f"step-{step}.html" if mode == "train" else f"eval-step-{step}.html"
        self.write_page(os.path.join(args.output_dir, "rollouts", page), rollouts, f"Step {step}")

    def write_page(self, path: str, rollouts: list[Rollout], title: str) -> None:
        """
        Writes the page, whole or not at all.

        Args:
            path (`str`):
                File. A missing folder is made.
            rollouts (`list[Rollout]`):
                Rollouts to choose from. Those that are trained on come first.
            title (`str`):
                Title.
        """
        shown = [rollout for rollout in rollouts if rollout.token_ids is not None]
        shown = sorted(shown, key=lambda rollout: not rollout.kept)[: self.num_shown]
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            file.write(render(shown, self.trainer._tokenizer, f"{title}: {len(shown)} of {len(rollouts)} rollouts"))
        os.replace(f"{path}.tmp", path)


def _with_kl(rollouts: dict[int, Rollout], measured: dict[int, list[float]]) -> list[Rollout]:
    for number in rollouts.keys() & measured.keys():
        own = [kl for kl in measured[number] if not math.isnan(kl)]
        rollouts[number].kl, rollouts[number].token_kl = sum(own) / len(own), measured[number]
    return list(rollouts.values())


def _unpadded(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def visible(text: str) -> str:
    """
    Text without characters that act instead of showing: controls, overrides of direction, lone surrogates.

    Args:
        text (`str`):
            Text of any origin.

    Returns:
        `str`: The same text with each of those as an escape such as `\\x1b`. Newlines, tabs and the joiners that some
        scripts are written with stay.
    """
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in "\n\t\u200c\u200d"
        else char
        for char in text
    )


def token_texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, int]]:
    """
    Splits token ids into the fewest tokens that are text.

    A character may be spread over several tokens of a byte-level vocabulary; those stay together. What is no text in any
    grouping is one token, decoded as it is.

    Args:
        ids (`list[int]`):
            Token ids.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.

    Returns:
        `list[tuple[str, int]]`: Text and number of tokens. The numbers add up to that of the ids.
    """
    texts, start, before = [], 0, []

    def decode(end: int) -> str:
        # Behind the tokens before it, because some tokenizers leave out the space that a text begins with
        context = tokenizer.decode(before, clean_up_tokenization_spaces=False)
        return tokenizer.decode([*before, *ids[start:end]], clean_up_tokenization_spaces=False)[len(context) :]

    while start < len(ids):
        # A character of UTF-8 has four bytes at most
        ends = range(start + 1, min(start + 4, len(ids)) + 1)
        end = next((end for end in ends if "\ufffd" not in decode(end)), start + 1)
        text = decode(end)
        texts.append((text, end - start))
        start, before = end, [] if "\ufffd" in text else ids[start:end]
    return texts


def render(rollouts: list[Rollout], tokenizer: PreTrainedTokenizerBase, title: str) -> str:
    """
    A page of HTML that needs nothing else, and runs nothing that a model may have written into it.

    Args:
        rollouts (`list[Rollout]`):
            Rollouts to show, with `token_ids`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of them.
        title (`str`):
            Title of the page.

    Returns:
        `str`: HTML.
    """
    bounds = ["0", *(f"{edge:g}" for edge in EDGES)]
    labels = [f"{low} to {high}" for low, high in zip(bounds, bounds[1:], strict=False)] + [f"{bounds[-1]} or more"]
    legend = "".join(f'<span class="k{i}">{label}</span>' for i, label in enumerate(labels))
    light, dark = (
        "".join(
            ".k{} {{ background: {}; color: {}; }}\n".format(i, *pair.split()) for i, pair in enumerate(ramp, start=1)
        )
        for ramp in (LIGHT, DARK)
    )
    articles = "".join(_article(i, rollout, tokenizer) for i, rollout in enumerate(rollouts, start=1))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{_html(title)}</title>
<style>{STYLE}{light}@media (prefers-color-scheme: dark) {{
{dark}}}
</style>
</head>
<body>
<h1>{_html(title)}</h1>
<p>Each token is coloured by the divergence between the student and the teacher there, in nats, before any clip. Point at a
token for its number.</p>
<div class="legend">{legend} nats</div>
{articles}</body>
</html>
"""


def _article(number: int, rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> str:
    chips = [f"{name} {value:.3g}" for name, value in rollout.rewards.items()]
    chips += [f"{rollout.num_tokens} tokens"]
    chips += [] if rollout.kl is None else [f"KL {rollout.kl:.3g} nats per token"]
    chips = "".join(f'<span class="chip">{_html(chip)}</span>' for chip in chips)
    kept = '<span class="chip kept">kept</span>' if rollout.kept else '<span class="chip">not kept</span>'
    sides = {"prompt": rollout.prompt_ids, "prompt of the teacher": rollout.teacher_prompt_ids}
    prompts = "".join(
        f'<h3>{side}</h3>\n<pre class="prompt">{_html(tokenizer.decode(ids))}</pre>\n'
        for side, ids in sides.items()
        if ids is not None
    )
    spans, position = [], 0
    for text, size in token_texts(rollout.token_ids, tokenizer):
        spans.append(_token(text, position, size, rollout.token_kl))
        position += size
    return f"<article>\n<h2>#{number} {kept}{chips}</h2>\n{prompts}<h3>rollout</h3>\n<pre>{''.join(spans)}</pre>\n</article>\n"


def _token(text: str, position: int, size: int, token_kl: list[float] | None) -> str:
    where = f"position {position}" if size == 1 else f"positions {position} to {position + size - 1}"
    about, color = "not measured", ""
    if token_kl is not None:
        values = [value for value in token_kl[position : position + size] if not math.isnan(value)]
        if values:
            about = f"{' + '.join(f'{value:.3g}' for value in values)} nats"
            color = f' class="k{bisect_right(EDGES, max(values))}"'
    # What cannot be seen still needs a place to point at
    shown = _html(text).replace("\n", "<i>↵</i>\n").replace("\t", "<i>⇥</i>\t") or "<i>∅</i>"
    return f'<span{color} title="{_html(repr(text))}, {about}, {where}">{shown}</span>'


def _html(text: str) -> str:
    return escape(visible(text))
