"""`--chat`: what jobs measure, train on and write is the conversation that Hugging Face's own template makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel

import mechscope
from mechscope.adapt.generate import encode_prompts, end_tokens, summarize
from mechscope.data.chat import chat_template
from mechscope.data.documents import load_documents
from mechscope.errors import DataError
from mechscope.settings.decoding import Decoding
from mechscope.store.run import RunFolder
from mechscope.studies.corpora import load_splits
from mechscope.studies.inputs import read_prompt_pairs
from mechscope.studies.jobs import jobs
from mechscope.studies.runner import run_job
from tests import families
from tests.chats import TEMPLATES, chatting

ROWS = [
    {"id": str(at), "document": f"The council of town {at} met on Monday and voted on the new budget.", "summary": f"Town {at} voted."}
    for at in range(12)
]
PROMPT = "Sum this up.\n\n{document}"


def made(seed: int = 0) -> GPT2LMHeadModel:
    """Return a random model whose end token is not what ends a turn, as that of a base model."""
    tokenizer = chatting()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=160, eos_token_id=tokenizer.eos_token_id)
    model = GPT2LMHeadModel(config).eval()
    families.randomize(model, seed)
    return model


def saved(folder: Path, template: str | None) -> str:
    made().save_pretrained(folder)
    chatting(template).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def articles(tmp_path: Path) -> str:
    path = tmp_path / "articles.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return str(path)


def messages(row: dict[str, str]) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": PROMPT.replace("{document}", row["document"])},
        {"role": "assistant", "content": row["summary"]},
    ]


@torch.no_grad()
def losses(model: Any, rows: list[dict[str, str]]) -> list[tuple[float, int]]:
    """Return the summed loss on the tokens that the template marks as the assistant's, and their number, by Hugging Face alone."""
    found = []
    for row in rows:
        marked = chatting(TEMPLATES["marked"]).apply_chat_template(
            messages(row), return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        labels = marked["input_ids"].masked_fill(marked["assistant_masks"] == 0, -100)
        number = int((labels != -100).sum())
        found.append((float(model(input_ids=marked["input_ids"], labels=labels).loss) * number, number))
    return found


def test_diff_predicts_the_assistants_tokens(articles: str) -> None:
    base, tuned = made(), made(1)
    tokenizer = chatting(TEMPLATES["marked"])
    options: dict[str, Any] = {"chat": True, "template": PROMPT, "documents": 6, "noise_draws": 0, "replicates": 20}
    result = mechscope.diff(base, tuned, articles, tokenizer=tokenizer, **options)
    row = result.tables["outputs"].set_index("rows").loc["summary"]
    chosen = load_documents(articles, limit=6).documents
    rows = [{"document": each.document, "summary": each.summary} for each in chosen]
    for name, model in (("loss_base", base), ("loss_tuned", tuned)):
        expected = [total / number for total, number in losses(model, rows)]
        assert row[name] == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_a_tuning_learns_the_assistants_tokens_and_its_model_keeps_the_template(articles: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", TEMPLATES["marked"])
    sizes: dict[str, Any] = {"train_documents": 6, "validation_documents": 3, "test_documents": 3}
    options: dict[str, Any] = {"max_steps": 2, "eval_every": 1, "batch_size": 2, "learning_rate_full": 1e-2}
    tuned = mechscope.tune(base, articles, out=tmp_path / "tuned", chat=True, template=PROMPT, method="full", **sizes, **options)
    settings = jobs()["tune"].resolve(base=base, data=articles, chat=True, template=PROMPT, **sizes)
    validation = load_splits(settings, mechscope.load(base)).corpora["validation"].documents
    parts = losses(made(), [{"document": each.document, "summary": each.summary} for each in validation])
    expected = sum(total for total, _ in parts) / sum(number for _, number in parts)
    assert tuned.curve.loc[0, "validation_loss"] == pytest.approx(expected, rel=1e-5)
    assert tuned.curve["validation_loss"].iloc[-1] < expected
    assert mechscope.load(tuned.path).tokenizer.chat_template == TEMPLATES["marked"]


def test_a_model_writes_behind_the_generation_prompt_until_its_turn_ends() -> None:
    for special in (True, False):
        tokenizer, model = chatting(special=special), made()
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        template = chat_template(PROMPT, tokenizer)
        decoding = Decoding(max_new_tokens=6)
        (prompt,) = encode_prompts([ROWS[0]["document"]], tokenizer, decoding=decoding, max_tokens=160, template=template)
        asked = tokenizer.apply_chat_template(messages(ROWS[0])[:1], add_generation_prompt=True, return_dict=False)
        assert list(prompt) == asked
        ends = end_tokens(tokenizer, template)
        (free,) = summarize(model, tokenizer, [prompt], decoding=decoding, ends=ends)
        written = model.generate(torch.tensor([asked]), max_new_tokens=6, do_sample=False)[0, len(asked) :].tolist()
        assert free == tokenizer.decode(written, skip_special_tokens=True).strip()
        # the token that it writes third now ends its turn
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        third = written[2]
        with torch.no_grad():
            model.lm_head.weight[[third, end]] = model.lm_head.weight[[end, third]]
        assert third not in written[:2]
        (ended,) = summarize(model, tokenizer, [prompt], decoding=decoding, ends=ends)
        assert ended == tokenizer.decode(written[:2]).strip()


def test_a_bakeoff_writes_summaries_of_conversations(articles: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", TEMPLATES["turns"])
    job = jobs()["bakeoff"]
    sizes: dict[str, Any] = {
        "train_documents": 6,
        "validation_documents": 3,
        "test_documents": 3,
        "rouge_documents": 2,
        "max_new_tokens": 4,
        "seeds": 1,
    }
    options: dict[str, Any] = {
        "strategies": "none",
        "target_layers": "layers:0",
        "max_steps": 1,
        "eval_every": 1,
        "batch_size": 2,
        "max_tokens": 160,
    }
    settings = job.resolve(base=base, data=articles, chat=True, template=PROMPT, **sizes, **options)
    result = run_job(job, settings, tmp_path / "run")
    table = result.tables["bakeoff_summaries"]
    tokenizer, model = chatting(), made()
    written = dict(zip(table["id"], table["base"], strict=True))
    for row in ROWS:
        if row["id"] in written:
            asked = tokenizer.apply_chat_template(messages(row)[:1], add_generation_prompt=True, return_dict=False)
            ids = model.generate(torch.tensor([asked]), max_new_tokens=4, do_sample=False)[0, len(asked) :]
            assert written[row["id"]] == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert len(written) == 2


def test_a_tokenizer_without_a_chat_template_is_one_line(articles: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", None)
    with pytest.raises(DataError, match="has no chat template, which setting 'chat' needs: leave it out, or pass tokenizer=…"):
        mechscope.diff(base, made(1), articles, chat=True)
    with pytest.raises(DataError, match="has no tokenizer, whose chat template is to be applied"):
        mechscope.diff(made(), made(1), articles, chat=True)
    chatting(TEMPLATES["turns"]).save_pretrained(tmp_path / "tokenizer")
    result = mechscope.diff(
        base,
        made(1),
        articles,
        tokenizer=str(tmp_path / "tokenizer"),
        chat=True,
        documents=3,
        noise_draws=0,
        replicates=20,
        out=tmp_path / "run",
    )
    assert RunFolder.read(result.path).manifest["data"]["documents"] == 3


def asked(text: str) -> list[int]:
    """Return the ids of a user's message and the prompt for an answer."""
    return list(chatting().apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False))


def test_prompts_are_a_users_messages_and_answers_what_the_assistant_begins_with(tmp_path: Path) -> None:
    subject = mechscope.load(made(), tokenizer=chatting())
    clean, corrupt = "Who is in Marlow?", "Who is in Barlow?"
    row = {"clean": clean, "corrupt": corrupt, "answers": " The", "wrong_answers": [" It"], "subject": "Marlow"}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row))
    options: dict[str, Any] = {"limit": None, "max_tokens": 100, "on_problem": "error", "seed": 0, "chat": True}
    (pair,) = read_prompt_pairs(str(path), subject, **options)
    assert [list(ids) for ids in (pair.clean, pair.corrupt)] == [asked(clean), asked(corrupt)]
    tokenizer = chatting()
    assert tokenizer.decode(pair.clean[slice(*pair.segments["subject"][0])]).strip() == "Marlow"
    for answers, text in ((pair.answers, "The"), (pair.wrong_answers, "It")):
        turns = [{"role": "user", "content": clean}, {"role": "assistant", "content": text}]
        whole = tokenizer.apply_chat_template(turns, return_dict=False)
        assert list(answers) == whole[len(pair.clean) : len(pair.clean) + 1]
    path.write_text(json.dumps({**row, "answers": " Barlow"}))
    with pytest.raises(DataError, match=r"answer ' Barlow' is 2 tokens where an assistant's answer begins, not one"):
        read_prompt_pairs(str(path), subject, **options)


def test_a_start_token_before_every_text_stands_once_before_a_conversation(tmp_path: Path) -> None:
    tokenizer = chatting(TEMPLATES["brackets"])
    start = ("<|begin|>", tokenizer.convert_tokens_to_ids("<|begin|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[start])
    path = tmp_path / "pairs.jsonl"
    row = {
        "clean": "The vote is in Marlow?",
        "corrupt": "The vote is in Barlow?",
        "answers": ["The"],
        "wrong_answers": [" It"],
        "subject": "Marlow",
    }
    path.write_text(json.dumps(row))
    options: dict[str, Any] = {"limit": None, "max_tokens": 100, "on_problem": "error", "seed": 0}
    subject = mechscope.load(made(), tokenizer=tokenizer)
    (plain,), (pair,) = (read_prompt_pairs(str(path), subject, chat=chat, **options) for chat in (False, True))
    assert plain.clean[0] == start[1]
    turns = [{"role": "user", "content": row["clean"]}]
    # with the space that stands before a message there
    assert list(pair.clean) == tokenizer.apply_chat_template(turns, return_dict=False, add_generation_prompt=True)
    assert len(pair.corrupt) == len(pair.clean)
    assert tokenizer.decode(pair.clean[slice(*pair.segments["subject"][0])]).strip() == "Marlow"


def test_documents_with_salient_sentences_are_conversations(tmp_path: Path) -> None:
    subject = mechscope.load(made(), tokenizer=chatting())
    path = tmp_path / "articles.jsonl"
    rows = [{"document": f"Town {at} voted on Monday. The weather was fine there.", "summary": f"Town {at} voted."} for at in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    pairs = read_prompt_pairs(f"salience:{path}", subject, limit=3, max_tokens=150, on_problem="error", seed=0, chat=True)
    start = chatting().convert_tokens_to_ids("<|im_start|>")
    assert len(pairs) == 3
    assert all(pair.clean.count(start) == 3 for pair in pairs)
    assert all(chatting().decode(pair.clean[slice(*(pair.target or (0, 0)))]).endswith("voted.<|im_end|>") for pair in pairs)


def test_a_text_to_read_is_a_users_message() -> None:
    result = mechscope.read_lens(mechscope.load(made(), tokenizer=chatting()), text="Who is in Marlow?", chat=True)
    shown = result.tables["lens_tokens"]["token"].tolist()
    assert [token.strip(" ") for token in shown] == [chatting().decode([one]).strip(" ") for one in asked("Who is in Marlow?")]


def test_a_prompt_is_steered_as_a_users_message(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"clean": f"Who is in Marlow {at}?", "corrupt": f"Who is in Barlow {at}?", "answers": " The", "wrong_answers": " It"}
        for at in range(8)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    options: dict[str, Any] = {"layer": 0, "strengths": "0", "controls": 0, "prompt": "Who is there?", "new_tokens": 4, "neutral_texts": 2}
    subject = mechscope.load(made(), tokenizer=chatting())
    result = mechscope.steer(subject, str(path), chat=True, max_tokens=100, **options)
    ids = subject.model.generate(torch.tensor([asked("Who is there?")]), max_new_tokens=4, do_sample=False)[0, -4:]
    assert result.tables["steer_texts"]["continuation"].tolist() == [chatting().decode(ids, skip_special_tokens=True).strip()]
