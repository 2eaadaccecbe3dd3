"""
The data sets that have a name here: where each lies, its licence, what the model is asked, and how its columns become
`prompt` and `answer` or `tests`, `entry_point`, `setup` and `solution`. `python -m trl_opsd.data` prints them as a table.
"""

import base64
import io
import json
import pickle
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


# The wording that reasoning models are trained with; the verifier reads the answer from where it asks for it.
MATH_PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
CODE_PROMPT = (
    "{problem}\n\nPlease reason step by step, and put the whole program in one ```python code block at the end."
)


class Unusable(Exception):
    """A row of a named source that cannot be used, through no fault of the user's: it is counted and left out."""


@dataclass(frozen=True)
class Source:
    """
    One named data set.

    Args:
        hub_id (`str`):
            Repository of the data set on the Hub.
        licence (`str`):
            Licence of the data, as its authors state it.
        verifier (`str`):
            Name of the reward function that its rows are made for.
        problem (`str`):
            Column that holds the problem.
        needed (`tuple[str, ...]`):
            Columns that must be there beside `problem`.
        read (`Callable`):
            Function from a raw row to the columns `answer`, `tests`, `entry_point`, `setup` and `solution` that it has,
            and to `problem` where that is more than its column. It raises [`Unusable`] where nothing could judge an
            answer, and the row is left out.
        prompt (`str`, *optional*, defaults to `MATH_PROMPT`):
            Wording of the user message, with `{problem}` where the problem goes.
        splits (`tuple[str, ...]`, *optional*, defaults to `("train", "test")`):
            Splits there are.
        config (`str`, *optional*):
            Configuration of the data set on the Hub.
        tasks (`tuple[str, ...]`, *optional*, defaults to `()`):
            Configurations on the Hub, or files of a local copy, that together are the data set; `NAME:TASK` is one of
            them, and rows say in `task` which one they are from.
        used (`tuple[str, ...]`, *optional*, defaults to `()`):
            Further columns that `read` takes up, so that they are not kept beside what it makes of them.
    """

    hub_id: str
    licence: str
    verifier: str
    problem: str
    needed: tuple[str, ...]
    read: Callable[[dict[str, Any]], dict[str, Any]]
    prompt: str = MATH_PROMPT
    splits: tuple[str, ...] = ("train", "test")
    config: str | None = None
    tasks: tuple[str, ...] = ()
    used: tuple[str, ...] = ()

    def to_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """
        Maps one raw row to the schema; columns that the mapping does not use are kept as they are.

        Args:
            row (`dict`):
                Row as the Hub, or a local copy of it, has it.

        Returns:
            `dict`: Row with `prompt` (one user message), `answer` or `tests`, and where the source has them
            `entry_point`, `setup` and `solution`.

        Raises:
            Unusable: If nothing could judge an answer to this row.
        """
        used = {self.problem, *self.needed, *self.used}
        mapped = {key: value for key, value in row.items() if key not in used}
        read = {"problem": row[self.problem], **self.read(row)}
        content = self.prompt.replace("{problem}", read.pop("problem").strip())
        return {**mapped, "prompt": [{"role": "user", "content": content}], **read}


def _gsm8k(row: dict[str, Any]) -> dict[str, Any]:
    reasoning, mark, answer = row["answer"].rpartition("####")
    if not mark or not answer.strip():
        raise ValueError("its answer does not end in `#### NUMBER`")
    # <<48/2=24>> are notes for a calculator tool, which no model of today writes
    return {
        "answer": answer.strip().replace(",", ""),
        "solution": re.sub(r"<<.*?>>", "", reasoning).strip(),
    }


def _math(row: dict[str, Any]) -> dict[str, Any]:
    *before, rest = re.split(r"\\(?:boxed|fbox)", row["solution"])
    if not before:
        raise ValueError("its solution has no `\\boxed{}`")
    depth = 0
    for brace in re.finditer(r"[{}]", rest):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            break
    if depth and rest.startswith("{"):
        raise ValueError("its solution has a `\\boxed{` that is not closed")
    # a few solutions write `\boxed 2$`
    answer = rest[1 : brace.start()] if rest.startswith("{") else re.match(r"\s*([^\s$.]*)", rest)[1]
    return {"answer": answer.strip(), "solution": row["solution"].strip()}


