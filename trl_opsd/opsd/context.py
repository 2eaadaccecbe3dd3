"""
What the teacher sees and the student does not.

A context is a prompt template. Its placeholders say what it needs from a row: `{prompt}` is the student's own prompt,
`{solution}` and `{answer}` are columns of the dataset, `{privileged_context}` is a column that, wherever a row has it,
also stands in for `{solution}` and `{answer}`, and `{sibling}` is the shortest correct rollout of the same prompt.
"""

import re
from collections.abc import Callable
from string import Formatter
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational


logger = get_logger(__name__)

# Wording ours. The meaning follows https://huggingface.co/papers/2601.18734 (solution) and
# https://huggingface.co/papers/2603.05433 (concise, uniform and by difficulty).
TEACHER_PROMPT_TEMPLATES = {
    "solution": (
        "{prompt}\n\nA reference solution to this problem, for your eyes only:\n\n{solution}\n\n"
        "With its line of thought in mind, derive the answer again in your own words, step by step, as if you had "
        "found it yourself. Do not mention the reference."
    ),
    "answer": (
        "{prompt}\n\nThe final answer is known to be: {answer}\n\n"
        "Derive it step by step, as if you did not know it, and do not mention that it was given."
    ),
    "concise": (
        "{prompt}\n\nReason as concisely as you can: keep every step that the result depends on, and leave out "
        "restatements, second thoughts and repeated checks."
    ),
    "concise_by_difficulty": (
        "{prompt}\n\nFirst judge how hard this problem is. If it is easy, answer with the few steps that it takes. If it "
        "is hard, think as long as it needs, but leave out restatements, second thoughts and repeated checks."
    ),
    "sibling": (
        "{prompt}\n\nA short and correct way to solve this problem, for your eyes only:\n\n{sibling}\n\n"
        "Solve it as briefly, in your own words. Do not mention the other solution."
    ),
}

PRIVILEGED_FIELDS = ("solution", "answer", "sibling", "privileged_context")


