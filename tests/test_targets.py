"""The tokens of a target are those that it has behind its prompt, whatever the tokenizer and the chat template."""

from __future__ import annotations

import pytest
from scienceqa_files import load, write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eas_kit.models.tiny.architecture import make_processor

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
LINE = (  # as Qwen's and Llama 3's: an answer begins a line, or follows a special token
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
MARK = LINE.replace("<s>assistant\n", "<s>").replace("<s>{{ m['role'] }}\n", "<s>")
TEXTS = [
    "user: user\nassistant: assistant\n Question: Which one is a metal? Context: N/A Options: (A) tin (B) wood (C)",
    " The answer is A. BECAUSE: Metals shine. Tin shines. The answer is tin.",
]


def bytes_tokenizer(template):
    """Byte-level BPE, as the bundled model's and GPT-2's."""
    tokenizer = make_processor(TEXTS * 50).tokenizer
    tokenizer.chat_template = template
    return tokenizer


def pieces_tokenizer(template, scheme="always"):
    """Like SentencePiece: blanks are in the words, and a text gets one in front of it."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    inner.decoder = decoders.Metaspace(prepend_scheme=scheme)
    special = ["<unk>", "<pad>", "<s>", "</s>"]
    letters = sorted(set("".join(TEXTS)))
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=special, unk_token="<unk>", initial_alphabet=letters, show_progress=False
    )
    inner.train_from_iterator(TEXTS * 50, trainer)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **names)


@pytest.mark.parametrize("form", ["QCM-ALE", "QCM-LEA", "QCM-A"])
@pytest.mark.parametrize("template,lead", [(CHAT, " "), (LINE, ""), (MARK, "")], ids=["chat", "line", "mark"])
@pytest.mark.parametrize("make", [bytes_tokenizer, pieces_tokenizer, lambda t: pieces_tokenizer(t, "first")])
def test_targets_have_the_tokens_of_the_whole_text(tmp_path, make, template, lead, form):
    tokenizer = make(template)
    task = load(write(tmp_path, [("test", "7", {}), ("test", "8", {"solution": "", "lecture": ""})]), tokenizer)
    task.prompt_format = form
    assert task.lead == lead
    for example in task.test:
        prompt, (scored, rest) = task.prompt_text(example), task.target_text(example)
        assert not prompt[-1:].isspace() or template is LINE

        def ids(text):
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        found, count = task.target_ids(example)
        assert found[-1] == tokenizer.eos_token_id
        assert ids(prompt) + found[:-1] == ids(prompt + lead + scored + rest)
        assert ids(prompt) + found[:count] == ids(prompt + lead + scored)
        batch = task.collate([example])
        assert batch["input_ids"][0].tolist() == ids(prompt) + found
        assert batch["labels"][0].tolist() == [-100] * len(ids(prompt)) + found
        if lead:  # what a chat of two turns says
            turns = [{"role": "user", "content": task.question_text(example)}]
            turns.append({"role": "assistant", "content": scored + rest})
            assert prompt + lead + scored + rest + "</s>" == tokenizer.apply_chat_template(turns, tokenize=False)
