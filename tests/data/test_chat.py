"""Documents as conversations: the tokens that the tokenizer's own template makes, with spans, and nothing in a document that begins a turn."""

from __future__ import annotations

import logging
import struct
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mechscope.data.chat import chat_template
from mechscope.data.documents import Corpus, Document, load_documents
from mechscope.data.pieces import Pieces
from mechscope.data.prompt import Example, encode, encode_prompt
from mechscope.data.spans import locate
from mechscope.data.template import Frame, Template
from mechscope.errors import DataError
from tests.chats import CHATML, TEMPLATES, chatting, joining

ARTICLE = "Maria Lopez opened a new library in Marlow on Monday. “It was time,” said Lopez."
SUMMARY = "Lopez opened a library in Marlow."
PROMPTS = ("Article: {document}\nSummary: {summary}", "Sum this up.\n\n{document}", "{document}\nIn short:{summary} That is all.")


def conversation(prompt: str, article: str = ARTICLE, summary: str = SUMMARY) -> list[dict[str, str]]:
    """Return the messages that a user would write for `apply_chat_template`."""
    asked, _, more = prompt.partition("{summary}")
    return [{"role": "user", "content": asked.rstrip(" ").replace("{document}", article)}, {"role": "assistant", "content": summary + more}]


def encoded(tokenizer: Any, prompt: str, article: str = ARTICLE, summary: str = SUMMARY, max_tokens: int = 1000) -> Example:
    corpus = Corpus((Document("d", article, summary),), "made here")
    return encode(corpus, tokenizer, template=chat_template(prompt, tokenizer), max_tokens=max_tokens).examples[0]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_has_the_tokens_of_its_template_and_spans_of_its_texts(
    name: str, prompt: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = chatting(TEMPLATES[name])
    example, messages = encoded(tokenizer, prompt), conversation(prompt)
    assert not caplog.records
    assert list(example.input_ids) == tokenizer.apply_chat_template(messages, return_dict=False)
    ended = tokenizer.eos_token if name == "brackets" else "<|im_end|>"
    for span, text in ((example.document, ARTICLE), (example.summary, messages[1]["content"] + ended)):
        assert tokenizer.decode(example.input_ids[slice(*span)]).strip() == text
    prompted = encode_prompt(ARTICLE, tokenizer, template=chat_template(prompt, tokenizer), max_tokens=1000, max_new_tokens=1)
    options = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": False}
    assert list(prompted) == tokenizer.apply_chat_template(messages[:1], **options) == list(example.input_ids[: example.summary[0]])


def test_the_summary_is_what_the_template_marks_as_the_assistants() -> None:
    tokenizer = chatting(TEMPLATES["marked"])
    example = encoded(tokenizer, PROMPTS[0])
    mask = tokenizer.apply_chat_template(conversation(PROMPTS[0]), return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    assert [at for at, mine in enumerate(mask) if mine] == list(range(*example.summary))
    # a template may leave the end of the turn to itself
    tokenizer.chat_template = TEMPLATES["marked"].replace(
        "m['content'] + '<|im_end|>' }}{% endgeneration %}", "m['content'] }}{% endgeneration %}<|im_end|>"
    )
    mask = tokenizer.apply_chat_template(conversation(PROMPTS[0]), return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    example = encoded(tokenizer, PROMPTS[0])
    assert [at for at, mine in enumerate(mask) if mine] == list(range(*example.summary))
    assert tokenizer.decode(example.input_ids[example.summary[1]]) == "<|im_end|>"


@pytest.mark.parametrize("special", [True, False])
def test_control_tokens_that_an_article_quotes_are_letters(special: bool) -> None:
    tokenizer = chatting(special=special)
    quoted = "He typed <|im_end|> <|im_start|>assistant and then [INST] by hand, which the <|im_start|> page showed."
    example = encoded(tokenizer, PROMPTS[0], quoted, "<|im_start|> was typed.")
    (start, end) = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [example.input_ids.count(token) for token in (start, end)] == [3, 3]
    for begin, stop in (example.document, (example.summary[0], example.summary[1] - 1)):
        assert not {start, end} & set(example.input_ids[begin:stop])
    assert tokenizer.decode(example.input_ids[slice(*example.document)]).strip() == quoted
    # transformers' own way to keep what users write from being control tokens
    messages = conversation(PROMPTS[0], quoted, "<|im_start|> was typed.")
    assert list(example.input_ids) == tokenizer.apply_chat_template(messages, sanitize_control_tokens=True, return_dict=False)
    before = tokenizer(quoted, split_special_tokens=True)["input_ids"]
    assert (start in before) is not special, "the tokenizer itself stays as it was"


def test_only_the_article_is_cut() -> None:
    tokenizer = chatting()
    whole, cut = (encoded(tokenizer, PROMPTS[0], "word " * 200, max_tokens=size) for size in (1000, 90))
    assert (len(cut), cut.truncated) == (90, True)
    assert cut.input_ids[cut.document[1] :] == whole.input_ids[whole.document[1] :]
    assert cut.input_ids[: cut.document[1]] == whole.input_ids[: cut.document[1]]


def test_characters_are_located_in_a_conversation() -> None:
    tokenizer = chatting(TEMPLATES["brackets"])
    document = Document("d", ARTICLE, SUMMARY)
    at, of = ARTICLE.index("Marlow"), SUMMARY.index("library")
    found = locate(
        encoded(tokenizer, PROMPTS[0]),
        document,
        tokenizer,
        document_spans=[(at, at + 6)],
        summary_spans=[(of, of + 7)],
        template=chat_template(PROMPTS[0], tokenizer),
    )
    ids = encoded(tokenizer, PROMPTS[0]).input_ids
    assert [tokenizer.decode(ids[begin:end]).strip() for begin, end in found] == ["Marlow", "library"]


def test_a_border_that_a_tokenizer_would_join_across_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = joining()
    prompt, article, summary = PROMPTS[0], "It rained in Marlow.", "It rained."
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            example = encoded(tokenizer, prompt, article, summary)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "makes other tokens of the whole conversation" in message
    assert r"('d.\nS')" in message, "the token that a full stop and a line feed would be"
    assert tokenizer.decode(example.input_ids) == tokenizer.apply_chat_template(conversation(prompt, article, summary), tokenize=False)
    caplog.clear()
    prompt = "Sum this up.\n\n{document}"  # it ends where the turn ends
    example = encoded(tokenizer, prompt, article, summary)
    assert list(example.input_ids) == tokenizer.apply_chat_template(conversation(prompt, article, summary), return_dict=False)
    assert not caplog.records


def test_writing_ends_at_the_token_that_ends_a_turn() -> None:
    for name, token in (("turns", "<|im_end|>"), ("brackets", "<|end_story|>"), ("marked", "<|im_end|>")):
        tokenizer = chatting(TEMPLATES[name])
        expected = tokenizer.eos_token_id if name == "brackets" else tokenizer.convert_tokens_to_ids(token)
        assert Frame(Pieces(tokenizer), chat_template(PROMPTS[0], tokenizer)).ends == (expected,)
    assert Frame(Pieces(tokenizer), Template()).ends == ()


def test_white_space_that_is_an_added_token_ends_no_turn() -> None:
    tokenizer = chatting(TEMPLATES["marked"].replace("'<|im_end|>' }}{% endgeneration %}", "'<|im_end|>\n' }}{% endgeneration %}"))
    tokenizer.add_tokens(["\n"])
    template = chat_template(PROMPTS[0], tokenizer)
    assert template.closing == "<|im_end|>\n"
    assert Frame(Pieces(tokenizer), template).ends == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)


@pytest.mark.parametrize(
    ("template", "prompt", "message"),
    [
        (None, PROMPTS[0], "has no chat template, which setting 'chat' needs: leave it out, or pass tokenizer=…"),
        (CHATML, "Sum this up: {summary}", r"must hold \{document\} once, and behind it \{summary\} once or not at all"),
        (CHATML, "{summary} {document}", r"must hold \{document\} once"),
        ("{{ raise_exception('only a system may speak') }}", PROMPTS[0], "cannot be applied .*: only a system may speak"),
        ("{{ messages[0]['content'] }}", PROMPTS[0], "does not write a user's and an assistant's message once each"),
        (
            CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"),
            PROMPTS[0],
            r"asks for an answer with '.*<think>\\n' and begins one with '.*assistant\\n': a model would write from another prompt",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_one_clear_error(template: str | None, prompt: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        chat_template(prompt, chatting(template))


def smollm(shared: Path) -> Any:
    """Read SmolLM2's tokenizer out of the GGUF file beside the checkout."""
    path = shared / "models" / "SmolLM2-135M-Instruct-Q4" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        pytest.skip("SmolLM2 is not in ../shared")
    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"
        _number(file, "I"), _number(file, "Q")
        facts = {_text(file): _value(file, _number(file, "I")) for _ in range(_number(file, "Q"))}
    tokens = facts["tokenizer.ggml.tokens"]
    inner = Tokenizer(
        models.BPE({token: at for at, token in enumerate(tokens)}, [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]])
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    inner.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, facts["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", additional_special_tokens=control)
    tokenizer.chat_template = facts["tokenizer.chat_template"]
    return tokenizer


def _number(file: BinaryIO, form: str) -> Any:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))[0]


def _text(file: BinaryIO) -> str:
    return file.read(_number(file, "Q")).decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == 8:
        return _text(file)
    if kind == 9:
        of = _number(file, "I")
        return [_value(file, of) for _ in range(_number(file, "Q"))]
    return _number(file, {0: "B", 1: "b", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q"}[kind])


def test_real_articles_have_the_tokens_of_smollms_own_template(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = smollm(shared)
    template = chat_template(PROMPTS[0], tokenizer)
    assert template.opening.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert not caplog.records
    corpus = load_documents(shared / "data" / "summarization" / "samsum.test.jsonl", limit=40)
    found = encode(corpus, tokenizer, template=template, max_tokens=4000, min_document_tokens=1)
    documents = {document.id: document for document in corpus.documents}
    assert len(found) == 40
    for example in found.examples:
        document = documents[example.id]
        expected = tokenizer.apply_chat_template(conversation(PROMPTS[0], document.document, document.summary), return_dict=False)
        assert list(example.input_ids) == expected
        assert tokenizer.decode(example.input_ids[slice(*example.summary)]) == document.summary + "<|im_end|>"
        assert tokenizer.decode(example.input_ids[slice(*example.document)]) == " " + document.document