class TeacherContext:
    """
    Puts prompts into the teacher's context.

    Args:
        template (`str`):
            Prompt template with the placeholder `{prompt}` and any of `{solution}`, `{answer}`, `{sibling}` and
            `{privileged_context}`. A literal brace is written twice.

    Attributes:
        fields (`set[str]`):
            Privileged placeholders of the template.

    Raises:
        ValueError: If the template lacks `{prompt}`, has an unknown placeholder or unbalanced braces.

    Example:

    ```python
    >>> from trl_opsd.opsd.context import TeacherContext

    >>> context = TeacherContext("{prompt} The answer is {answer}.")
    >>> context.prompt({"prompt": [{"role": "user", "content": "2+2?"}], "answer": "4"})
    [{'role': 'user', 'content': '2+2? The answer is 4.'}]
    ```
    """

    def __init__(self, template: str):
        try:
            fields = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
        except ValueError as error:
            raise ValueError(
                f"`teacher_prompt_template` has unbalanced braces ({error}): write a literal brace twice, as in "
                "`\\boxed{{}}`."
            ) from None
        unknown = fields - {"prompt", *PRIVILEGED_FIELDS}
        if unknown:
            raise ValueError(
                f"`teacher_prompt_template` has the unknown placeholder `{{{sorted(unknown)[0]}}}`: use {{prompt}}, "
                f"{', '.join('{' + name + '}' for name in PRIVILEGED_FIELDS)}, and write a literal brace twice."
            )
        if "prompt" not in fields:
            raise ValueError(
                "`teacher_prompt_template` has no `{prompt}`, so the teacher would not see the problem: add it."
            )
        self.template = template
        self.fields = fields - {"prompt"}

    def check_columns(self, columns: list[str]) -> None:
        """
        Checks that a dataset has what the template takes.

        Args:
            columns (`list[str]`):
                Columns of the dataset.

        Raises:
            ValueError: If a column is missing. The message names it and the columns found.
        """
        if "privileged_context" in columns:
            return
        for field in sorted(self.fields - {"sibling"}):
            if field not in columns:
                raise ValueError(
                    f"The teacher context needs the column `{field}`, and the dataset has {sorted(columns)}: add it, "
                    "or add `privileged_context`, which stands in for it, or choose another `teacher_context`."
                )

    def check_rows(self, dataset: Dataset) -> None:
        """
        Checks that every row has what the template takes, before training finds the one that does not.

        Args:
            dataset ([`~datasets.Dataset`]):
                Data whose columns [`TeacherContext.check_columns`] has let pass.

        Raises:
            ValueError: If a privileged text is missing in a row, or a prompt does not end in a user turn of plain text.
        """
        columns = {"prompt", "privileged_context", *self.fields} & set(dataset.column_names)
        for row in dataset.select_columns(sorted(columns)):
            self.prompt(row, self.privileged_texts(row, sibling=""))

    def privileged_texts(self, example: dict[str, Any], sibling: str | None = None) -> dict[str, str]:
        """
        What the template takes from a row.

        Args:
            example (`dict[str, Any]`):
                Row of the dataset.
            sibling (`str`, *optional*):
                Shortest correct rollout of the same prompt.

        Returns:
            `dict[str, str]`: Text for each of `fields`.

        Raises:
            ValueError: If one is missing in this row.
        """
        override = example.get("privileged_context")
        texts = {}
        for field in self.fields:
            text = example.get(field)
            if field == "sibling":
                text = sibling
            elif override is not None:
                text = override
            if text is None:
                raise ValueError(
                    f"The teacher context needs `{field}`, and it is empty in the row with the prompt "
                    f"{str(example['prompt'])[:80]!r}: filter such rows out, or fill `privileged_context`."
                )
            texts[field] = str(text)  # an answer may be a number
        return texts

    def prompt(self, example: dict[str, Any], texts: dict[str, str] | None = None) -> list[dict[str, Any]] | str:
        """
        The prompt of a row in the teacher's context.

        Args:
            example (`dict[str, Any]`):
                Row with `prompt`, either a string or a list of messages that ends in a user turn.
            texts (`dict[str, str]`, *optional*):
                Privileged texts, by default those of the row.

        Returns:
            `list[dict[str, Any]]` or `str`: Prompt of the same format as the row's own. Earlier turns are kept.

        Raises:
            ValueError: If a privileged text is missing in this row, or if the last message is not a user turn of
                plain text.
        """
        texts = self.privileged_texts(example) if texts is None else texts
        prompt = example["prompt"]
        if isinstance(prompt, str):
            return self.template.format(prompt=prompt, **texts)
        *earlier, last = prompt
        if last["role"] != "user" or not isinstance(last["content"], str):
            raise ValueError(
                f"A teacher context needs prompts that end in a user turn of plain text, and found a last message "
                f"with the role {last['role']!r} and content of type {type(last['content']).__name__} in the row with the "
                f"prompt {str(prompt)[:80]!r}: filter such rows out, or correct them."
            )
        return [*earlier, {**last, "content": self.template.format(prompt=last["content"], **texts)}]


def takes_sibling(context: TeacherContext | None) -> bool:
    """Whether what the teacher sees in a context is known only when the rollouts are written."""
    return context is not None and "sibling" in context.fields


