"""What is known before anything is loaded: what will be done, why, and what it takes."""

from dataclasses import replace
from itertools import product
from pathlib import Path

from datasets import Dataset

from ...cli import UserError, check_checkpoint
from ...data import check_fit, load_tokenizer
from ...evaluate.checkpoint import open_checkpoint
from ...export.formats import parse_formats
from ...export.origin import check_checkpoint_ends
from ...opsd.context import TEACHER_PROMPT_TEMPLATES, TeacherContext
from ...plan.run import GIB, read_config
from ...positions import positions_of
from ..auto_config import AUTO, AutoConfig
from ..config import CompressConfig
from .division import divide, load
from .fit import LORA, USED, Fit, Launch


# A round that saves less than this share of the tokens of the one before is the last
LEAST_GAIN = 0.03
# Longest reply where none is given, and the model has the positions
_MAX_COMPLETION_LENGTH = 2048
# Shares of the parameters that `ratio: auto` removes, one after the other until a student is no longer as good
RATIOS = (0.25, 0.5, 0.75, 0.9)


def learning_rate(parameters: int, has_adapter: bool) -> float:
    """
    The rate where none is given: 1e-6 for 1.7B parameters (https://huggingface.co/papers/2603.05433) and 3e-4 for the tiny
    reasoner's 166 thousand, on a line between the two in logarithms, which is all that is known; 1e-4 for an adapter.
    """
    return 1e-4 if has_adapter else float(f"{1e-6 * (1.7e9 / parameters) ** 0.62:.1e}")


def recovery_rates(parameters: int) -> tuple[float, float]:
    """
    The rates of what was pruned: to learn to answer again from its teacher's logits, and then on its own rollouts. On lines
    in logarithms between what is known of 1.7B parameters (1e-4 and 1e-5, recipes/recover.yaml and recipes/opsd_pruned.yaml)
    and of the tiny reasoner (3e-3 at 83 thousand, 1e-3 at 260 thousand).
    """
    return tuple(
        float(f"{large * (1.7e9 / parameters) ** power:.1e}") for large, power in ((1e-4, 0.34), (1e-5, 0.52))
    )


