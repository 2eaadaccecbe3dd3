"""What TRL's tests load from the hub, built here: tiny models with tokenizers and chat templates, and small data sets.

Sizes, dtypes, initialisation and token ids are those of TRL's own tiny models, as far as its tests depend on them: the
models are next to uniform over a vocabulary of full size, and a test that writes down token ids means the same text.
"""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset, Features, Image, Value
from datasets import List as ListFeature
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast


with contextlib.redirect_stdout(io.StringIO()) as printed:
    import this  # noqa: F401

ZEN = [line for line in printed.getvalue().splitlines()[2:] if line]  # 19 aphorisms


# Tokenizers

QWEN_SPECIAL = {
    name: 151643 + index
    for index, name in enumerate(
        "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
        "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>".split()
    )
}
QWEN_ADDED = {
    name: 151657 + index
    for index, name in enumerate(
        "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
        "<tool_response> </tool_response> <think> </think>".split()
    )
}
# Tokens of Qwen's vocabulary that TRL's tests write as ids, beside the single bytes, which are the first 256
QWEN_PINNED = {
    "Ġa": 264, "Ġb": 293, "Ġ{": 314, 'Ġ"': 330, "Ġtool": 5392, "Ġany": 894, "Ġknow": 1414, "'t": 944, "Ġdon": 1513,
    "Ġwon": 2765, "Ġincrement": 16252, 'Ġ{"': 5212, '":': 788, '",': 497, '{"': 4913, "name": 606, "multiply": 64648,
    "_tool": 22785, "arguments": 16370, "}}Ċ": 11248, "async": 7692, "_multiply": 93054, "increment": 35744,
    "step": 9520, "sh": 927, "out": 411, "text": 1318, "hi": 6023, '"}}Ċ': 95642, "de": 450, "crement": 13477,
    "Done": 17453, "tool": 14172, "call": 6659, ">Ċ": 397, "</": 522,
}  # fmt: skip