class TeacherPrompts:
    """
    The prompts of a batch as the teacher sees them.

    Args:
        contexts (`list[TeacherContext]`):
            Contexts of the teacher, in order of preference. If there is none, it sees the plain prompt, rendered in its own
            way.
        sibling_fallback ([`TeacherContext`], *optional*):
            Context of a rollout without a correct sibling, where the context takes one.
        render (`Callable`):
            Token ids of a list of prompts, with the generation prompt, under the teacher's arguments of the chat template.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the student, in whose tokens a privileged text is cut.
    """

    def __init__(
        self,
        contexts: list[TeacherContext],
        sibling_fallback: TeacherContext | None,
        render: Callable[[list], list[list[int]]],
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.contexts, self.sibling_fallback = contexts, sibling_fallback
        self.render, self.tokenizer = render, tokenizer
        special = sorted({token.content for token in tokenizer.added_tokens_decoder.values() if token.special})
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def context_of(self, sibling: str | None) -> TeacherContext | None:
        """
        The context of a rollout where there is no gate that chooses it.

        Args:
            sibling (`str`, *optional*):
                Shortest correct rollout of the same prompt.

        Returns:
            [`TeacherContext`] or `None`: `None` for the plain prompt.
        """
        context = self.contexts[0] if self.contexts else None
        return self.sibling_fallback if sibling is None and takes_sibling(context) else context

    def prompt(
        self,
        row: dict[str, Any],
        context: TeacherContext | None,
        sibling: str | None = None,
        cut: Callable[[str], str] | None = None,
    ) -> list[dict[str, Any]] | str:
        """
        A prompt in the teacher's context.

        Args:
            row (`dict[str, Any]`):
                Row of the dataset.
            context ([`TeacherContext`], *optional*):
                Context. `None` for the plain prompt.
            sibling (`str`, *optional*):
                Shortest correct rollout of the same prompt.
            cut (`Callable`, *optional*):
                Shortens each privileged text.

        Returns:
            `list[dict[str, Any]]` or `str`: Prompt of the same format as the row's own.
        """
        if context is None:
            return row["prompt"]
        texts = context.privileged_texts(row, sibling)
        if cut is not None:
            texts = {field: cut(text) for field, text in texts.items()}
        # What spells a special token would be one, and might end the turn that it stands in: it is read as text with a space
        texts = {
            field: self._special.sub(lambda found: f"{found[0][:1]} {found[0][1:]}", text)
            for field, text in texts.items()
        }
        return context.prompt(row, texts)

    def encode(
        self,
        rows: list[dict[str, Any]],
        contexts: list[TeacherContext | None],
        siblings: list[str | None],
        max_length: int | None,
    ) -> tuple[list[list[int]], int]:
        """
        Token ids of the prompts of a batch. In one that is too long the privileged text is cut, never the problem.

        Args:
            rows (`list[dict[str, Any]]`):
                Rows of the dataset.
            contexts (`list[TeacherContext | None]`):
                Context of each, `None` for the plain prompt.
            siblings (`list[str | None]`):
                Shortest correct rollout of the same prompt, for each of them.
            max_length (`int`, *optional*):
                Most tokens of a prompt. `None` for no limit.

        Returns:
            `tuple[list[list[int]], int]`: Ids of each prompt, and how many were cut.

        Raises:
            ValueError: If a prompt does not fit even without its privileged text.
        """
        parts = list(zip(rows, contexts, siblings, strict=True))
        prompt_ids = self.render([self.prompt(*part) for part in parts])
        if not self.contexts or max_length is None:
            return prompt_ids, 0
        too_long = [index for index, ids in enumerate(prompt_ids) if len(ids) > max_length]
        for index in too_long:
            prompt_ids[index] = self._cut(*parts[index], max_length)
        return prompt_ids, len(too_long)

    def _cut(
        self, row: dict[str, Any], context: TeacherContext | None, sibling: str | None, max_length: int
    ) -> list[int]:
        """Ids of a prompt that fits, with as many tokens of each privileged text as there is room for."""

        def prompt_ids(num_tokens: int) -> list[int]:
            def cut(text: str) -> str:
                return self.tokenizer.decode(self.tokenizer(text, add_special_tokens=False)["input_ids"][:num_tokens])

            return self.render([self.prompt(row, context, sibling, cut)])[0]

        if len(prompt_ids(0)) > max_length:
            raise ValueError(
                f"The teacher's prompt is longer than {max_length} tokens even without its privileged text, and the "
                "problem is never cut: raise `max_teacher_prompt_length` or filter out the row with the prompt "
                f"{str(row['prompt'])[:80]!r}."
            )
        logger.warning_once(
            f"A privileged text was cut to fit {max_length} tokens of teacher prompt; the share of prompts is logged as "
            "`opsd/privileged_cut`."
        )
        fits, too_many = 0, max_length
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if len(prompt_ids(middle)) <= max_length:
                fits = middle
            else:
                too_many = middle
        return prompt_ids(fits)

    def check_lengths(self, dataset: Dataset, max_length: int | None) -> None:
        """
        Checks that every problem fits, before training finds the one that does not.

        Args:
            dataset ([`~datasets.Dataset`]):
                Training data.
            max_length (`int`, *optional*):
                Most tokens of the teacher's prompt beside the longest completion that there may be. `None` for no limit.

        Raises:
            ValueError: If the prompt of a row is longer, even without its privileged text. The message counts such rows.
        """

        if max_length is None:
            return

        def text(prompt) -> str:
            return prompt if isinstance(prompt, str) else "".join(str(turn["content"]) for turn in prompt)

        # No more tokens than bytes, and what a template adds is small beside them: the others are never tokenised
        suspects = [i for i, prompt in enumerate(dataset["prompt"]) if 2 * len(text(prompt).encode()) > max_length]
        too_long = []
        for row in suspects:
            example = dataset[row]
            prompts = [self.prompt(example, context, "", lambda text: "") for context in self.contexts or [None]]
            if max(map(len, self.render(prompts))) > max_length:
                too_long.append(row)
        if too_long:
            raise ValueError(
                f"In {len(too_long)} of {len(dataset)} rows the teacher's prompt is longer than {max_length} tokens even "
                f"without its privileged text, and the problem is never cut: raise `max_teacher_prompt_length`, lower "
                f"`max_completion_length`, or filter such rows out (the first is row {too_long[0]})."
            )

    def check_turns(self, dataset: Dataset) -> None:
        """
        Checks that no problem spells a special token, such as the one that ends a turn: what follows it in the teacher's
        context would not be the user's any more.

        Args:
            dataset ([`~datasets.Dataset`]):
                Training data. In plain strings the chat template is a part of the prompt, and so are its tokens.

        Raises:
            ValueError: If one does. The message counts such rows.
        """
        found = {}
        for number, prompt in enumerate(dataset["prompt"]):
            if not isinstance(prompt, str) and isinstance(prompt[-1]["content"], str):
                match = self._special.search(prompt[-1]["content"])
                if match is not None:
                    found[number] = match[0]
        if found:
            row, token = next(iter(found.items()))
            raise ValueError(
                f"In {len(found)} of {len(dataset)} rows the last message of `prompt` spells a special token of the "
                f"tokenizer's ({token!r} in row {row}, which begins {dataset[row]['prompt'][-1]['content'][:40]!r}), and so may "
                "end the turn that the teacher's context stands in: filter such rows out, or write it with a space in it "
                f"({token[:1]} {token[1:]})."
            )

    def check_boundary(self, row: dict[str, Any], student: Callable, teacher: Callable) -> None:
        """
        Checks that student and teacher are asked for the completion by the same generation prompt.

        Args:
            row (`dict[str, Any]`):
                Row of the dataset. A plain string has no generation prompt: how it ends is the template's own business.
            student (`Callable`):
                Token ids of a prompt, on the student's side; called with the prompt and whether the generation prompt
                is added.
            teacher (`Callable`):
                The same on the teacher's side.

        Raises:
            ValueError: If the generation prompts differ. The message shows both.
        """
        if not is_conversational({"prompt": row["prompt"]}):
            return
        endings = []
        in_contexts = [(teacher, self.prompt(row, context, sibling="")) for context in self.contexts or [None]]
        for render, prompt in ((student, row["prompt"]), *in_contexts):
            ids, without = render(prompt, True), render(prompt, False)
            # Not always a prefix: some templates end a conversation that has no generation prompt
            same = next(
                (i for i, pair in enumerate(zip(ids, without, strict=False)) if pair[0] != pair[1]), len(without)
            )
            endings.append(ids[same:])
        other = next((ending for ending in endings if ending != endings[0]), None)
        if other is not None:
            raise ValueError(
                "The student and the teacher are asked for the completion in different ways, so the teacher would "
                f"score tokens in a place where it never writes them: the student's prompt ends in "
                f"{self.tokenizer.decode(endings[0])!r} and the teacher's in {self.tokenizer.decode(other)!r}. "
                "Make `chat_template_kwargs` and `teacher_chat_template_kwargs` agree on it."
            )