def _math_500(row: dict[str, Any]) -> dict[str, Any]:
    solution = {"solution": row["solution"].strip()} if "solution" in row else {}
    return {"answer": row["answer"].strip(), **solution}


def _humaneval(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "problem": f"Please complete this Python function:\n\n```python\n{row['prompt'].strip()}\n```",
        "tests": f"{row['test'].strip()}\n\ncheck({row['entry_point']})\n",
        "entry_point": row["entry_point"],
        "solution": f"```python\n{row['prompt'].strip()}\n{row['canonical_solution'].rstrip()}\n```",
    }


def _mbpp(row: dict[str, Any]) -> dict[str, Any]:
    first = row["test_list"][0]
    functions = re.findall(r"^def (\w+)", row["code"], re.MULTILINE)
    setup = row.get("test_setup_code")
    return {
        "problem": f"{row['text'].strip()}\n\nYour program has to pass this test:\n\n```python\n{first}\n```",
        "tests": "\n".join([*([setup] if setup else []), *row["test_list"]]) + "\n",
        "entry_point": next((name for name in functions if re.search(rf"\b{name}\(", first)), None),
        "solution": f"```python\n{row['code'].strip()}\n```",
    }


_READS = "Your program reads from standard input and prints to standard output."


def _cases(problem: str, inputs: list, outputs: list, name: str | None = None, starter: str = "") -> dict[str, Any]:
    """The columns of a problem whose tests are inputs and outputs, of a program or of a function."""
    if not inputs or len(inputs) != len(outputs):
        raise Unusable("it has no tests, or not as many inputs as outputs")
    if name is None and not any("".join(text).strip() for text in outputs):
        raise Unusable("it wants no output")
    tests = {"inputs": inputs, "outputs": outputs, **({} if name is None else {"fn_name": name})}
    start = f"Begin with this:\n\n```python\n{starter.rstrip()}\n```" if starter.strip() else f"Its name is `{name}`."
    return {"problem": f"{problem.strip()}\n\n{_READS if name is None else start}", "tests": json.dumps(tests)}


def _apps(row: dict[str, Any]) -> dict[str, Any]:
    try:
        tests = json.loads(row["input_output"] or "{}")
        solutions = json.loads(row.get("solutions") or "[]")
    except ValueError as error:  # among them numbers with more digits than Python reads
        raise Unusable(f"its tests cannot be read: {error}") from None
    cases = tests.get("inputs", []), tests.get("outputs", [])
    read = _cases(row["question"], *cases, tests.get("fn_name"), row.get("starter_code") or "")
    return {**read, **({"solution": f"```python\n{solutions[0].strip()}\n```"} if solutions else {})}


def _code_contests(row: dict[str, Any]) -> dict[str, Any]:
    if row.get("input_file") or row.get("output_file"):
        raise Unusable("its programs read files")
    tests = [row[name] or {} for name in ("public_tests", "private_tests", "generated_tests")]
    inputs, outputs = ([text for part in tests for text in part.get(name, [])] for name in ("input", "output"))
    solutions = row.get("solutions") or {"language": [], "solution": []}
    python = [text for kind, text in zip(solutions["language"], solutions["solution"], strict=True) if kind == 3]
    solution = {"solution": f"```python\n{python[0].strip()}\n```"} if python else {}
    return {**_cases(row["description"], inputs, outputs), **solution}


