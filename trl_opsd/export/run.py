"""Run of the export: what its command line does once it is parsed."""

import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..cli import UserError, user_errors
from ..evaluate.card import write_card
from ..evaluate.compare import Answer as Verdict
from ..evaluate.config import EvaluateConfig
from ..evaluate.plan import Job, plan
from ..evaluate.results_file import load_results
from ..hub import push
from ..results import write_results
from ..rlvr.bank import prompt_id, read_rollouts
from ..rlvr.identity import Writer, hash_vocabulary, hash_weights, read_writer
from .check import PROBES, Reference
from .config import ExportConfig
from .environments import make_environment
from .formats import ARTEFACTS, FAMILIES, Artefact
from .judge import CHECKPOINT, Judge, folder_suffix
from .origin import (
    check_checkpoint_ends,
    hash_of,
    plain_checkpoint,
    provenance,
    read_provenance,
    save_as,
    size_of,
    travel,
    write_provenance,
)
from .tensorrt_llm import write_commands
from .tool import Engine, Tool, ToolError, Transformers, render


# What an artefact takes beside its weights, and what converters take meanwhile, as a share
_SLACK = 0.15
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What is quantised takes less of the float32 form than this, whatever lies beside the weights
_SMALLER = 0.9
# Columns that a K-quant of GGUF takes together
_K_BLOCK = 256

logger = logging.getLogger("trl_opsd")


def run(export: ExportConfig, evaluate: EvaluateConfig) -> int:
    """
    Makes, checks and judges what the configuration asks for.

    Args:
        export ([`ExportConfig`]):
            What to make, and how.
        evaluate ([`~trl_opsd.evaluate.EvaluateConfig`]):
            Of what, and on what it is judged.

    Returns:
        `int`: Exit status: 0 if all of it is there, 1 if something failed, 3 if something is undecided.
    """
    with user_errors():
        exporter = Exporter(export, evaluate)
    try:
        rows = exporter.run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in _FULL:
            raise
        print(f"error: the disk of `{export.output_dir}` is full, and nothing half-made is left.", file=sys.stderr)
        raise SystemExit(2) from None
    for row in rows:
        print(line(row))
    if export.push_to_hub:
        with user_errors():
            for row in rows:
                if row["answer"] in ("identical", Verdict.AS_GOOD.text):
                    name = f"{export.hub_model_id}-{row['artefact']}"
                    print(push(Path(export.output_dir) / row["artefact"], name, export.hub_private_repo))
    answers = {row["answer"] for row in rows}
    return 1 if answers & {"failed", Verdict.WORSE.text} else 3 if Verdict.UNDECIDED.text in answers else 0


def line(row: dict[str, Any]) -> str:
    """What came out, in a line."""
    if row["answer"] == "failed":
        return f"✗ {row['artefact']}: {row['why']}."
    size = f"{row['bytes'] / 1e6:,.1f} MB, {row['tokens_per_s']:,.0f} tokens/s"
    same = f"{row['prefix']:.0%} of a greedy answer as in float32 up to where they part"
    return f"{row['verdict'] or '✓ ' + row['artefact'] + ': identical.'} {size}, {same}."