class Plan:
    """
    What a run will do: its data, its recipe, the sizes to try and what is made of the result.

    Args:
        config ([`~trl_opsd.compress.config.CompressConfig`]):
            Checkpoint, prompts, folder, launcher and seed.
        arguments ([`~trl_opsd.compress.auto_config.AutoConfig`]):
            The rest.

    Raises:
        UserError: If something cannot be done with what is given.
    """

    def __init__(self, config: CompressConfig, arguments: AutoConfig):
        self.root = Path(config.output_dir)
        check_checkpoint(config.model_name_or_path, "model_name_or_path")
        self.launch = Launch.of(config.launcher)
        tokenizer = load_tokenizer(config.model_name_or_path)
        positions = positions_of(read_config(config.model_name_or_path, None, False))
        if arguments.max_completion_length is None:
            limit = _MAX_COMPLETION_LENGTH if positions is None else min(_MAX_COMPLETION_LENGTH, 3 * positions // 4)
            arguments = replace(arguments, max_completion_length=limit)
        self.config, self.arguments = config, arguments
        name, limit = config.dataset_name, arguments.max_completion_length
        splits, self.reward_funcs = load(name, arguments)
        for rows in splits:
            check_fit(rows, name, tokenizer, positions, limit)
        self.data = divide(name, splits, arguments)
        self.contexts = self._contexts(splits)
        for context, rows in product(self.contexts, splits):
            template = TeacherContext(TEACHER_PROMPT_TEMPLATES.get(context, context))
            columns = {"prompt", "privileged_context", *template.fields} & set(rows.column_names)
            asked = [template.prompt(row) for row in rows.select_columns(sorted(columns))]
            check_fit(Dataset.from_dict({"prompt": asked}), name, tokenizer, None, limit, context=context)
        self.sizes = {name: len(rows) for name, rows in self.data.items()}
        self.fit = Fit.of(config.model_name_or_path, self.launch, arguments)
        self.ratios = self._ratios()
        self.artefacts = parse_formats(arguments.export_formats) if arguments.export_formats else []
        if self.artefacts:
            check_checkpoint_ends(open_checkpoint(config.model_name_or_path), tokenizer)

    def part(self, name: str) -> str:
        """File of a part of the data: `train`, `guard` or `final`."""
        return str(self.root / "data" / f"{name}.parquet")

    @property
    def recipe(self) -> dict:
        """The recipe of training, but for the context."""
        arguments, fit = self.arguments, self.fit
        rate = arguments.learning_rate
        if rate is None:
            rate = learning_rate(fit.parameters, fit.has_adapter)
        return {
            "model_name_or_path": self.config.model_name_or_path,
            "dataset_name": self.part("train"),
            "reward_funcs": self.reward_funcs,
            "teacher_weights": "initial",
            "gate": "correct",
            "beta": 1.0,
            "temperature": 1.0,
            "max_completion_length": arguments.max_completion_length,
            "per_device_train_batch_size": fit.rollouts,
            "gradient_accumulation_steps": 1,
            "max_tokens_per_microbatch": fit.max_tokens,
            "learning_rate": rate,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "save_strategy": "steps",
            "save_steps": arguments.round_steps,
            "logging_steps": 1,
            "probe_prompts": 0,  # measured beforehand, on the guard's problems
            "report_to": "none",
            "dtype": "bfloat16" if fit.has_adapter and fit.has_gpu else "float32",
            "bf16": fit.has_gpu,
            "use_cpu": not fit.has_gpu,
            "gradient_checkpointing": fit.has_gpu,
            **(LORA if fit.has_adapter else {}),
        }

    def _ratios(self) -> tuple[float, ...]:
        """Shares of the parameters to try to remove."""
        ratio, fit = self.arguments.ratio, self.fit
        if ratio is None:
            return ()
        if fit.has_adapter:
            raise UserError(
                f"`ratio`: what was pruned is trained with all weights, which beside its teacher takes up to "
                f"{sum(fit.full.values()):.3g} GiB, and of a device {USED * fit.capacity:.3g} are used: shard it over several "
                "with `launcher`, or leave `ratio` out."
            )
        return RATIOS if ratio == AUTO else (float(ratio),)

    def _contexts(self, splits: list[Dataset]) -> list[str]:
        """Names or templates of the contexts to measure."""
        given = self.arguments.contexts
        if given is not None:
            for context in given:
                try:
                    template = TeacherContext(TEACHER_PROMPT_TEMPLATES.get(context, context))
                except ValueError as error:
                    raise UserError(
                        str(error).replace("`teacher_prompt_template`", f"The context {context!r}")
                    ) from None
                if "sibling" in template.fields:
                    raise UserError(
                        f"The context {context!r} is known only when the rollouts are written, and contexts are measured "
                        "before: train from it with a recipe of `opsd`."
                    )
                for rows in splits:
                    template.check_columns(rows.column_names)
            return list(dict.fromkeys(given))
        names = ["concise", "concise_by_difficulty"]
        every = all("solution" in rows.column_names and None not in rows["solution"] for rows in splits)
        return names + (["solution"] if every else [])

    @property
    def recovery_updates(self) -> int:
        """Updates of each of the two ways in which a pruned model is trained: as many as length gets."""
        return self.arguments.max_rounds * self.arguments.round_steps

    @property
    def banked(self) -> int:
        """Problems that the bank is asked: as many as recovery sees rollouts, if there are so many."""
        return min(self.sizes["train"], self.recovery_updates * self.arguments.rollouts)

    @property
    def candidates(self) -> int:
        """Models that the verdict is given on at most: the students, and what length has left."""
        return 1 + len(self.ratios)

    @property
    def measured(self) -> int:
        """
        Completions that are measured at most: of the verdict's problems those of the start and of each candidate, and of
        both again and more while it is undecided. An export writes each of them once.
        """
        sizes = self.sizes
        looks = (1 + len(self.contexts) + self.arguments.max_rounds + len(self.ratios)) * sizes["guard"]
        looks += (1 + self.candidates * (1 + 2 * self.arguments.decide)) * sizes["final"]
        return looks * self.arguments.samples + len(self.artefacts) * sizes["final"]

    @property
    def stages(self) -> int:
        """Stages that follow the first measurement at most. Each is a process that starts anew."""
        count = len(self.contexts) + 2 * self.arguments.max_rounds  # a round is trained, and looked at
        if self.ratios:
            count += 1 + 4 * len(self.ratios)  # the bank; pruned, recovered twice and looked at
        count += 1 + self.candidates  # the start, on the verdict's problems, and each candidate
        if self.artefacts:
            count += 1 + any(artefact.is_calibrated for artefact in self.artefacts)
        return count

    def describe(self, start: float) -> str:
        """
        The plan in words, and what it takes, from the sizes alone.

        Args:
            start (`float`):
                Seconds that a stage takes to start: those that this process took to come here, which imports what they do.
        """
        arguments, fit, sizes, processes = self.arguments, self.fit, self.sizes, self.launch.processes
        devices = ("GPU" if processes == 1 else "GPUs") if fit.has_gpu else "CPU process" + "es" * (processes > 1)
        how = "all weights"
        if fit.has_adapter:
            how = f"an adapter, because full training takes {sum(fit.full.values()):.1f} GiB"
        steps = [
            f"measure it on {sizes['guard']} problems kept out of training, in replies of at most "
            f"{arguments.max_completion_length:,} tokens, plain and in each of {len(self.contexts)} contexts "
            f"({', '.join(map(repr, self.contexts))}), and take the one that promises most; below "
            f"{arguments.min_saving:.0%} of the tokens: {'leave the length' if self.ratios else 'end, with nothing lost'}",
            f"train {how}, on {sizes['train']:,} problems, up to {arguments.max_rounds} rounds of {arguments.round_steps} "
            f"updates × {arguments.rollouts} rollouts at a rate of {self.recipe['learning_rate']:.1e}; after each look at the "
            f"{sizes['guard']} problems; stop when a round saves less than {LEAST_GAIN:.0%}, or something is lost",
        ]
        if self.ratios:
            steps.append(self._describe_size())
        tries = "" if not self.ratios else ", the smallest first, until one is as good"
        steps.append(
            f"the verdict, on {sizes['final']} problems that nothing has seen{tries}: at most "
            f"{100 * arguments.max_accuracy_drop:g} points lost"
        )
        if self.artefacts:
            names = ", ".join(artefact.name for artefact in self.artefacts)
            steps.append(
                f"export it as {names}, each checked in its engine, and judged on the same {sizes['final']} problems, greedily; "
                "engines that are not there are installed"
            )
        lines = [
            f"{self.config.model_name_or_path}: {fit.parameters / 1e6:,.1f}M parameters, on "
            f"{processes} {devices} of {fit.capacity:.0f} GiB",
            *(f"{number}. {step}" for number, step in enumerate(steps, start=1)),
            *self._describe_cost(start),
        ]
        return "\n".join(lines)

    def _describe_size(self) -> str:
        removed = ", ".join(f"{ratio:.0%}" for ratio in self.ratios)
        rates = [
            recovery_rates(round((1 - ratio) * self.fit.parameters)) for ratio in (self.ratios[0], self.ratios[-1])
        ]
        recover, own = ("–".join(dict.fromkeys(f"{rate:.1e}" for rate in side)) for side in zip(*rates, strict=True))
        return (
            f"make it smaller: remove {removed} of the parameters, each of them from what 2 has left, by what matters on its "
            f"verified rollouts to {self.banked:,} problems; recover by its logits on those ({self.recovery_updates} updates "
            f"at {recover}), then on the student's own rollouts (as many at {own}); look at the {self.sizes['guard']} problems, "
            "and stop at the first that is no longer as good"
        )

    def _describe_cost(self, start: float) -> list[str]:
        """Memory, disk, time and rollouts."""
        arguments, fit = self.arguments, self.fit
        memory = ", ".join(f"{name} {value:.2f}" for name, value in fit.memory.items() if value > 0.005)
        # Of a round the model, and a checkpoint with the moments; at the end the model again
        trained = fit.parameters
        if fit.has_adapter:
            trained = fit.memory["moments"] * GIB / 8
            trained *= 1 if self.launch.sharding == "ddp" else self.launch.processes
        disk = arguments.max_rounds * 16 * trained + 4 * fit.parameters
        # Of a ratio the model thrice, and of two trainings the last two checkpoints; of artefacts what they were made of too
        disk += sum((1 - ratio) * fit.parameters * (3 * 4 + 4 * 16) for ratio in self.ratios)
        disk += fit.parameters * (sum(artefact.bits for artefact in self.artefacts) + 64 * bool(self.artefacts)) / 8
        rollouts = self.recovery_updates * arguments.rollouts
        written = rollouts + (self.banked + len(self.ratios) * rollouts) * bool(self.ratios)
        return [
            f"memory of training: {sum(fit.memory.values()):.2f} GiB ({memory})",
            f"disk: about {disk / GIB:.2g} GiB at most",
            f"rollouts: at most {written:,} to train on and {self.measured:,} to measure",
            f"time: at most {1 + self.stages} stages, each of them a process that starts anew, at {start:.0f} s, which this "
            f"one took: {(1 + self.stages) * start / 60:.0f} minutes; how long the rollouts take is said when the first are "
            "written",
        ]

    def seconds_left(self, speed: float, length: float, start: float) -> float:
        """
        How long the run takes at most from when the base is measured.

        Args:
            speed (`float`):
                Tokens that are written in a second.
            length (`float`):
                Tokens of a reply.
            start (`float`):
                Seconds that a stage takes beside what it writes: its imports, its model, its verdicts.
        """
        # Training an update takes about as long as writing its rollouts
        rollouts = self.recovery_updates * self.arguments.rollouts
        trained = 2 * rollouts + (self.banked + 3 * len(self.ratios) * rollouts) * bool(self.ratios)
        measured = self.measured - self.sizes["guard"] * self.arguments.samples
        return (measured + trained) * length / speed + self.stages * start