class _Text(pickle.Unpickler):
    """Reads a pickled text, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> None:
        raise ValueError(f"the tests are not a text: they name {module}.{name}")


def _livecodebench(row: dict[str, Any]) -> dict[str, Any]:
    tests = json.loads(row["public_test_cases"])
    hidden = row["private_test_cases"]
    if not hidden.lstrip().startswith("["):
        hidden = _Text(io.BytesIO(zlib.decompress(base64.b64decode(hidden)))).load()
    tests += json.loads(hidden)
    inputs, outputs = [test["input"] for test in tests], [test["output"] for test in tests]
    name = json.loads(row.get("metadata") or "{}").get("func_name")
    if name is not None:  # an argument in each line
        inputs = [[json.loads(line) for line in text.splitlines() if line.strip()] for text in inputs]
        outputs = [json.loads(text) for text in outputs]
    return _cases(row["question_content"], inputs, outputs, name, row.get("starter_code") or "")


def _kodcode(row: dict[str, Any]) -> dict[str, Any]:
    declared = [function["function_declaration"] for function in row.get("test_info") or []]
    calls = "\n".join(declared)
    named = f"\n\nThe tests call what is declared so:\n\n```python\n{calls}\n```" if declared else ""
    return {
        "problem": f"{row['question'].strip()}{named}",
        "tests": f"{row['test'].strip()}\n",
        "solution": f"```python\n{row['solution'].strip()}\n```",
    }


def _leetcode(row: dict[str, Any]) -> dict[str, Any]:
    start = f"Begin with this:\n\n```python\n{row['starter_code'].rstrip()}\n```"
    return {
        "problem": f"{row['problem_description'].strip()}\n\n{start}",
        "tests": f"{row['test'].strip()}\n",
        "entry_point": row["entry_point"],
        "setup": row["prompt"],
        "solution": f"```python\n{row['completion'].strip()}\n```",
    }


def _amc(row: dict[str, Any]) -> dict[str, Any]:
    number = float(row["answer"])  # 27.0
    return {"answer": f"{number:.0f}" if number.is_integer() else str(row["answer"])}


def _ifeval(row: dict[str, Any]) -> dict[str, Any]:
    # instructions differ in what they take, and a column has one type
    return {"instructions": json.dumps({name: row[name] for name in ("instruction_id_list", "kwargs")})}


_BBH_TASKS = (
    *("boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages"),
    *("formal_fallacies", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects"),
    *("logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation"),
    *("multistep_arithmetic_two", "navigate", "object_counting", "penguins_in_a_table"),
    *("reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks"),
    *("sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects"),
    *("tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies"),
    "word_sorting",
)

SOURCES = {
    # https://huggingface.co/papers/2110.14168; the answer column holds the reasoning, then `#### 42`
    "gsm8k": Source(
        hub_id="openai/gsm8k",
        config="main",
        licence="MIT",
        verifier="math_reward",
        problem="question",
        needed=("answer",),
        read=_gsm8k,
    ),
    # https://huggingface.co/papers/2103.03874; the answer is what the solution boxes last
    "math": Source(
        hub_id="DigitalLearningGmbH/MATH-lighteval",
        licence="MIT",
        verifier="math_reward",
        problem="problem",
        needed=("solution",),
        read=_math,
    ),
    # https://huggingface.co/papers/2305.20050: 500 of the test problems of `math`
    "math-500": Source(
        hub_id="HuggingFaceH4/MATH-500",
        licence="MIT",
        verifier="math_reward",
        splits=("test",),
        problem="problem",
        needed=("answer",),
        used=("solution",),
        read=_math_500,
    ),
    # https://huggingface.co/papers/2503.14476, deduplicated; here the solution column holds the bare final answer
    "dapo-math-17k": Source(
        hub_id="open-r1/DAPO-Math-17k-Processed",
        config="en",
        licence="Apache-2.0",
        verifier="math_reward",
        splits=("train",),
        problem="prompt",
        needed=("solution",),
        read=lambda row: {"answer": row["solution"].strip()},
    ),
    # https://huggingface.co/papers/2107.03374
    "humaneval": Source(
        hub_id="openai/openai_humaneval",
        licence="MIT",
        verifier="code_reward",
        splits=("test",),
        problem="prompt",
        needed=("test", "entry_point", "canonical_solution"),
        prompt=CODE_PROMPT,
        read=_humaneval,
    ),
    # https://huggingface.co/papers/2108.07732; the first test is shown, because it alone says what to call the function
    "mbpp": Source(
        hub_id="google-research-datasets/mbpp",
        config="full",
        licence="CC-BY-4.0",
        verifier="code_reward",
        splits=("train", "validation", "test", "prompt"),
        problem="text",
        needed=("code", "test_list"),
        used=("test_setup_code",),
        prompt=CODE_PROMPT,
        read=_mbpp,
    ),
    # https://huggingface.co/papers/2105.09938: programs that read and print, and functions. The Hub has a loading script,
    # which `datasets` does not run: take a file of its folder, `apps:train.jsonl`
    "apps": Source(
        hub_id="codeparrot/apps",
        licence="MIT",
        verifier="code_reward",
        problem="question",
        needed=("input_output",),
        used=("solutions", "starter_code"),
        prompt=CODE_PROMPT,
        read=_apps,
    ),
    # https://huggingface.co/papers/2312.14852, in the same form
    "taco": Source(
        hub_id="BAAI/TACO",
        config="ALL",
        licence="Apache-2.0",
        verifier="code_reward",
        problem="question",
        needed=("input_output",),
        used=("solutions", "starter_code"),
        prompt=CODE_PROMPT,
        read=_apps,
    ),
    # https://huggingface.co/papers/2203.07814: public, private and generated tests together
    "code-contests": Source(
        hub_id="deepmind/code_contests",
        licence="CC-BY-4.0",
        verifier="code_reward",
        splits=("train", "valid", "test"),
        problem="description",
        needed=("public_tests", "private_tests", "generated_tests"),
        used=("solutions", "incorrect_solutions", "input_file", "output_file"),
        prompt=CODE_PROMPT,
        read=_code_contests,
    ),
    # https://huggingface.co/papers/2403.07974: for evaluation; by file too, `livecodebench:test6.jsonl`
    "livecodebench": Source(
        hub_id="livecodebench/code_generation_lite",
        licence="CC",
        verifier="code_reward",
        splits=("test",),
        problem="question_content",
        needed=("public_test_cases", "private_test_cases"),
        used=("starter_code", "metadata"),
        prompt=CODE_PROMPT,
        read=_livecodebench,
    ),
    # https://huggingface.co/papers/2503.02951: tests in pytest's form
    "kodcode": Source(
        hub_id="KodCode/KodCode-V1",
        licence="CC-BY-NC-4.0",
        verifier="code_reward",
        splits=("train",),
        problem="question",
        needed=("test", "solution"),
        used=("test_info",),
        prompt=CODE_PROMPT,
        read=_kodcode,
    ),
    # https://huggingface.co/papers/2504.14655: methods of a class; `prompt` is what LeetCode imports and defines itself
    "leetcode": Source(
        hub_id="newfacade/LeetCodeDataset",
        licence="Apache-2.0",
        verifier="code_reward",
        problem="problem_description",
        needed=("starter_code", "prompt", "test", "entry_point", "completion"),
        used=("query", "response", "input_output"),
        prompt=CODE_PROMPT,
        read=_leetcode,
    ),
    # https://huggingface.co/papers/2210.09261: for evaluation only, which a canary in each file asks for
    "bbh": Source(
        hub_id="lukaemon/bbh",
        licence="MIT",
        verifier="logic_reward",
        splits=("test",),
        problem="input",
        needed=("target",),
        tasks=_BBH_TASKS,
        read=lambda row: {"answer": row["target"].strip()},
    ),
    # The competition's own problems; their answers are whole numbers from 0 to 999
    "aime24": Source(
        hub_id="HuggingFaceH4/aime_2024",
        licence="not stated",
        verifier="math_reward",
        splits=("train",),
        problem="problem",
        needed=("answer",),
        used=("solution",),
        read=_math_500,
    ),
    "aime25": Source(
        hub_id="math-ai/aime25",
        licence="Apache-2.0",
        verifier="math_reward",
        splits=("test",),
        problem="problem",
        needed=("answer",),
        read=_math_500,
    ),
    # AMC 12 of 2023, asked without the choices
    "amc23": Source(
        hub_id="math-ai/amc23",
        licence="not stated",
        verifier="math_reward",
        splits=("test",),
        problem="question",
        needed=("answer",),
        read=_amc,
    ),
    # https://huggingface.co/papers/2311.07911: instructions that a program can check, off the domain of reasoning
    "ifeval": Source(
        hub_id="google/IFEval",
        licence="Apache-2.0",
        verifier="trl_opsd.evaluate.ifeval.ifeval_reward",
        splits=("train",),
        problem="prompt",
        needed=("instruction_id_list", "kwargs"),
        prompt="{problem}",
        read=_ifeval,
    ),
}
