"""The table and the page of rollouts: every number beside the right rollout, and no rollout that can act on the reader."""

import re
import sys
import types
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch
from test_chat_templates import byte_tokenizer
from test_opsd_trainer import reference_loss, same_rollouts, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.opsd import RolloutPages
from trl_opsd.opsd.completions import Rollout, visible
from trl_opsd.opsd.probe import probe
from trl_opsd.opsd.view import EDGES, render, token_texts
from trl_opsd.tiny.task import SOLUTION_TEMPLATE


KEPT = [True, False, True, True, False, False, True, True]


def verifier(completions, log_extra, log_metric, **kwargs):
    log_extra("row", list(range(len(completions))))
    return [None if i == 5 else float(KEPT[i % 8]) for i in range(len(completions))]


@pytest.fixture
def completions(tokenizer):
    texts = ["6 a:-3=3", "5", "1 a:+2=3 b:*4=5", "2 a:+3=5", "0", "3 a:*1=3", "4 b:-2=2", "1 a:+2=3"]
    return [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]


class Page(HTMLParser):
    """Reads a page: its tags with their attributes, the titles of the tokens, and the text of each rollout."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.titles, self.texts, self.path = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.path.append((tag, dict(attrs)))
        if tag == "article":
            self.titles.append([])
            self.texts.append("")
        if "title" in dict(attrs):
            self.titles[-1].append(dict(attrs)["title"])

    def handle_endtag(self, tag):
        assert self.path.pop()[0] == tag

    def handle_data(self, data):
        tags = [tag for tag, _ in self.path]
        if "span" in tags and "pre" in tags and "i" not in tags:
            self.texts[-1] += data


def trainer_of(tmp_path, small_model, tokenizer, rows, **changes):
    config = OPSDConfig(
        **settings(tmp_path, **{"log_completions": True, "num_completions_to_print": 3, "max_steps": 1, **changes}),
        teacher_prompt_template=SOLUTION_TEMPLATE,
        shuffle_dataset=False,
        beta=0.0,
    )
    trainer = OPSDTrainer(
        model=small_model(0),
        args=config,
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        processing_class=tokenizer,
        reward_funcs=verifier,
    )
    if config.log_completions:
        trainer.add_callback(RolloutPages(trainer))
    return trainer


@pytest.mark.parametrize("batch", [(8, 1), (2, 4)])
def test_every_number_is_beside_its_rollout(tmp_path, small_model, tokenizer, rows, completions, batch):
    """With rows gated out, shuffled and cut into micro-batches; the divergence from its formula, row by row."""
    size = {"per_device_train_batch_size": batch[0], "gradient_accumulation_steps": batch[1]}
    with same_rollouts(completions):
        trainer = trainer_of(tmp_path, small_model, tokenizer, rows, kl_clip=1e-3, **size)
        trainer.train()
    table = pd.read_parquet(tmp_path / "out" / "completions" / "completions_00001.parquet")
    kept = [keep and i != 5 for i, keep in enumerate(KEPT)]
    assert table["kept"].tolist() == kept and table["row"].tolist() == list(range(8))
    assert table["tokens"].tolist() == [len(ids) for ids in completions]
    assert table["completion"].tolist() == tokenizer.batch_decode(completions, skip_special_tokens=True)
    for name in ("rewards/verifier", "reward"):
        rewards = table[name].tolist()
        assert rewards[:5] + rewards[6:] == [float(keep) for keep in KEPT[:5] + KEPT[6:]]
        assert rewards[5] != rewards[5]  # no verdict is not a reward of zero
    model = small_model(0)
    batch_rows = list(rows)[:8]
    for i, (example, ids) in enumerate(zip(batch_rows, completions, strict=True)):
        assert example["prompt"][0]["content"] in table["prompt"][i]
        expected = reference_loss(model, model, tokenizer, [example], [ids], [True], SOLUTION_TEMPLATE, beta=0.0)
        assert (table["kl"][i] == pytest.approx(expected, rel=1e-4)) == kept[i]
        assert pd.isna(table["kl"][i]) != kept[i]
    page = Page((tmp_path / "out" / "rollouts" / "step-1.html").read_text())
    # Three rollouts as asked for, those that are trained on first; their tokens add up to what the table says
    assert len(page.titles) == 3
    for titles, text, i in zip(page.titles, page.texts, [0, 2, 3], strict=True):
        assert text == tokenizer.decode(completions[i])
        values = [float(re.search(r", (\S+) nats, position \d+$", title).group(1)) for title in titles]
        assert len(values) == len(completions[i])
        assert sum(values) / len(values) == pytest.approx(table["kl"][i], rel=5e-3)
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_the_last_step_before_the_log_is_shown_once(tmp_path, small_model, tokenizer, rows, completions, capsys):
    changes = {"max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
    with same_rollouts(completions):
        trainer = trainer_of(tmp_path, small_model, tokenizer, rows, per_device_eval_batch_size=4, **changes)
        trainer.train()
    names = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    assert names == [
        "completions/completions_00002.parquet",
        "completions/completions_00004.parquet",
        "completions/eval_completions_00004.parquet",
        "rollouts/eval-step-4.html",
        "rollouts/step-2.html",
        "rollouts/step-4.html",
    ]
    assert len(pd.read_parquet(tmp_path / "out" / names[1])) == 8
    evaluated = pd.read_parquet(tmp_path / "out" / names[2])
    # The rewards start again with each evaluation batch of four
    assert evaluated["kept"].tolist() == [True, False, True, True] * 2
    assert evaluated["kl"].notna().tolist() == evaluated["kept"].tolist()
    assert capsys.readouterr().out.count("Step 4") == 2
    assert trainer.rollout_log.rollouts == {"train": {}, "eval": {}}


def test_nothing_is_kept_unless_asked_for(tmp_path, small_model, tokenizer, rows, completions):
    with same_rollouts(completions):
        trainer = trainer_of(tmp_path, small_model, tokenizer, rows, log_completions=False)
        trainer.train()
    assert trainer.rollout_log is None and "rollout" not in trainer._buffered_inputs[0]
    assert not trainer.rollouts.verifiers.columns and not list((tmp_path / "out").rglob("*.*"))


def test_tokens_of_few_rollouts_are_held(tmp_path, small_model, tokenizer, rows, completions):
    with same_rollouts(completions):
        trainer = trainer_of(tmp_path, small_model, tokenizer, rows, max_steps=3, logging_steps=5)
        trainer.model.train()
        for start in (0, 8, 16):
            trainer._generate_and_score_completions(list(rows)[start : start + 8])
    held = trainer.rollout_log.rollouts["train"]
    assert len(held) == 8 and [rollout.token_ids is not None for rollout in held.values()].count(True) == 3


def test_a_column_that_does_not_fit_is_named(tmp_path, small_model, tokenizer, rows, completions):
    def short(completions, log_extra, **kwargs):
        log_extra("note", ["one"])
        return [1.0] * len(completions)

    trainer = trainer_of(tmp_path, small_model, tokenizer, rows)
    trainer.rollouts.verifiers.functions = [short]
    with same_rollouts(completions), pytest.raises(ValueError, match="logged 1 values of `note`"):
        trainer.train()


def test_the_table_goes_where_the_metrics_go(tmp_path, small_model, tokenizer, rows, completions, monkeypatch):
    sent = []
    fake = types.SimpleNamespace(__name__="trackio", Table=lambda dataframe: dataframe, log=sent.append)
    with same_rollouts(completions):
        trainer = trainer_of(tmp_path, small_model, tokenizer, rows, log_unique_prompts=True)
        trainer.model.train()
        trainer._generate_and_score_completions([rows[i // 4] for i in range(8)])
    trainer.args.report_to = ["trackio"]
    monkeypatch.setitem(sys.modules, "trackio", fake)
    trainer.rollout_log.write_table("train", 0)
    assert [list(table["kept"]) for table in (entry["completions"] for entry in sent)] == [[True, False]]


def test_liger_measures_no_single_token(tmp_path, small_model, tokenizer, rows, completions):
    # Its loss runs anywhere, the layers that it also swaps need Triton
    layers = dict.fromkeys(("rope", "rms_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy"), False)
    liger = {"use_liger_kernel": True, "liger_kernel_config": layers}
    with same_rollouts(completions):
        trainer = trainer_of(tmp_path, small_model, tokenizer, rows, **liger)
        trainer.train()
    table = pd.read_parquet(tmp_path / "out" / "completions" / "completions_00001.parquet")
    assert table["kl"].isna().all() and table["kept"].sum() == 5


def test_the_probe_leaves_a_page(tmp_path, small_model, tokenizer, rows, completions):
    with same_rollouts(completions):
        trainer = trainer_of(tmp_path, small_model, tokenizer, rows, per_device_eval_batch_size=8)
        found = probe(trainer, 8, str(tmp_path / "probe" / "probe.html"))
        page = Page((tmp_path / "probe" / "probe.html").read_text())
        trainer.train()  # whose own table the probe must not get into
    values = [float(re.search(r", (\S+) nats", title).group(1)) for titles in page.titles for title in titles]
    # Three rollouts of eight: those that are correct first, all of them measured
    assert len(values) == sum(len(completions[i]) for i in (0, 2, 3)) and found["teacher"]["kl"] > 0
    assert len(pd.read_parquet(tmp_path / "out" / "completions" / "completions_00001.parquet")) == 8


HOSTILE = [
    "<script>document.title='run'</script>",
    "\"' onmouseover=alert(1) x='",
    "</pre></span></article><img src=x onerror=alert(1)>",
    "&lt;b&gt; &amp; ]]> <!-- -->",
    "\x1b[31m red \x00 \x07 \x08\x9b2J",
    "\u202egnp.exe\u2066 \u200b\u2028",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_model_wrote_is_shown_and_not_run(text):
    tokenizer = byte_tokenizer("qwen3")
    ids = tokenizer(text)["input_ids"]
    rollout = Rollout(
        text,
        text,
        len(ids),
        True,
        {"rewards/<b>": 1.0},
        kl=0.1,
        token_ids=ids,
        prompt_ids=ids,
        teacher_prompt_ids=ids,
        token_kl=[0.001 * i for i in range(len(ids))],
    )
    html = render([rollout], tokenizer, text)
    page = Page(html)
    assert page.path == []
    assert {tag for tag, _ in page.tags} <= set(
        "html head meta title style body h1 p div article h2 h3 pre span i".split()
    )
    names = {name for tag, attrs in page.tags if tag != "meta" for name in attrs}
    assert names <= {"lang", "class", "title"}
    assert page.texts == [visible(text)]
    assert not any(char in html for char in "\x00\x07\x08\x1b\x9b\u202e\u2066\u2028\u200b")
    assert "default-src 'none'" in html and not re.search(r"src=[^x]|href|url\(|@import|//", html)


def test_a_lone_surrogate_can_be_written():
    assert visible("a\ud800b\r\n\t") == "a\\ud800b\\r\n\t"
    visible("a\ud800b").encode()


def test_characters_of_several_tokens_stay_whole():
    tokenizer = byte_tokenizer("qwen3")
    text = "né 🙂\n日"
    ids = tokenizer(text)["input_ids"]
    assert token_texts(ids, tokenizer) == [("n", 1), ("é", 2), (" ", 1), ("🙂", 4), ("\n", 1), ("日", 3)]
    # Cut off within a character, or no text at all: what follows is not swallowed
    assert token_texts(ids[:6], tokenizer) == [("n", 1), ("é", 2), (" ", 1), ("\ufffd", 1), ("\ufffd", 1)]
    broken = [ids[4], *tokenizer("ok")["input_ids"]]
    assert token_texts(broken, tokenizer) == [("\ufffd", 1), ("o", 1), ("k", 1)]


def test_spaces_before_words_are_kept():
    words = {"▁the": 0, "▁answer": 1, "s": 2, "▁is": 3, "<eos>": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    texts = token_texts([0, 1, 2, 3, 4], tokenizer)
    assert [text for text, _ in texts] == ["the", " answer", "s", " is", "<eos>"]


def test_colours_follow_the_divergence(tokenizer):
    ids = tokenizer("123456")["input_ids"]
    values = [0.0, EDGES[0], 0.2, 3.1, float("nan"), 0.9]
    html = render([Rollout("", "", 6, True, token_ids=ids, prompt_ids=ids, token_kl=values)], tokenizer, "")
    colors = [attrs.get("class") for tag, attrs in Page(html).tags if "title" in attrs]
    assert colors == ["k0", "k1", "k3", "k6", None, "k4"]
    assert all(f".k{i} {{" in html for i in range(1, len(EDGES) + 1))
    assert torch.tensor(EDGES).diff().gt(0).all()
