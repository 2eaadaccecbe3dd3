"""
The teacher's context: what the teacher sees and the student does not.

A context is a prompt template. Its placeholders say what it needs from a row: `{prompt}` is the student's own prompt,
`{solution}` and `{answer}` are columns of the dataset, and `{privileged_context}` is a column that, wherever a row has
it, also stands in for `{solution}` and `{answer}`.
"""

from string import Formatter
from typing import Any


# Wording ours. The meaning follows https://huggingface.co/papers/2601.18734 (solution) and
# https://huggingface.co/papers/2603.05433 (concise).
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
}

PRIVILEGED_FIELDS = ("solution", "answer", "privileged_context")


class TeacherContext:
    """
    Puts prompts into the teacher's context.

    Args:
        template (`str`):
            Prompt template with the placeholder `{prompt}` and any of `{solution}`, `{answer}` and
            `{privileged_context}`. A literal brace is written twice.

    Attributes:
        fields (`set[str]`):
            Privileged placeholders of the template.

    Raises:
        ValueError: If the template lacks `{prompt}`, has an unknown placeholder or unbalanced braces.

    Example:

    ```python
    >>> from trl_opsd.opsd.teacher import TeacherContext

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
        for field in sorted(self.fields):
            if field not in columns:
                raise ValueError(
                    f"The teacher context needs the column `{field}`, and the dataset has {sorted(columns)}: add it, "
                    "or add `privileged_context`, which stands in for it, or choose another `teacher_context`."
                )

    def prompt(self, example: dict[str, Any]) -> list[dict[str, Any]] | str:
        """
        The prompt of a row in the teacher's context.

        Args:
            example (`dict[str, Any]`):
                Row with `prompt`, either a string or a list of messages that ends in a user turn, and the columns
                that the template takes.

        Returns:
            `list[dict[str, Any]]` or `str`: Prompt of the same format as the row's own. Earlier turns are kept.

        Raises:
            ValueError: If a privileged text is missing in this row, or if the last message is not a user turn of
                plain text.
        """
        override = example.get("privileged_context")
        values = {}
        for field in self.fields:
            values[field] = override if override is not None else example.get(field)
            if values[field] is None:
                raise ValueError(
                    f"The teacher context needs `{field}`, and it is empty in the row with the prompt "
                    f"{str(example['prompt'])[:80]!r}: filter such rows out, or fill `privileged_context`."
                )
        prompt = example["prompt"]
        if isinstance(prompt, str):
            return self.template.format(prompt=prompt, **values)
        *earlier, last = prompt
        if last["role"] != "user" or not isinstance(last["content"], str):
            raise ValueError(
                f"A teacher context needs prompts that end in a user turn of plain text, and found a last message "
                f"with the role {last['role']!r} and content of type {type(last['content']).__name__}."
            )
        return [*earlier, {**last, "content": self.template.format(prompt=last["content"], **values)}]
