"""The parts of `tiny-meter`: METER's own classes, small, and a tokenizer of whole words."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, CLIPProcessor, CLIPVisionConfig, PreTrainedTokenizerFast, RobertaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from eas_kit.models.meter import Meter, MeterConfig
from eas_kit.tasks.board_texts import ANSWERS, TRUTH, vocabulary

PATCH_SIZE = 8  # pixels: a cell of a board
IMAGE_SIZE = PATCH_SIZE * 3
WIDTH = 64
INITIAL = 0.08  # BERT's 0.02 is for width 768; in proportion to width^-1/2, or the attentions start all but silent
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # as RoBERTa numbers them
MAX_TOKENS = 32
LABELS = {"vqa": ANSWERS, "nlvr2": TRUTH, "retrieval": ("match",)}


def make_processor() -> CLIPProcessor:
    """CLIP's processor of pictures, and a tokenizer that knows the words of the boards."""
    words = {word: number for number, word in enumerate((*SPECIAL, *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(token, words[token]) for token in ("<s>", "</s>")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=MAX_TOKENS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    pictures = CLIPImageProcessorPil(
        size=square,
        crop_size=square,
        do_resize=True,
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return CLIPProcessor(image_processor=pictures, tokenizer=fast)


def make_config(task: str) -> MeterConfig:
    """The small sizes, with the head of a task."""
    words, labels = len(SPECIAL) + len(vocabulary()), LABELS[task]
    # boards are drawn anew at every step, so nothing is to be gained by dropout
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    shape = {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 2 * WIDTH}
    return MeterConfig(
        task=task,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        text_config=RobertaConfig(
            vocab_size=words,
            num_hidden_layers=2,
            max_position_embeddings=MAX_TOKENS + 2,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            initializer_range=INITIAL,  # of all that is not CLIP's
            **shape,
            **quiet,
        ),
        vision_config=CLIPVisionConfig(
            num_hidden_layers=2, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, projection_dim=WIDTH, **shape
        ),
        cross_modal_config=BertConfig(num_hidden_layers=6, vocab_size=words, **shape, **quiet),
    )


def make_model(task: str, seed: int = 0) -> Meter:
    """A fresh model with the head of a task, weights drawn from `seed`."""
    torch.manual_seed(seed)
    return Meter._from_config(make_config(task), attn_implementation="eager")  # faster at this size on a CPU
