"""Generation without finished rows: the tokens of `generate`, fewer rows computed, and plain `generate` where that can't be."""

import inspect
from unittest import mock

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import (
    DynamicCache,
    GenerationMixin,
    Lfm2Config,
    Lfm2ForCausalLM,
    LogitsProcessor,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer

from trl_opsd import OPSDConfig, OPSDTrainer, RLVRConfig, RLVRTrainer, decoding
from trl_opsd.decoding import finished_rows_dropped, generate
from trl_opsd.evaluate.backends import Request, Sampling
from trl_opsd.evaluate.backends.transformers import TransformersEngine
from trl_opsd.rewards import math_reward
from trl_opsd.tiny.sft import measure
from trl_opsd.tiny.task import CONCISE_TEMPLATE, TinyConfig, problems


PAD, ENDS = 0, [3, 7]


def prompts(number: int = 24, width: int = 9, vocab: int = 30, padded: bool = True) -> dict[str, torch.Tensor]:
    ids = torch.randint(10, vocab, (number, width), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        for row in range(number):
            mask[row, : row % (width - 1)] = 0
    return {"input_ids": ids.where(mask == 1, PAD), "attention_mask": mask}


@pytest.fixture
def model(small_model):
    """One whose rows end at very different times, some of them never."""
    model = small_model(2).eval()
    model.generation_config.update(eos_token_id=ENDS, pad_token_id=PAD)
    return model


class Rows:
    """Counts the rows of every forward pass of a model that generates."""

    def __init__(self, model):
        self.sizes = []
        self.handle = model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        if "use_cache" in kwargs:  # a pass that trains it has other arguments
            self.sizes.append(len(kwargs["input_ids"]))

    @property
    def dropped(self) -> bool:
        return self.sizes[-1] < self.sizes[0]


DRAWN = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
DECODINGS = {
    "greedy": {"do_sample": False},
    "sampled": DRAWN,
    "top p, top k": {**DRAWN, "temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.001},
    "processors": {"do_sample": False, "min_new_tokens": 6, "no_repeat_ngram_size": 4, "suppress_tokens": [11, 12]},
    "min length": {"do_sample": False, "min_length": 14},
    "one end": {**DRAWN, "eos_token_id": 3},
}


@pytest.mark.parametrize(
    "name, attention, padded",
    [*((name, "sdpa", True) for name in DECODINGS), ("greedy", "eager", True), ("sampled", "sdpa", False)],
)
def test_the_tokens_are_those_of_generate(model, name, attention, padded):
    model.set_attn_implementation(attention)
    options = {**prompts(padded=padded), "max_new_tokens": 50, **DECODINGS[name]}
    torch.manual_seed(1)
    theirs, drawn = model.generate(**options), torch.rand(3)
    counted = Rows(model)
    torch.manual_seed(1)
    ours = generate(model, **options)
    assert torch.equal(ours, theirs)
    assert torch.equal(torch.rand(3), drawn)  # whoever draws next draws the same, too
    lengths = (ours[:, 9:] != PAD).sum(dim=1)
    assert counted.dropped and lengths.min() < 20 and lengths.max() > 40
    # A row is paid for until it ends, and at most until a quarter of those with it have
    assert sum(counted.sizes) < 0.85 * len(lengths) * lengths.max()
    for before, after in zip(counted.sizes, counted.sizes[1:], strict=False):
        assert after == before or after <= 0.75 * before


def test_a_batch_whose_rows_have_all_ended_ends(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
    options = {**prompts(), "max_new_tokens": 400, **DRAWN}
    torch.manual_seed(0)
    theirs = model.generate(**options)
    counted = Rows(model)
    torch.manual_seed(0)
    assert torch.equal(generate(model, **options), theirs)
    assert counted.sizes[-1] == 1 and theirs.size(1) < 409 and len(counted.sizes) == theirs.size(1) - 9


def test_log_probabilities_are_those_of_a_full_forward(model):
    """Of every token that was sampled, as the loop had them, against one pass over the unpadded sequence."""
    model.double()
    seen = {}

    class Recorder(LogitsProcessor):
        def __call__(self, input_ids, scores):
            for ids, row in zip(input_ids.tolist(), scores.log_softmax(dim=-1), strict=True):
                seen[tuple(ids)] = row
            return scores

    with mock.patch.object(decoding, "BY_ROW", (*decoding.BY_ROW, Recorder)):
        batch = prompts()
        counted = Rows(model)
        torch.manual_seed(0)
        found = generate(model, **batch, max_new_tokens=60, logits_processor=[Recorder()], **DRAWN)
    assert counted.dropped
    counted.handle.remove()
    checked = 0
    for mask, ids in zip(batch["attention_mask"], found.tolist(), strict=True):
        start, end = int((mask == 0).sum()), next((i for i in range(9, len(ids)) if ids[i] in ENDS), len(ids) - 1)
        expected = model(torch.tensor([ids[start : end + 1]])).logits[0].float().log_softmax(dim=-1)
        for position in range(9, end + 1):
            torch.testing.assert_close(seen[tuple(ids[:position])], expected[position - start - 1], atol=1e-6, rtol=0)
            checked += 1
    assert checked > 300


def test_sampled_tokens_have_the_probabilities_of_the_model(small_model):
    """Chi-square over all replies of up to three tokens to one prompt, most rows of which have been dropped by the third."""
    model = small_model(0).eval()
    allowed = [3, 9, 10]
    number = 6000
    ids = torch.tensor([[10, 12, 15]])

    def following(tokens):
        logits = model(torch.cat([ids, torch.tensor([tokens], dtype=torch.long)], dim=1)).logits[0, -1]
        return (logits[allowed] / 3).softmax(dim=-1).tolist()

    expected = {}

    def walk(tokens, probability):
        if len(tokens) == 3 or tokens[-1:] == [3]:
            expected[tuple(tokens)] = probability
            return
        for token, share in zip(allowed, following(tokens), strict=True):
            walk([*tokens, token], probability * share)

    with torch.no_grad():
        walk([], 1.0)
    suppressed = [token for token in range(model.config.vocab_size) if token not in allowed]
    options = {**DRAWN, "max_new_tokens": 3, "eos_token_id": 3, "pad_token_id": PAD, "suppress_tokens": suppressed}
    options["temperature"] = 3.0
    torch.manual_seed(0)
    counted = Rows(model)
    found = generate(model, input_ids=ids.expand(number, -1), attention_mask=torch.ones(number, 3), **options)
    assert counted.dropped
    counts = dict.fromkeys(expected, 0)
    for reply in found[:, 3:].tolist():
        counts[tuple(reply[: reply.index(3) + 1] if 3 in reply else reply)] += 1
    statistic = sum((counts[key] - number * p) ** 2 / (number * p) for key, p in expected.items())
    assert min(expected.values()) * number > 5
    assert statistic < 36  # 14 degrees of freedom: above it once in a thousand


# Where it can't be


class Streamer(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens.append(value)

    def end(self):
        pass


class Shift(LogitsProcessor):
    """One that nobody knows, and that does count on the rows staying in place."""

    def __call__(self, input_ids, scores):
        scores[:, 10] += torch.arange(24.0)
        return scores


TINY = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
REFUSED = {
    "beam search": {"num_beams": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "all there is": {"return_dict_in_generate": True, "output_scores": True},
    "unknown processor": {"logits_processor": [Shift()]},
    "repetition penalty": {"repetition_penalty": 1.2},
    "no end": {"eos_token_id": None},
    "streamer": {"streamer": "one"},
    "token types": {"position_ids": "given"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_calls_that_need_the_rows_in_place_are_plain(model, name):
    options = {**prompts(), "max_new_tokens": 20, "do_sample": False, **REFUSED[name]}
    if name == "no end":
        model.generation_config.eos_token_id = None
    if name == "token types":
        options["position_ids"] = (options["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    if name == "streamer":
        options["streamer"] = Streamer()
        batch = {key: value[:1] for key, value in prompts().items()}
        options |= batch
    theirs = model.generate(**options)
    told = len(options["streamer"].tokens) if name == "streamer" else None
    counted = Rows(model)
    ours = generate(model, **options)
    if name == "all there is":
        ours, theirs = ours.sequences, theirs.sequences
    if name == "streamer":
        assert len(options["streamer"].tokens) == 2 * told > 2
    assert torch.equal(ours, theirs)
    assert set(counted.sizes) == {counted.sizes[0]}


OTHERS = {
    "sliding window": lambda: MistralForCausalLM(
        MistralConfig(**TINY, num_key_value_heads=1, sliding_window=6, max_position_embeddings=128)
    ),
    "recurrent layers": lambda: Lfm2ForCausalLM(
        Lfm2Config(**TINY, num_key_value_heads=1, layer_types=["conv", "full_attention"], max_position_embeddings=128)
    ),
    "encoder and decoder": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=PAD)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_whose_cache_is_another_are_plain(name):
    torch.manual_seed(0)
    model = OTHERS[name]().eval()
    options = {**prompts(), "max_new_tokens": 20, "eos_token_id": [5, 6, 7], "pad_token_id": PAD, **DRAWN}
    torch.manual_seed(1)
    theirs = model.generate(**options)
    with mock.patch.object(GenerationMixin, "_sample", autospec=True, side_effect=GenerationMixin._sample) as plain:
        torch.manual_seed(1)
        assert torch.equal(generate(model, **options), theirs)
    assert plain.call_count == 1
    assert ((theirs != PAD).sum(dim=1) < theirs.size(1) - 10).any()  # some end early: dropping them was to be had


@pytest.mark.parametrize("sharded", ["is_deepspeed_zero3_enabled", "is_fsdp_managed_module"])
def test_processes_that_keep_step_are_plain(model, sharded):
    options = {**prompts(), "max_new_tokens": 20, "do_sample": False}
    with (
        mock.patch.object(decoding, sharded, lambda *args: True),
        mock.patch("torch.distributed.is_initialized", lambda: True),
        mock.patch("torch.distributed.get_world_size", lambda: 2),
    ):
        assert not decoding.can_call(model, **options)
    assert decoding.can_call(model, **options)


@pytest.mark.parametrize(
    "name, parameters",
    [
        (
            "_sample",
            "self input_ids logits_processor stopping_criteria generation_config synced_gpus streamer model_kwargs",
        ),
        ("_prefill", "self input_ids generation_config model_kwargs is_first_iteration"),
        ("_update_model_kwargs_for_generation", "self outputs model_kwargs is_encoder_decoder num_new_tokens"),
        ("_prepare_generation_config", "self generation_config kwargs"),
        ("_optimize_model_for_decode", "self"),
    ],
)
def test_private_methods_of_transformers_have_the_parameters_we_know(name, parameters):
    method = inspect.unwrap(getattr(GenerationMixin, name))
    assert " ".join(inspect.signature(method).parameters) == parameters


def test_learned_prompts_are_plain(model):
    adapted = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    options = {**prompts(), "max_new_tokens": 30, **DRAWN, "temperature": 3.0}
    torch.manual_seed(0)
    theirs = adapted.generate(**options)
    counted = Rows(model)
    torch.manual_seed(0)
    assert torch.equal(generate(adapted, **options), theirs)
    assert set(counted.sizes) == {24}


# Who uses it


def test_an_adapter_is_no_obstacle(model):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.eval()
    options = {**prompts(), "max_new_tokens": 40, **DRAWN, "temperature": 3.0}
    torch.manual_seed(0)
    theirs = adapted.generate(**options)
    counted = Rows(model)
    torch.manual_seed(0)
    assert torch.equal(generate(adapted, **options), theirs)
    assert counted.dropped


def test_the_model_is_as_it_was_afterwards(model):
    assert "generate" not in vars(model)
    with pytest.raises(ZeroDivisionError), finished_rows_dropped(model):
        assert "generate" in vars(model)
        raise ZeroDivisionError
    assert "generate" not in vars(model)
    own = model.generate = lambda **kwargs: 1  # somebody else's
    with finished_rows_dropped(model):
        assert model.generate is own and generate(model) == 1
    assert model.generate is own


SETTINGS = {
    "per_device_train_batch_size": 16,
    "max_completion_length": 40,
    "max_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def by_opsd(model, tokenizer, rows, folder):
    args = OPSDConfig(str(folder), teacher_prompt_template=CONCISE_TEMPLATE, gate="all", **SETTINGS)
    OPSDTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer).train()


def by_rlvr(model, tokenizer, rows, folder):
    args = RLVRConfig(str(folder), num_generations=4, **SETTINGS)
    RLVRTrainer(model, math_reward, args=args, train_dataset=rows, processing_class=tokenizer).train()


def by_evaluation(model, tokenizer, rows, folder):
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False) for prompt in rows["prompt"][:16]]
    requests = [Request(ids, seed) for seed, ids in enumerate(tokenizer(texts)["input_ids"])]
    sampling = Sampling(max_tokens=40, eos_ids=(tokenizer.eos_token_id,), temperature=1.0, top_p=1.0, top_k=0)
    list(TransformersEngine(model, tokenizer.pad_token_id, 16).generate(requests, sampling))


@pytest.mark.parametrize("limits", [{}, {"top_p": 0.9, "top_k": 20, "min_p": 0.01}])
def test_completions_of_an_evaluation_do_not_depend_on_the_rows_that_are_left(model, limits, monkeypatch):
    """A row keeps its own random numbers when others are taken out: as without taking any, and as alone."""
    batch = prompts()
    requests = [
        Request(ids[mask == 1].tolist(), 100 + seed)
        for seed, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True))
    ]
    values = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | limits
    sampling = Sampling(max_tokens=50, eos_ids=tuple(ENDS), **values)

    def completions(batch_size):
        return dict(TransformersEngine(model, PAD, batch_size).generate(requests, sampling))

    counted = Rows(model)
    found = completions(24)
    assert counted.dropped and len(set(map(len, found.values()))) > 5
    assert completions(1) == found
    monkeypatch.setattr(decoding, "DROPPED_SHARE", 2.0)  # never
    counted.sizes.clear()
    assert completions(24) == found
    assert not counted.dropped


def by_tiny(model, tokenizer, rows, folder):
    measure(model, tokenizer, problems(TinyConfig(), "test", 16, 0), "plain", 40, sample=True)


@pytest.mark.parametrize("use", [by_opsd, by_rlvr, by_evaluation, by_tiny])
def test_training_and_evaluation_use_it(small_model, tokenizer, rows, tmp_path, use):
    model = small_model(1)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # any token is as likely as any other, the end among them
    counted = Rows(model)
    with mock.patch.object(decoding, "decode", wraps=decoding.decode) as loop:
        loop.__signature__ = inspect.signature(decoding.decode)
        torch.manual_seed(0)
        use(model, tokenizer, rows, tmp_path)
    assert loop.called
    first = counted.sizes[
        : next((i for i, size in enumerate(counted.sizes) if i and size > counted.sizes[i - 1]), None)
    ]
    assert first[-1] < first[0]


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_is_found_by_either_name(name):
    """Without it every batch is computed to its longest row, and nothing says so."""
    cache = DynamicCache()
    assert decoding._cache_of({"attention_mask": torch.ones(1, 1), name: cache}) is cache
    assert decoding._cache_of({"attention_mask": torch.ones(1, 1)}) is None
