import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..opsd.context import TEACHER_PROMPT_TEMPLATES, TeacherContext
from .tasks import OTHER, Task, find_task, task_name


_DTYPES = ("auto", "float32", "bfloat16", "float16")
_BACKENDS = ("transformers", "vllm", "server")
_SERVER_APIS = ("tokens", "chat")
#: Options that a task may have for itself
TASK_OPTIONS = ("dataset_split", "max_samples", "reward_funcs", "prompt_template", "system_prompt", "decoding")
TASK_OPTIONS += ("num_samples", "temperature", "top_p", "top_k", "min_p", "stop", "max_completion_length")
TASK_OPTIONS += ("thinking_budget", "pass_at_k")


@dataclass
class EvaluateConfig:
    r"""
    Configuration class for [`~trl_opsd.evaluate.evaluate`].

    Parameters:
        > Parameters that control what is measured

        model_name_or_path (`str`, *optional*):
            Checkpoint: a folder, an adapter's folder, or an id on the Hub. Quantised ones are read as transformers, or
            vLLM, reads them.
        checkpoints (`list[str]`, *optional*):
            Several of them in place of `model_name_or_path`, each `PATH` or `STAGE=PATH`.
        prompt_only (`bool`, *optional*):
            Whether to measure the first checkpoint once more with `prompt_template: concise`, as the stage
            `prompt-only`: the baseline of compaction that costs nothing. By default, if there are several checkpoints.
        tasks (`list[str]`, *optional*):
            Benchmarks by name (see `trl_opsd/evaluate/tasks.py`), alone or with what
            [`~trl_opsd.data.load_prompts`] takes after a colon (`gsm8k:test.jsonl`, `bbh:word_sorting`,
            `reasoning-gym:chain_sum`), tasks of lm-evaluation-harness that generate (`lm_eval:NAME` or
            `lm_eval:FILE.yaml`), or other data sets, as in `dataset_name`. With `[:N]` at the end, N problems of
            it. A task brings values for all options below that are not set.
        dataset_name (`str`, *optional*):
            One data set in place of `tasks`: a file, a folder, a named source or a data set on the Hub (see
            [`~trl_opsd.data.load_prompts`]).
        dataset_split (`str`, *optional*):
            Split of the data set. Defaults to the task's, or `"test"`.
        max_samples (`int`, *optional*):
            Number of problems, from the first on, and equally many from each part of a set that has several. All of
            them if not set.
        reward_funcs (`list[str]`, *optional*):
            Verifiers by name, as in [`~trl_opsd.rewards.load_reward_funcs`]. A completion is correct if it ended and
            each of them scores it at least 1.0. Problems that one of them cannot judge (`None`) are not counted.
            Defaults to the task's, or `["math_reward"]`.
        prompt_template (`str`, *optional*):
            Context to put each prompt in: one of `"solution"`, `"answer"` and `"concise"` (the teacher contexts of
            [`OPSDConfig`]), or a text with `{prompt}` and any of `{solution}`, `{answer}`; a literal brace is written
            twice. `"concise"` is the prompt-only baseline of compaction.
        system_prompt (`str`, *optional*):
            System message to begin every conversation with.
        chat_template_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments for the chat template, for instance `{"enable_thinking": true}`.
        thinking_tags (`list[str]`, *optional*):
            What opens and what closes the thinking block, for instance `["<reasoning>", "</reasoning>"]`. Defaults to
            the pair in the chat template (`<think>`, `[THINK]`, `<seed:think>` and the like), or `<think>`.
        pass_at_k (`list[int]`, *optional*):
            The k of `pass@k`, each at most `num_samples`. Defaults to powers of two.
        task_options (`dict[str, dict]` or `str`, *optional*):
            Options for single ones of `tasks`, which come before those for all, for instance
            `{"math-500": {"max_completion_length": 8192, "num_samples": 4}}`.

        > Parameters that control generation

        decoding (`list[str]`, *optional*):
            Ways of decoding, each giving one row of results: `"greedy"` and `"sampled"`. Defaults to the task's, or
            `["greedy"]`.
        num_samples (`int`, *optional*):
            Completions per problem of `"sampled"`. Defaults to the task's, or 1.
        temperature (`float`, *optional*):
            Temperature of `"sampled"`. Defaults to the task's, or 1.0.
        top_p (`float`, *optional*):
            Share of the probability mass that `"sampled"` draws from; `1.0` is all of it. Defaults to the task's, or
            1.0.
        top_k (`int`, *optional*):
            Number of tokens that `"sampled"` draws from; `0` is the whole vocabulary. Defaults to the task's, or 0.
        min_p (`float`, *optional*):
            Least probability that `"sampled"` draws, as a share of the most probable token's. Defaults to the task's,
            or to no limit.
        stop (`list[str]`, *optional*):
            Texts that end a completion, beside the model's own end tokens. They are no part of what is judged.
            Defaults to the task's, or none.
        max_completion_length (`int`, *optional*):
            Maximum number of tokens of a completion. One that has not ended by then is truncated, and never correct;
            so is one for which the model has fewer positions left. A prompt that leaves none is not asked, and counted
            as `too_long`. Defaults to the task's, or 1024.
        thinking_budget (`int`, *optional*):
            Number of tokens after which a thinking block is closed by force, and the answer written from there (the
            upper bound of [budget forcing](https://huggingface.co/papers/2501.19393)).
        batch_size (`int`, *optional*, defaults to `64`):
            Number of completions generated at a time.
        seed (`int`, *optional*, defaults to `42`):
            Seed of `"sampled"`: of each completion by itself, whatever is generated beside it.

        > Parameters that control the model

        backend (`str`, *optional*, defaults to `"transformers"`):
            What generates: `"transformers"`, `"vllm"` (in this process) or `"server"` (one that runs, or vLLM's, started).
        server_url (`str`, *optional*):
            Address of the server, for instance `http://localhost:8000` or `https://api.example.com/v1`. The tokenizer is
            that of the checkpoint; the key that of the environment variable `OPENAI_API_KEY`. If not set, vLLM's server is
            started on each checkpoint, and ended after it.
        server_api (`str`, *optional*, defaults to `"tokens"`):
            How the server is asked: by `"tokens"` for tokens, exactly as other backends, which vLLM's can, or by `"chat"`
            messages for text, as any with OpenAI's API can. It then applies a chat template and end tokens of its own, and
            its text is tokenised here to count tokens.
        server_model (`str`, *optional*):
            Name of the model or the adapter at the server. Defaults to the only one it has.
        vllm_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments for `vllm.LLM`, for instance `{"tensor_parallel_size": 2}`, or options of the server that is
            started.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Precision of the weights: `"auto"` (the checkpoint's own), `"float32"`, `"bfloat16"` or `"float16"`.
        device (`str`, *optional*):
            Device of the transformers backend. Defaults to the accelerator of the machine if there is one, and to the
            CPU if not.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the checkpoint may bring code of its own.

        > Parameters that control latency and throughput

        concurrency (`list[int]`, *optional*):
            Numbers of requests under way at a time for which latency and throughput are measured. Not measured if not
            set.
        serving_requests (`int`, *optional*, defaults to `64`):
            Number of requests of each measurement: the first problems of the task, decoded in its first way.

        > Parameters that control the output

        output (`str`, *optional*):
            JSON file for the results. If not set they are only shown.
        save_completions (`bool`, *optional*, defaults to `True`):
            Whether to save every completion beside `output`, in a `.completions.jsonl` file of the same name.
        cache_dir (`str`, *optional*):
            Folder in which generations are kept, so that an interrupted run goes on. Defaults to `generations` beside
            `output`; without either nothing is kept.
        rescore (`bool`, *optional*, defaults to `False`):
            Whether to generate nothing: score what is in the cache, and stop if something is not. Of `backend:
            server` the server must be there, to say whose generations they are.
        stage (`str`, *optional*):
            Label of the checkpoint in the results, for instance `"rlvr"`.
        task (`str`, *optional*):
            Label of the data set in the results. Defaults to its name.
    """

    # Parameters that control what is measured
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint: a folder, an adapter's folder, or an id on the Hub."}
    )
    checkpoints: list[str] | None = field(
        default=None,
        metadata={"help": "Several in place of `model_name_or_path`, each PATH or STAGE=PATH."},
    )
    prompt_only: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to measure the first checkpoint once more, asked to be concise. By default, if there are "
            "several checkpoints."
        },
    )
    tasks: list[str] | None = field(
        default=None,
        metadata={"help": "Benchmarks by name, or other data sets; with [:N] at the end, N problems of it."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "One data set in place of `tasks`: a file, a folder, a named source or a Hub data set."},
    )
    dataset_split: str | None = field(
        default=None, metadata={"help": "Split of the data set. Defaults to the task's, or 'test'."}
    )
    max_samples: int | None = field(
        default=None,
        metadata={
            "help": "Number of problems, from the first on, and equally many from each part of a set that has several. "
            "All of them if not set."
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Verifiers by name. A completion is correct if it ended and each of them scores it at least 1.0. "
            "Problems that one of them cannot judge are not counted. Defaults to the task's, or ['math_reward']."
        },
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "Context to put each prompt in: 'solution', 'answer', 'concise', or a text with {prompt} and any "
            "of {solution}, {answer}; a literal brace is written twice."
        },
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message to begin every conversation with."}
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments for the chat template, as JSON on the command line."}
    )
    thinking_tags: list[str] | None = field(
        default=None,
        metadata={
            "help": "What opens and what closes the thinking block. Defaults to the pair in the chat template, or <think>."
        },
    )
    pass_at_k: list[int] | None = field(
        default=None,
        metadata={"help": "The k of pass@k, each at most `num_samples`. Defaults to powers of two."},
    )
    task_options: dict | str | None = field(
        default=None,
        metadata={
            "help": "Options for single ones of `tasks`, by name, which come before those for all; as JSON on the command "
            "line."
        },
    )

    # Parameters that control generation
    decoding: list[str] | None = field(
        default=None,
        metadata={
            "help": "Ways of decoding, each giving one row of results: 'greedy' and 'sampled'. Defaults to the task's, "
            "or ['greedy']."
        },
    )
    num_samples: int | None = field(
        default=None, metadata={"help": "Completions per problem of 'sampled'. Defaults to the task's, or 1."}
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Temperature of 'sampled'. Defaults to the task's, or 1.0."}
    )
    top_p: float | None = field(
        default=None,
        metadata={
            "help": "Share of the probability mass that 'sampled' draws from; 1.0 is all of it. Defaults to the task's, "
            "or 1.0."
        },
    )
    top_k: int | None = field(
        default=None,
        metadata={
            "help": "Number of tokens that 'sampled' draws from; 0 is the whole vocabulary. Defaults to the task's, or 0."
        },
    )
    min_p: float | None = field(
        default=None,
        metadata={
            "help": "Least probability that 'sampled' draws, as a share of the most probable token's. Defaults to the "
            "task's, or to no limit."
        },
    )
    stop: list[str] | None = field(
        default=None,
        metadata={"help": "Texts that end a completion, beside end tokens. Defaults to the task's, or none."},
    )
    max_completion_length: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens of a completion. One that has not ended by then is never correct. "
            "Defaults to the task's, or 1024."
        },
    )
    thinking_budget: int | None = field(
        default=None,
        metadata={"help": "Number of tokens after which a thinking block is closed by force, and the answer written."},
    )
    batch_size: int = field(default=64, metadata={"help": "Number of completions generated at a time."})
    seed: int = field(default=42, metadata={"help": "Seed of 'sampled'."})

    # Parameters that control the model
    backend: str = field(default="transformers", metadata={"help": "What generates.", "choices": list(_BACKENDS)})
    server_url: str | None = field(
        default=None, metadata={"help": "Address of the server: http://localhost:8000. If not set, vLLM's is started."}
    )
    server_api: str = field(
        default="tokens",
        metadata={
            "help": "How the server is asked: by token ids for token ids, or by messages for text.",
            "choices": list(_SERVER_APIS),
        },
    )
    server_model: str | None = field(
        default=None, metadata={"help": "Name of the model at the server. Defaults to the only one it has."}
    )
    vllm_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments for `vllm.LLM`, as JSON on the command line."}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "Precision of the weights; 'auto' is the checkpoint's own.", "choices": list(_DTYPES)},
    )
    device: str | None = field(
        default=None,
        metadata={
            "help": "Device of the transformers backend. Defaults to the accelerator if there is one, or the CPU."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether the checkpoint may bring code of its own."}
    )

    # Parameters that control latency and throughput
    concurrency: list[int] | None = field(
        default=None,
        metadata={"help": "Numbers of requests under way for which latency and throughput are measured."},
    )
    serving_requests: int = field(default=64, metadata={"help": "Number of requests of each such measurement."})

    # Parameters that control the output
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})
    save_completions: bool = field(
        default=True, metadata={"help": "Whether to save every completion beside `output`, as JSON Lines."}
    )
    cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which generations are kept. Defaults to `generations` beside `output`; without either "
            "nothing is kept."
        },
    )
    rescore: bool = field(
        default=False, metadata={"help": "Generate nothing: score what is in the cache, and stop if something is not."}
    )
    stage: str | None = field(default=None, metadata={"help": "Label of the checkpoint in the results."})
    task: str | None = field(
        default=None, metadata={"help": "Label of the data set in the results. Defaults to its name."}
    )

    def __post_init__(self):
        for name in ("chat_template_kwargs", "vllm_kwargs", "task_options"):
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    value = json.loads(value)
                except json.JSONDecodeError as error:
                    raise ValueError(f"`{name}` is not valid JSON: {error}.") from None
                setattr(self, name, value)
            if not isinstance(value, dict | None):
                raise ValueError(f"`{name}` must be a mapping, and is {value!r}.")
        lists = (
            "checkpoints",
            "tasks",
            "decoding",
            "reward_funcs",
            "concurrency",
            "thinking_tags",
            "pass_at_k",
            "stop",
        )
        for name in lists:
            value = getattr(self, name)
            if not isinstance(value, list | None):  # YAML makes a word a string, and a string is a list of letters
                raise ValueError(f"`{name}` must be a list, and is {value!r}: write `{name}: [{value}]`.")
            if value is not None and not value:
                raise ValueError(f"`{name}` is empty: name at least one, or leave it out.")
        if (self.dataset_name is None) == (self.tasks is None):
            raise ValueError(
                "`dataset_name` is missing: give a file, a folder, a named source or a Hub data set, or benchmarks as "
                "`tasks`."
                if self.tasks is None
                else "`dataset_name` and `tasks` exclude each other: put the data set into the list of `tasks`."
            )
        if self.checkpoints and (self.model_name_or_path or self.stage):
            raise ValueError(
                "`checkpoints` excludes `model_name_or_path` and `stage`: put all into the list, each as STAGE=PATH."
            )
        if self.tasks and self.task:
            raise ValueError("`task` is the label of one `dataset_name`, and `tasks` have their own: leave it out.")
        if self.prompt_only and self.prompt_template:
            raise ValueError("`prompt_only` adds a `prompt_template` of its own: leave one of them out.")
        if self.tasks is None:
            self.fill(OTHER)
        if self.decoding is not None and not set(self.decoding) <= {"greedy", "sampled"}:
            raise ValueError(f"`decoding` must list 'greedy', 'sampled' or both, and is {self.decoding}.")
        counts = ("max_samples", "max_completion_length", "batch_size", "num_samples", "serving_requests")
        for name in (*counts, "thinking_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, and is {value}.")
        for name in ("concurrency", "pass_at_k"):
            if getattr(self, name) and min(getattr(self, name)) < 1:
                raise ValueError(f"`{name}` must list numbers of at least 1, and is {getattr(self, name)}.")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"`temperature` must be above 0, and is {self.temperature}: for none, use 'greedy'.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1, and is {self.top_p}.")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"`top_k` must be at least 0, which is no limit, and is {self.top_k}.")
        if self.min_p is not None and not 0 <= self.min_p < 1:
            raise ValueError(f"`min_p` must be at least 0, which is no limit, and below 1, and is {self.min_p}.")
        if self.stop and not all(self.stop):
            raise ValueError("`stop` has an empty text, which ends every completion at once: remove it.")
        if self.thinking_tags is not None and (
            len(self.thinking_tags) != 2 or not all(self.thinking_tags) or len(set(self.thinking_tags)) < 2
        ):
            raise ValueError(f"`thinking_tags` are what opens and what closes thinking, and are {self.thinking_tags}.")
        if self.thinking_budget is not None:
            if self.concurrency:
                raise ValueError(
                    "`thinking_budget` and `concurrency` exclude each other: the latency of an answer that is interrupted "
                    "is not measured. Leave one of them out."
                )
            if self.tasks is None and self.thinking_budget >= self.max_completion_length:
                raise ValueError(
                    f"`thinking_budget` {self.thinking_budget} leaves nothing of `max_completion_length` "
                    f"{self.max_completion_length} for the answer: lower it."
                )
        # Of several `tasks`, each is looked at when it has its own values
        sampled = self.tasks is None and "sampled" in self.decoding
        if self.pass_at_k and sampled and max(self.pass_at_k) > self.num_samples:
            raise ValueError(
                f"`pass_at_k` {max(self.pass_at_k)} needs as many samples of a problem, and `num_samples` is "
                f"{self.num_samples}: raise it."
            )
        self._check_task_options()
        if self.dtype not in _DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(_DTYPES)}, and is {self.dtype!r}.")
        if self.backend not in _BACKENDS:
            raise ValueError(f"`backend` must be one of {', '.join(_BACKENDS)}, and is {self.backend!r}.")
        if self.server_api not in _SERVER_APIS:
            raise ValueError(f"`server_api` must be one of {', '.join(_SERVER_APIS)}, and is {self.server_api!r}.")
        if self.server_api == "chat" and self.thinking_budget is not None:
            raise ValueError(
                "`thinking_budget` goes on from what was written, which `server_api: chat` cannot: leave one out."
            )
        if self.backend != "server" and self.server_url is not None:
            raise ValueError("`server_url` is for `backend: server`: set it, or leave the address out.")
        if self.starts_server and (self.server_api == "chat" or self.server_model is not None):
            name = "server_model" if self.server_model is not None else "server_api: chat"
            raise ValueError(f"`{name}` is for a server that runs: give its `server_url`, or leave it out.")
        if self.backend == "server" and not self.starts_server and len(self.checkpoints or ()) > 1:
            raise ValueError("A server has the weights of one checkpoint: evaluate `checkpoints` one by one.")
        if self.device is not None:
            try:
                torch.empty(0, device=self.device)
            except (RuntimeError, AssertionError) as error:  # torch raises the latter where it is built without CUDA
                reason = str(error).splitlines()[0].rstrip(".")
                raise ValueError(f"`device`: this machine has no `{self.device}` ({reason}).") from None
        if self.output is not None and Path(self.output).is_dir():
            raise ValueError(f"`output` must be a JSON file, and `{self.output}` is a folder: add a file name.")
        if self.cache_dir is None and self.output is not None:
            self.cache_dir = str(Path(self.output).parent / "generations")
        if self.rescore and self.cache_dir is None:
            raise ValueError("`rescore` needs the generations of an earlier run: give its `output` or `cache_dir`.")
        self.context()

    def _check_task_options(self) -> None:
        if self.task_options is None:
            return
        if self.tasks is None:
            raise ValueError(
                "`task_options` are for single ones of `tasks`: give options of one `dataset_name` as such."
            )
        names = {task_name(task)[0] for task in self.tasks}
        for name, options in self.task_options.items():
            if name not in names:
                raise ValueError(f"`task_options` has `{name}`, and `tasks` are {', '.join(sorted(names))}.")
            if not isinstance(options, dict):
                raise ValueError(f"`task_options` of `{name}` must be a mapping, and is {options!r}.")
            for option in options:
                if option not in TASK_OPTIONS:
                    raise ValueError(
                        f"`task_options` of `{name}` has `{option}`, and can have {', '.join(TASK_OPTIONS)}."
                    )

    def fill(self, task: Task) -> None:
        """Takes the values of a task for options that are not set."""
        for name, value in dataclasses.asdict(task).items():
            if name != "version" and getattr(self, name) is None:
                setattr(self, name, list(value) if isinstance(value, tuple) else value)

    @property
    def starts_server(self) -> bool:
        """Whether vLLM's server is started on each checkpoint."""
        return self.backend == "server" and self.server_url is None

    @property
    def task_version(self) -> str:
        """Version of the task that the data set is."""
        return find_task(self.dataset_name)[1].version

    def context(self) -> TeacherContext | None:
        """Returns what puts a prompt into the context of `prompt_template`, or `None` for the plain prompt."""
        if self.prompt_template is None:
            return None
        try:
            return TeacherContext(TEACHER_PROMPT_TEMPLATES.get(self.prompt_template, self.prompt_template))
        except ValueError as error:
            raise ValueError(str(error).replace("teacher_prompt_template", "prompt_template")) from None