class Exporter:
    """
    The artefacts of one checkpoint.

    Args:
        export ([`ExportConfig`]):
            What to make, and how.
        evaluate ([`~trl_opsd.evaluate.EvaluateConfig`]):
            Of what, and on what it is judged.

    Raises:
        UserError: If something is missing or does not fit, before a model is loaded.
    """

    def __init__(self, export: ExportConfig, evaluate: EvaluateConfig):
        self.export, self.folder = export, Path(export.output_dir)
        self.logs = self.folder / "logs"
        self.jobs = plan(_judged(evaluate, self.folder))
        job = self.jobs[0]
        self.checkpoint, self.tokenizer = job.checkpoint, job.tokenizer
        config = AutoConfig.from_pretrained((self.checkpoint.base or self.checkpoint).path)
        if "quantization_config" in config.to_dict():
            raise UserError(
                f"`{self.checkpoint.path}` is quantised already: export the checkpoint that it was made from."
            )
        if self.checkpoint.base is not None and not Path(self.checkpoint.path).is_dir():
            raise UserError(
                f"`{self.checkpoint.path}` is an adapter on the Hub: fetch it (`hf download {self.checkpoint.path} --local-dir "
                "FOLDER`), and give the folder."
            )
        # What an adapter is merged into holds numbers of float32, whatever its base has
        is_merged = self.checkpoint.base is not None
        self.dtype = None if is_merged or config.dtype is None else str(config.dtype).removeprefix("torch.")
        self.model_type = config.model_type
        check_checkpoint_ends(self.checkpoint, self.tokenizer)
        self.judged_on = _judged_on(self.jobs, export.margins)
        self.done, self.missing = {}, []
        for artefact in ARTEFACTS:
            is_asked = artefact in export.artefacts
            if is_asked and not (self.folder / artefact.name).exists():
                self.missing.append(artefact)
            # What was worse before stays in the record until it has been made again
            for verdict in (Verdict.AS_GOOD, Verdict.WORSE, Verdict.UNDECIDED):
                folder = self.folder / _folder_name(artefact, verdict)
                if folder.exists():
                    found = self._found(folder)
                    if found["check"]["answer"] == "identical" or found.get("judged_on") == self.judged_on:
                        self.done[artefact.name] = found["check"]
                        break
                    judged = f"`{folder}` was judged on other problems, or by another margin, than those asked for"
                    if not is_asked:
                        logger.warning(f"{judged}: it is not in what this command writes to export.json.")
                    elif verdict is Verdict.AS_GOOD:
                        raise UserError(f"{judged}: move it away, or give another `output_dir`.")
        text = config.get_text_config()
        odd = sorted({size for size in (text.hidden_size, text.intermediate_size) if size % _K_BLOCK})
        if odd and any(artefact.precision == "q4_k_m" for artefact in self.missing):
            logger.warning(
                f"`gguf:q4_k_m`: {odd} are no multiples of {_K_BLOCK}, so llama.cpp stores weights of so many columns in more "
                f"than four bits. `python -m trl_opsd.prune --size_multiple {_K_BLOCK}` makes sizes that it takes."
            )
        self.rollouts = self._rollouts()
        self._check_room()
        self.judge = Judge(job.config, self.jobs, self.folder / "results", export.margins)

    def _found(self, folder: Path) -> dict[str, Any]:
        """What an artefact that is there says of itself, which has to be of this checkpoint."""
        found = read_provenance(folder)
        if found["checkpoint_hash"] != self.checkpoint.hash:
            raise UserError(
                f"`{folder}` was made of another checkpoint (`{found['checkpoint']}`): move it away, or give another "
                "`output_dir`."
            )
        return found

    def run(self) -> list[dict[str, Any]]:
        """
        Makes what is not there yet.

        Returns:
            `list[dict]`: What came out, for each artefact.
        """
        rows = dict(self.done)
        with self._workplace():
            self._make_all(rows)
        self._record(rows)
        return [rows[artefact.name] for artefact in self.export.artefacts]

    @contextmanager
    def _workplace(self) -> Iterator[None]:
        """What is under way lies in one folder, of which nothing is left, and which no other export clears meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.folder / ".lock"
        with lock.open("w") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"`output_dir`: another export is writing into `{self.folder}`: wait for it, or give another folder."
                ) from None
            shutil.rmtree(self.folder / ".making", ignore_errors=True)
            try:
                yield
            finally:
                shutil.rmtree(self.folder / ".making", ignore_errors=True)
                lock.unlink(missing_ok=True)

    def _make_all(self, rows: dict[str, dict[str, Any]]) -> None:
        if self.missing:
            self.plain = plain_checkpoint(
                self.checkpoint, self.tokenizer, self.dtype, self.folder / ".making" / "float32"
            )
            self.reference = self._reference()
            self.judge.measure()
            for family, artefacts in itertools.groupby(self.missing, key=lambda artefact: artefact.family):
                for row in self._family(family, list(artefacts)):
                    rows[row["artefact"]] = row
                    self._record(rows)

    def engine(self, family: str, artefact: Artefact | None = None) -> Engine:
        """What an artefact of a family, or its conversion, is checked in."""
        name = FAMILIES[family].engine
        return Transformers(artefact.precision if artefact else "float32") if name is None else self.tool(name)

    def tool(self, name: str) -> Tool:
        """A program in its environment, which is made if it is not there."""
        return Tool(name, make_environment(name, self.export.folders, self.logs / f"{name}-pip.log", _say), self.logs)

    def _record(self, rows: dict[str, dict[str, Any]]) -> None:
        write_results(
            self.folder / "export.json",
            [*self._own_row(), *(rows[artefact.name] for artefact in ARTEFACTS if artefact.name in rows)],
            {**_plain(self.export), "evaluate": _plain(self.judge.config)},
        )

    def _own_row(self) -> list[dict[str, Any]]:
        """What the checkpoint itself came to, in float32, if it was measured."""
        file = self.judge.file(CHECKPOINT)
        measured = [item.row for item in load_results(file)] if file.is_file() else []
        accuracy = {row.task: [row.accuracy, row.accuracy_low, row.accuracy_high] for row in measured}
        row = {"artefact": CHECKPOINT, "engine": "transformers", "answer": "measured", "accuracy": accuracy}
        own = {"bytes": self.checkpoint.weights_bytes, "parameters": self.checkpoint.parameters}
        return [{**row, **own}] if measured else []

    def _family(self, name: str, artefacts: list[Artefact]) -> Iterator[dict[str, Any]]:
        """Makes the artefacts of a family, and yields what came out."""
        family = FAMILIES[name]
        unquantised = None
        try:
            if family.unquantised is not None:
                unquantised = self._staging(f"{name}-{family.unquantised}")
                self._convert(family.converter, unquantised, family.unquantised)
                self._check_conversion(name, unquantised)
            elif family.engine is not None:
                self._check_conversion(name, self.plain)
        except (UserError, OSError) as error:
            if unquantised is not None:
                shutil.rmtree(unquantised, ignore_errors=True)
            yield from (_failed(artefact, error) for artefact in artefacts)
            return
        # The one that others are made of is moved to where it belongs at last
        artefacts = sorted(artefacts, key=lambda artefact: artefact.precision == family.unquantised)
        for artefact in artefacts:
            is_there = unquantised is not None and artefact.precision == family.unquantised
            staging = unquantised if is_there else self._staging(artefact.name)
            try:
                if not is_there:
                    self._make(artefact, staging, unquantised)
                yield self._publish(artefact, staging, self._float32_bytes(staging, unquantised))
            except (UserError, OSError) as error:
                yield _failed(artefact, error)
            finally:
                if not is_there:
                    shutil.rmtree(staging, ignore_errors=True)
        if unquantised is not None:
            shutil.rmtree(unquantised, ignore_errors=True)

    def _float32_bytes(self, staging: Path, unquantised: Path | None) -> int:
        """Size of the float32 form of an artefact, with what lies beside the weights."""
        if unquantised is not None:
            return size_of(unquantised)
        weights = sum(file.stat().st_size for file in staging.rglob("*.safetensors"))
        return 4 * self.checkpoint.parameters + size_of(staging) - weights

    def _staging(self, name: str) -> Path:
        staging = self.folder / ".making" / name  # which has its name already, for what is written into it
        shutil.rmtree(staging, ignore_errors=True)
        return staging

    def _make(self, artefact: Artefact, staging: Path, unquantised: Path | None) -> None:
        _say(f"{artefact.name}: making it")
        converter = FAMILIES[artefact.family].converter
        if converter is None:
            save_as(str(self.plain), self.tokenizer, artefact.precision, staging)
            if artefact.family == "tensorrt-llm":
                write_commands(staging, self.model_type)
            travel(self.checkpoint, self.plain, staging)
        else:
            options = {"rollouts": self.rollouts} if artefact.is_calibrated else {}
            self._convert(converter, staging, artefact.precision, unquantised, **options)

    def _convert(
        self, converter: str, staging: Path, precision: str, unquantised: Path | None = None, **options: Any
    ) -> None:
        staging.mkdir(parents=True)
        self.tool(converter).convert(self.plain, staging, precision, unquantised, **options)
        travel(self.checkpoint, self.plain, staging)

    def _check_conversion(self, family: str, folder: Path) -> None:
        _say(f"{family}: checking the conversion on {len(self.reference.prompts)} prompts")
        answer = self.engine(family).generate(folder, self.reference, self.reference.prompts, is_exact=True)
        self._compare(answer, is_quantised=False)

    def _compare(self, answer, is_quantised: bool) -> None:
        differences = self.reference.differences(answer, is_quantised)
        if differences:
            raise ToolError(f"it is not the model that it was made of: {'; '.join(differences)}")

    def _publish(self, artefact: Artefact, staging: Path, unquantised: int) -> dict[str, Any]:
        """
        Checks an artefact, and moves it to where it belongs, if it is as good, or else beside it. `unquantised` is the size of
        what it was quantised from.
        """
        is_exact = artefact.is_exact or (artefact.precision == self.dtype and FAMILIES[artefact.family].engine is None)
        prompts = self.reference.prompts if is_exact else [*self.reference.prompts, *self.judge.prompts]
        _say(f"{artefact.name}: checking it on {len(prompts)} prompts")
        # What holds all that the checkpoint holds writes the same; a smaller one is asked as it is served
        answer = self.engine(artefact.family, artefact).generate(staging, self.reference, prompts, is_exact)
        self._compare(answer, not is_exact)
        size, digest = size_of(staging), hash_of(staging)
        if not is_exact and size > _SMALLER * unquantised:
            raise ToolError(f"it takes {size:,} bytes, and {unquantised:,} in float32, so it was not quantised")
        tokens = sum(map(len, answer.completions))
        row = {
            "artefact": artefact.name,
            "engine": FAMILIES[artefact.family].backend,
            "answer": "identical",
            "verdict": None,
            "bytes": size,
            "hash": digest,
            "prompts": len(self.reference.prompts),
            "prefix": self.reference.prefix(answer),
            "tokens": tokens,
            "seconds": answer.seconds,
            "tokens_per_s": tokens / answer.seconds,
            "accuracy": None,
        }
        verdict = Verdict.AS_GOOD
        if not is_exact:
            written = answer.completions[len(self.reference.prompts) :]
            conclusion = self.judge.judge(artefact.name, row["engine"], written, answer.seconds, size, digest)
            verdict = conclusion.answer
            row["answer"], row["verdict"] = verdict.text, " ".join(conclusion.sentences())
            row["accuracy"] = {
                single.after.row.task: [
                    single.after.row.accuracy,
                    single.after.row.accuracy_low,
                    single.after.row.accuracy_high,
                ]
                for single in conclusion.singles
            }
        made = provenance(artefact, self.checkpoint, self.export.licence, row, self.export.folders)
        write_provenance(staging, {**made, "judged_on": self.judged_on})
        self._write_card(staging, None if is_exact else artefact.name, digest)
        for old in (Verdict.WORSE, Verdict.UNDECIDED):
            shutil.rmtree(self.folder / _folder_name(artefact, old), ignore_errors=True)
        staging.rename(self.folder / _folder_name(artefact, verdict))
        return row

    def _write_card(self, folder: Path, name: str | None, digest: str) -> None:
        files = [self.judge.file(CHECKPOINT), *([] if name is None else [self.judge.file(name)])]
        # One that holds all that the checkpoint holds has its numbers
        weights = digest if name is not None else self.checkpoint.hash
        write_card(files, folder, margins=self.export.margins, licence=self.export.licence, weights=weights)

    def _reference(self) -> Reference:
        """What transformers reads and writes in float32."""
        number, tokenizer = self.export.conversion_prompts, self.tokenizer
        found = [
            (prompt, ids, min(limit, self.export.conversion_tokens))
            for job in self.jobs
            for prompt, ids, limit in zip(job.prompts, job.prompt_ids, job.limits, strict=True)
        ][:number]
        prompts = [(ids, limit) for _, ids, limit in found]
        engine = Transformers("float32")
        conversations = [prompt for prompt, _, _ in found if not isinstance(prompt, str)]
        rendered = render(tokenizer, conversations) if tokenizer.chat_template else []
        texts = [tokenizer.decode(ids) for ids, _ in prompts] + [*rendered, *known_texts(PROBES, tokenizer)]
        reference = Reference(
            texts=texts,
            tokens=[tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
            eos_ids=self.jobs[0].eos_ids,
            special_ids=special_ids(tokenizer),
            chat_template=tokenizer.chat_template,
            conversations=conversations,
            rendered=rendered,
            prompts=prompts,
            completions=[],
        )
        answer = engine.generate(self.plain, reference, prompts, is_exact=True)
        reference.completions = answer.completions
        answers = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answer.completions]
        reference.texts = [*texts, *answers]
        reference.tokens += [tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers]
        return reference

    def _rollouts(self) -> list[list[int]]:
        """Token ids of the rollouts to calibrate on, prompts with completions."""
        if not any(artefact.is_calibrated for artefact in self.missing):
            return []
        found = read_writer(self.export.bank)
        path = self.checkpoint.path
        own = Writer(path, hash_weights(path), hash_vocabulary(self.tokenizer))
        if found is not None and not found.is_same(own):
            raise UserError(
                f"`bank`: the rollouts at `{self.export.bank}` are of {found}, and a quantiser is calibrated on what {own} "
                "writes itself: fill a bank with `python -m trl_opsd.compress.bank`."
            )
        rollouts = read_rollouts(self.export.bank).shuffle(seed=self.judge_seed)
        judged = {prompt_id(prompt) for job in self.jobs for prompt in job.prompts}
        if shared := len(judged & set(rollouts["prompt_id"])):
            logger.warning(
                f"`bank`: {shared} of the {len(judged)} problems that artefacts are judged on are in `{self.export.bank}`, on which "
                "they are calibrated: fill it from another split."
            )
        rollouts = rollouts.select(range(min(len(rollouts), self.export.calibration_samples)))
        prompts = [
            self.tokenizer(prompt)["input_ids"]
            if isinstance(prompt, str)
            else self.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
            for prompt in rollouts["prompt"]
        ]
        return [[*ids, *written] for ids, written in zip(prompts, rollouts["completion_ids"], strict=True)]

    @property
    def judge_seed(self) -> int:
        """Seed of the choice of rollouts."""
        return self.jobs[0].config.seed

    def _check_room(self) -> None:
        """Checks that the disk has room for what is to be made, and what is there meanwhile."""
        if not self.missing:
            return
        kept = sum(artefact.bits for artefact in self.missing)
        needed = self.checkpoint.parameters * (kept + 2 * 32) / 8 * (1 + _SLACK)  # a copy in float32, and a conversion
        there = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free
        if needed > free:
            raise UserError(
                f"`output_dir`: the artefacts need about {needed / 1e9:.1f} GB, and `{there}` has {free / 1e9:.1f} GB left: free "
                "some, or ask for fewer `formats`."
            )


def _judged_on(jobs: Iterable[Job], margins: Mapping[str | None, float]) -> dict[str, dict[str, Any]]:
    """What a verdict depends on beside the checkpoint, by task."""
    return {
        job.config.task: {
            "margin": margins.get(job.config.task, margins[None]),
            "verifiers": job.config.reward_funcs,
            "problems": hashlib.sha256(json.dumps([job.names, job.prompt_ids, job.limits]).encode()).hexdigest(),
        }
        for job in jobs
    }


def _folder_name(artefact: Artefact, verdict: Verdict) -> str:
    """What the folder of an artefact is called, by what came out of its check."""
    return f"{artefact.name}{folder_suffix(verdict).replace(' ', '-')}"


def known_texts(texts: Iterable[str], tokenizer) -> list[str]:
    """Returns the texts that a tokenizer can read: one of few words, with none for unknown ones, cannot read all."""
    known = []
    for text in texts:
        try:
            tokenizer(text, add_special_tokens=False)
        except Exception:  # of which tokenizers raise nothing more special
            continue
        known.append(text)
    return known


def special_ids(tokenizer) -> set[int]:
    """Returns the tokens of a tokenizer that are no text."""
    added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _judged(config: EvaluateConfig, folder: Path) -> EvaluateConfig:
    """The configuration that the checkpoint is evaluated with."""
    for name in ("checkpoints", "concurrency", "server_url", "output", "thinking_budget", "stop"):
        if getattr(config, name) is not None:
            raise UserError(
                f"`{name}` has no place in an export, which judges one checkpoint's artefacts: leave it out."
            )
    if config.backend != "transformers":
        raise UserError("`backend`: artefacts are compared with what transformers writes: leave it out.")
    if config.trust_remote_code:
        raise UserError("`trust_remote_code`: converters and engines run no code of a checkpoint: leave it out.")
    # The default of one data set is greedy too
    if config.decoding not in (None, ["greedy"]):
        raise UserError("`decoding`: artefacts are judged greedily, which all engines do alike: set it to `greedy`.")
    changes = {"decoding": ["greedy"], "dtype": "float32", "device": "cpu", "prompt_only": False, "stage": CHECKPOINT}
    output = folder / "results" / f"{CHECKPOINT}.json"
    return dataclasses.replace(
        config, **changes, output=str(output), cache_dir=str(folder / "results" / "generations")
    )


def _say(text: str) -> None:
    print(text, flush=True)


def _plain(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _failed(artefact: Artefact, error: Exception) -> dict[str, Any]:
    if isinstance(error, OSError):
        full = error.errno in _FULL
        error = "the disk is full, and nothing of it is left" if full else f"it could not be written ({error})"
    return {"artefact": artefact.name, "answer": "failed", "why": str(error).rstrip(".")}