def filler(index: int) -> str:
    """A word of four capitals. No text of the tests has it, and decoded and encoded again words still end differently."""
    return "Ġ" + "".join(chr(ord("A") + index // 26**place % 26) for place in range(3, -1, -1))


def make_tokenizer(
    template: str | None,
    eos: str,
    pad: str | None,
    special: dict[str, int | None],
    added: dict[str, int] | None = None,
    pinned: dict[str, int] | None = None,
    size: int | None = None,
    bos: str | None = None,
    **named_tokens: str,
) -> PreTrainedTokenizerFast:
    """
    Byte-level BPE, trained on the Zen of Python.

    Args:
        template (`str`, *optional*):
            Name of one of the chat templates that TRL ships.
        eos, pad, bos (`str`):
            Special tokens with a role; without `pad` there is no padding token.
        special, added (`dict[str, int]`):
            Tokens that decoding can skip, and tokens that it can't, with their ids; `None` is the next free one.
        pinned (`dict[str, int]`, *optional*):
            Ordinary tokens that must have certain ids.
        size (`int`, *optional*):
            Number of ids. What is left over is filled with tokens that no text encodes to.
        named_tokens:
            Further roles, such as `image_token`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(ZEN, trainer)
    trained = json.loads(tokenizer.to_str())["model"]

    by_name = {**(pinned or {}), **special, **(added or {})}
    taken = {index for index in by_name.values() if index is not None}
    tokens = sorted(trained["vocab"], key=trained["vocab"].get)  # the 256 bytes come first
    wanted = [name for name in tokens if name not in by_name]
    wanted += [name for name, index in by_name.items() if index is None]
    free = (index for index in range(10**6) if index not in taken)
    vocab = {**{name: index for name, index in by_name.items() if index is not None}, **dict(zip(wanted, free))}  # noqa: B905
    used = set(vocab.values())
    vocab.update({filler(index): index for index in range(size or 0) if index not in used})

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge) for merge in trained["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for names, is_special in ((special, True), (added or {}, False)):
        ordered = sorted(names, key=vocab.get)
        tokenizer.add_tokens([AddedToken(name, normalized=False, special=is_special) for name in ordered])
    roles = {"eos_token": eos, "pad_token": pad, "bos_token": bos}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{role: token for role, token in roles.items() if token is not None},
        extra_special_tokens=named_tokens,
        model_max_length=32768,
    )
    if template is not None:
        fast.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    return fast


def qwen(template: str, size: int) -> Callable[[], PreTrainedTokenizerFast]:
    added = {name: index for name, index in QWEN_ADDED.items() if index < size}
    return lambda: make_tokenizer(
        template, "<|im_end|>", "<|endoftext|>", QWEN_SPECIAL, added=added, pinned=QWEN_PINNED, size=size
    )


def chat(template: str | None, eos: str, pad: str | None, *special: str, bos: str | None = None, **named_tokens):
    names = dict.fromkeys([name for name in (pad, bos, eos) if name is not None] + list(special))
    return lambda: make_tokenizer(template, eos, pad, names, bos=bos, **named_tokens)


def phi() -> PreTrainedTokenizerFast:
    names = (
        "<|endoftext|> <|assistant|> <|placeholder1|> <|placeholder2|> <|placeholder3|> <|placeholder4|> <|system|> "
    )
    names += "<|end|> <|placeholder5|> <|placeholder6|> <|user|>"
    special = {name: 32000 + index for index, name in enumerate(names.split())}
    return make_tokenizer("phi3_5", "<|endoftext|>", "<|endoftext|>", special, size=32011)


QWEN2_5, QWEN3 = qwen("qwen2_5", 151665), qwen("qwen3", 151669)
LLAMA = chat(
    "llama3_2", "<|eot_id|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>",
    bos="<|begin_of_text|>",
)  # fmt: skip
MISTRAL = chat(None, "</s>", None, bos="<s>")


# Models

TINY = dict(hidden_size=8, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=32)
SMALL = {**TINY, "hidden_size": 128}
REWARD = {**TINY, "hidden_size": 16, "num_labels": 1}


def initialise(model: nn.Module) -> None:
    """Xavier for linear layers and 0.02 for embeddings: at these widths the logits are next to uniform."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


def save(model, processor, folder: Path, eos: list[int] | None = None) -> None:
    tokenizer = processor if isinstance(processor, PreTrainedTokenizerFast) else processor.tokenizer
    eos = eos or [tokenizer.eos_token_id]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def text_model(architecture: str, make: Callable, is_uniform: bool = True, eos: list[int] | None = None, **config):
    """How to build a language model or a reward model (`config["num_labels"]`) of that name in transformers."""

    def build(folder: Path) -> None:
        tokenizer = make()
        model_class = getattr(transformers, architecture)
        settings = {
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **config,
        }
        model = model_class(model_class.config_class(**settings)).to(torch.bfloat16)
        if is_uniform:
            initialise(model)
        save(model, tokenizer, folder, eos)

    return build


def remote_model(folder: Path) -> None:
    """A Llama whose classes are Python files in its folder."""
    text_model("LlamaForCausalLM", LLAMA, **TINY)(folder)
    (folder / "remote.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class RemoteConfig(LlamaConfig):\n    model_type = 'remote'\n\n\n"
        "class RemoteForCausalLM(LlamaForCausalLM):\n    config_class = RemoteConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"}
    config.update(model_type="remote", architectures=["RemoteForCausalLM"], auto_map=auto_map)
    (folder / "config.json").write_text(json.dumps(config))


VISION = dict(hidden_size=16, num_attention_heads=4, num_hidden_layers=2, intermediate_size=32)
TEXT = {**TINY, "hidden_size": 16}


def gemma3(folder: Path) -> None:
    tokenizer = chat(
        "gemma3", "<end_of_turn>", "<pad>", "<start_of_turn>", "<start_of_image>", "<end_of_image>",
        "<image_soft_token>", bos="<bos>", image_token="<image_soft_token>", boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )()  # fmt: skip
    side, patch, image_tokens = 56, 14, 16
    images = transformers.Gemma3ImageProcessorPil(size={"height": side, "width": side})
    processor = transformers.Gemma3Processor(
        images, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=image_tokens
    )
    config = transformers.Gemma3Config(
        text_config={**TEXT, "vocab_size": len(tokenizer), "head_dim": 4, "sliding_window": 64},
        vision_config={**VISION, "image_size": side, "patch_size": patch},
        mm_tokens_per_image=image_tokens,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    save(transformers.Gemma3ForConditionalGeneration(config).to(torch.bfloat16), processor, folder)


def llava(model_name: str, image_processor: str, template: str | None, **config) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        tokenizer = chat(template, "</s>", "<pad>", "<image>", bos="<s>", image_token="<image>")()
        side, patch = 56, 14
        images = getattr(transformers, f"{image_processor}ImageProcessorPil")(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
        if "image_grid_pinpoints" in config:
            images.image_grid_pinpoints = config["image_grid_pinpoints"]
        processor = getattr(transformers, f"{model_name}Processor")(
            images,
            tokenizer,
            patch_size=patch,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=tokenizer.chat_template,
        )
        model_class = getattr(transformers, f"{model_name}ForConditionalGeneration")
        settings = model_class.config_class(
            text_config={**TEXT, "model_type": "mistral", "vocab_size": len(tokenizer)},
            vision_config={**VISION, "model_type": "clip_vision_model", "image_size": side, "patch_size": patch},
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **config,
        )
        save(model_class(settings).to(torch.bfloat16), processor, folder)

    return build


MOE = dict(num_experts_per_tok=2, moe_intermediate_size=32)
GRID = [[56, 112], [112, 56], [112, 112]]

# Data sets


def save_splits(folder: Path, configs: dict[str, Dataset]) -> None:
    """A data set repository: two parquet files for each configuration, and the README that names them."""
    lines = ["---", "configs:"]
    for name, rows in configs.items():
        (folder / name).mkdir(parents=True)
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, part in rows.train_test_split(test_size=0.1, shuffle=False).items():
            part.to_parquet(folder / name / f"{split}.parquet")
            lines += [f"  - split: {split}", f"    path: {name}/{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def beginnings() -> list[str]:
    """The first words of each aphorism: one to seven of them, so that prompts differ in length."""
    return [" ".join(line.split()[: 1 + index * 5 % 7]) for index, line in enumerate(ZEN)]


def zen(folder: Path) -> None:
    chats = [[{"role": "user", "content": f"How does this go on: {text}"}] for text in beginnings()]
    save_splits(
        folder,
        {
            "standard_prompt_only": Dataset.from_dict({"prompt": beginnings()}),
            "conversational_prompt_only": Dataset.from_dict({"prompt": chats}),
        },
    )


def zen_image(folder: Path, column: str = "image", num_images: int = 1) -> None:
    generator = np.random.default_rng(0)
    sizes = generator.integers(32, 64, size=(len(ZEN), num_images, 2))
    images = [[generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in row] for row in sizes]
    images = [[{"bytes": _png(pixels), "path": None} for pixels in row] for row in images]
    chats = [[{"role": "user", "content": f"How does this go on: {text}"}] for text in beginnings()]
    message = ListFeature({"role": Value("string"), "content": Value("string")})
    is_one = column == "image"
    features = Features({"prompt": message, column: Image() if is_one else ListFeature(Image())})
    values = [row[0] for row in images] if is_one else images
    rows = Dataset.from_dict({"prompt": chats, column: values}, features=features)
    save_splits(folder, {"conversational_prompt_only": rows})


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image as PILImage

    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


BUILDERS: dict[str, Callable[[Path], None]] = {
    "zen": zen,
    "zen-image": zen_image,
    "zen-multi-image": lambda folder: zen_image(folder, "images", 2),
    "tiny-Cohere2ForCausalLM": text_model(
        "Cohere2ForCausalLM", chat("cohere2", "<|END_OF_TURN_TOKEN|>", "<PAD>", bos="<BOS_TOKEN>"), logit_scale=1.0, **TINY
    ),
    "tiny-Gemma2ForCausalLM": text_model(
        "Gemma2ForCausalLM", chat("gemma", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>", bos="<bos>"), **TINY
    ),
    "tiny-Glm4MoeForCausalLM": text_model(
        "Glm4MoeForCausalLM", chat("glm4moe", "<|endoftext|>", "<|endoftext|>", "<|user|>", "<|observation|>"),
        head_dim=2, n_routed_experts=4, attention_bias=True, use_qk_norm=True, **MOE, **TINY,
    ),
    "tiny-GptOssForCausalLM": text_model(
        "GptOssForCausalLM", chat("gptoss", "<|return|>", "<|endoftext|>", "<|start|>", "<|message|>", "<|end|>"),
        num_local_experts=4, num_experts_per_tok=2, **TINY,
    ),
    "tiny-LlamaForCausalLM-3.2": text_model("LlamaForCausalLM", LLAMA, **TINY),
    "tiny-LlamaForSequenceClassification-3.2": text_model("LlamaForSequenceClassification", LLAMA, **REWARD),
    "tiny-MistralForCausalLM-0.2": text_model("MistralForCausalLM", MISTRAL, **TINY),
    "tiny-NemotronHForCausalLM-nano": text_model(
        "NemotronHForCausalLM", chat("nemotron_3_nano", "<|im_end|>", "<|endoftext|>", "<|im_start|>", bos="<s>"),
        layers_block_type=["mamba", "attention", "moe"], mamba_num_heads=8, mamba_head_dim=4, mamba_n_groups=1,
        ssm_state_size=16, mamba_d_conv=4, mamba_expand=2, n_routed_experts=4, use_mamba_kernels=False,
        moe_shared_expert_intermediate_size=32, **MOE,
        **{name: value for name, value in TEXT.items() if name != "num_hidden_layers"},
    ),
    "tiny-Phi3ForCausalLM-3.5": text_model("Phi3ForCausalLM", phi, eos=[32007, 32001, 32000], **TINY),
    "tiny-Qwen2ForCausalLM-2.5": text_model("Qwen2ForCausalLM", QWEN2_5, **TINY),
    "tiny-Qwen2ForSequenceClassification-2.5": text_model("Qwen2ForSequenceClassification", QWEN2_5, **REWARD),
    "tiny-Qwen3ForCausalLM": text_model("Qwen3ForCausalLM", QWEN3, **TINY),
    "small-Qwen3ForCausalLM": text_model("Qwen3ForCausalLM", QWEN3, is_uniform=False, **SMALL),
    "tiny-Qwen3ForSequenceClassification": text_model("Qwen3ForSequenceClassification", QWEN3, **REWARD),
    "tiny-Qwen3MoeForCausalLM": text_model(
        "Qwen3MoeForCausalLM", QWEN3, **{**TINY, "vocab_size": 151936}, num_experts=4, num_experts_per_tok=2, head_dim=128
    ),
    "tiny-RemoteForCausalLM": remote_model,
    "tiny-Gemma3ForConditionalGeneration": gemma3,
    "tiny-LlavaForConditionalGeneration": llava("Llava", "CLIP", "llava_next"),
    "tiny-LlavaNextForConditionalGeneration": llava("LlavaNext", "LlavaNext", "llava_next", image_grid_pinpoints=GRID),
}  # fmt: skip

# Models that are not built, and why
NOT_BUILT = dict.fromkeys(
    [
        "tiny-Gemma4ForConditionalGeneration",
        "tiny-InternVLForConditionalGeneration",
        "tiny-Qwen2VLForConditionalGeneration",
        "tiny-Qwen2_5_VLForConditionalGeneration",
        "tiny-Qwen3_5ForConditionalGeneration-NoThink",
        "tiny-Qwen3_5MoeForConditionalGeneration-3.6",
        "tiny-SmolVLMForConditionalGeneration",
    ],
    "its processor has a part for videos, which needs torchvision",
)


def build(names: set[str], folder: Path) -> None:
    """
    Builds repositories under `<folder>/trl-internal-testing`.

    Args:
        names (`set[str]`):
            Keys of [`BUILDERS`].
        folder (`Path`):
            Where to. As the working directory it makes `from_pretrained` and `load_dataset` find them offline.
    """
    for name in sorted(names):
        target = folder / "trl-internal-testing" / name
        target.mkdir(parents=True)
        torch.manual_seed(0)
        BUILDERS[name](target)
