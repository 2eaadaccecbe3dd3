"""
A page that shows a few rollouts, every token coloured by how much the teacher disagrees.
"""

import math
import os
from bisect import bisect_right
from html import escape

from transformers import PreTrainedTokenizerBase, TrainerCallback

from .completions import Rollout, RolloutLog, visible


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


class RolloutPages(TrainerCallback):
    """
    Writes `<output_dir>/rollouts/step-<n>.html` with every log of [`OPSDTrainer`].

    Args:
        trainer ([`OPSDTrainer`]):
            Trainer. Its `num_completions_to_print` says how many rollouts are shown, 8 where it is not set.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        if trainer.rollout_log is None:
            trainer.rollout_log = RolloutLog(trainer)
        trainer.rollout_log.num_shown = num_shown(trainer.args)

    def on_log(self, args, state, control, **kwargs):
        mode = "train" if self.trainer.model.training else "eval"
        rollouts = self.trainer.rollout_log.gathered(mode)
        if rollouts:  # all of them are in the main process
            name = f"step-{state.global_step}.html" if mode == "train" else f"eval-step-{state.global_step}.html"
            path = os.path.join(args.output_dir, "rollouts", name)
            write_page(path, rollouts, self.trainer.rollout_log, f"Step {state.global_step}")


def num_shown(args) -> int:
    """Rollouts on a page."""
    return NUM_SHOWN if args.num_completions_to_print is None else args.num_completions_to_print


def write_page(path: str, rollouts: list[Rollout], log: RolloutLog, title: str) -> None:
    """
    Writes a page, whole or not at all.

    Args:
        path (`str`):
            File. A missing folder is made.
        rollouts (`list[Rollout]`):
            Rollouts to choose from. Those that are trained on come first.
        log ([`RolloutLog`]):
            Log that they come from.
        title (`str`):
            Title.
    """
    shown = [rollout for rollout in rollouts if rollout.token_ids is not None]
    shown = sorted(shown, key=lambda rollout: not rollout.kept)[: log.num_shown]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(render(shown, log.tokenizer, f"{title}: {len(shown)} of {len(rollouts)} rollouts"))
    os.replace(f"{path}.tmp", path)


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
