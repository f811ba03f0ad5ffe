"""load_model for any decoder: text alone, every way a folder can be wrong, nothing run that came with a model."""

from __future__ import annotations

import builtins
import json
import os
import pickle

import pytest
import torch
import toys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoProcessor,
    BartConfig,
    BertConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    ViTConfig,
    quantizers,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

import eas_kit as eas
from eas_kit.errors import EASError
from eas_kit.models import auto_class, load_processor

TEXT = "which metal is liquid"


def make_tokenizer():
    """Byte-level BPE over the letters of TEXT, as GPT-2, Qwen and newer Llama models have it."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    inner.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=31, special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def small(config_class, **changes):
    shared = {"vocab_size": 97, "hidden_size": 38, "intermediate_size": 53, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 211}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return config_class(**shared | heads | ends | changes)


def make_mistral():
    return MistralForCausalLM(small(MistralConfig, head_dim=14))


def make_qwen():
    return Qwen2ForCausalLM(small(Qwen2Config, hidden_size=44, tie_word_embeddings=True))


def make_gpt2():  # its head is tied to its embeddings: not in the files, and not missing
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=22, n_layer=2, n_head=2, n_positions=211, **ends))


def save(folder, model=None, tokenizer=True):
    (model or toys.make_llama()).save_pretrained(folder)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return folder


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestTextModels:
    @pytest.mark.parametrize("make", [toys.make_llama, make_mistral, make_qwen, make_gpt2])
    def test_model_and_tokenizer(self, tmp_path, make):
        torch.manual_seed(0)
        saved = make().eval()
        saved.set_attn_implementation("eager")
        model, tokenizer = eas.load_model(save(tmp_path, saved), attn_implementation="eager")
        assert type(model) is type(saved) and not model.training
        assert toys.Bits(dict(model.state_dict())) == toys.Bits(dict(saved.state_dict()))
        inputs = tokenizer(TEXT, return_tensors="pt")
        assert inputs["input_ids"].tolist() == [make_tokenizer()(TEXT)["input_ids"]]
        assert tokenizer.decode(inputs["input_ids"][0]) == TEXT
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, saved(**inputs).logits)

    def test_everything_after_it_works(self, tmp_path):
        model, tokenizer = eas.load_model(save(tmp_path))
        net = eas.attach(model, eas.EASConfig(skip_rank=6, adapt_rank=4))
        net.mask = [1, 3]
        inputs = tokenizer(TEXT, return_tensors="pt")
        assert eas.check_merge(net, inputs)
        out = net.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert out.shape[1] == inputs["input_ids"].shape[1] + 3

    def test_a_relative_folder_is_found_again_from_elsewhere(self, tmp_path, monkeypatch):
        save(tmp_path / "sub" / "m")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path)
        net = eas.attach(eas.load_model("sub/m")[0], eas.EASConfig(skip_rank=6, adapt_rank=4))
        monkeypatch.chdir(tmp_path / "elsewhere")
        net.save_pretrained("adapters")
        about = json.loads((tmp_path / "elsewhere" / "adapters" / "adapter_config.json").read_text())
        assert about["base_model_name_or_path"] == str((tmp_path / "sub" / "m").resolve())
        again = eas.load("adapters")
        ids = torch.arange(3, 14)[None]
        with torch.no_grad():
            assert torch.equal(again(input_ids=ids).logits, net(input_ids=ids).logits)
        assert eas.load_model("tiny")[0].name_or_path == "tiny"

    def test_images_and_text_come_first(self):
        options = {"trust_remote_code": False}
        assert auto_class("x", Gemma3Config(), options).__name__ == "AutoModelForImageTextToText"
        assert auto_class("x", Gemma3TextConfig(), options).__name__ == "AutoModelForCausalLM"

    def test_processor_alone(self, tmp_path):
        assert load_processor(save(tmp_path)).get_vocab() == make_tokenizer().get_vocab()
        assert type(load_processor("tiny")).__name__ == "LlavaProcessor"

    def test_subfolder_is_for_model_and_processor(self, tmp_path):
        save(tmp_path / "inner")
        model, tokenizer = eas.load_model(tmp_path, subfolder="inner")
        assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
        assert model.eas_kit_source["subfolder"] == "inner"
        with pytest.raises(EASError, match="has no readable config.json of a model"):
            eas.load_model(tmp_path)

    def test_dtype_and_device_map_pass(self, tmp_path):
        save(tmp_path)
        model, _ = eas.load_model(tmp_path, dtype="bfloat16", device_map={"": "meta"})
        assert model.dtype == torch.bfloat16 and {p.device.type for p in model.parameters()} == {"meta"}
        plain, _ = eas.load_model(tmp_path)
        assert plain.dtype == torch.float32 and {p.device.type for p in plain.parameters()} == {"cpu"}

    def test_quantization_config_passes(self, tmp_path, monkeypatch):
        class Config(QuantizationConfigMixin):
            def __init__(self, note=None):
                self.quant_method, self.note = "test_only", note

        class Quantizer(quantizers.HfQuantizer):
            def _process_model_before_weight_loading(self, model, **kwargs):
                model.noted = self.quantization_config.note

            is_serializable = is_trainable = lambda self: True

        monkeypatch.setitem(quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "test_only", Config)
        monkeypatch.setitem(quantizers.auto.AUTO_QUANTIZER_MAPPING, "test_only", Quantizer)
        model, _ = eas.load_model(save(tmp_path), quantization_config=Config(note=13))
        assert model.noted == 13 and type(model.hf_quantizer) is Quantizer


class TestWrongFolders:
    def test_nothing_there(self, tmp_path):
        for name in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):
            with pytest.raises(EASError, match=r"no model .* not bundled \(tiny\), and there is no such folder"):
                eas.load_model(name)
        with pytest.raises(EASError, match=r"no model 'some/one': .* not a folder, and the Hugging Face hub gave:"):
            eas.load_model("some/one", local_files_only=True)
        with pytest.raises(EASError, match=r"config.json is a file; pass the folder it is in"):
            eas.load_model(save(tmp_path) / "config.json")

    def test_processor_needs_a_package(self, tmp_path, monkeypatch):
        def needs(*_, **__):
            raise ImportError("\nOurProcessor requires the Torchvision library but it was not found. Look up how to. ")

        net = eas.attach(eas.load_model(save(tmp_path / "base"))[0], eas.EASConfig(skip_rank=6, adapt_rank=4))
        net.mask = [1, 3]
        net.save_pretrained(tmp_path / "net")
        monkeypatch.setattr(AutoProcessor, "from_pretrained", needs)
        for load in (eas.load_model, load_processor):
            with pytest.raises(
                EASError,
                match=r"OurProcessor requires the Torchvision library but it was not found\): pip install.*\[vision\]",
            ):
                load(tmp_path / "base")
        found = eas.load(tmp_path / "net")  # adapters need the model alone
        found.save_pretrained(tmp_path / "again")
        for folder in ("net", "again"):
            about = json.loads((tmp_path / folder / "adapter_config.json").read_text())
            assert about["processor_class"] == type(make_tokenizer()).__name__
        inputs = make_tokenizer()(TEXT, return_tensors="pt")
        with torch.no_grad():
            assert torch.equal(found(**inputs).logits, net(**inputs).logits)

    def test_no_config(self, tmp_path):
        make_tokenizer().save_pretrained(tmp_path)
        with pytest.raises(EASError, match="has no readable config.json of a model"):
            eas.load_model(tmp_path)
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(EASError, match="has no readable config.json of a model.*JSON"):
            eas.load_model(tmp_path)

    def test_config_without_weights(self, tmp_path):
        toys.make_llama().config.save_pretrained(tmp_path)
        (tmp_path / "model.ckpt").write_bytes(b"x")
        with pytest.raises(
            EASError, match="has a config but no weights: wanted .* holds config.json, model.ckpt; copy"
        ):
            eas.load_model(tmp_path)

    @pytest.mark.parametrize(
        "make", [toys.make_llama, make_gpt2]
    )  # of no files, GPT-2's class makes an empty tokenizer
    def test_weights_without_tokenizer(self, tmp_path, make):
        save(tmp_path, make(), tokenizer=False)
        with pytest.raises(EASError, match=r"has no processor or tokenizer.*processor.save_pretrained\(folder\)"):
            eas.load_model(tmp_path)

    def test_images_without_processor(self, tmp_path):
        save(tmp_path, toys.make_llava(), tokenizer=False)
        with pytest.raises(EASError, match="has no processor or tokenizer that can be loaded"):
            eas.load_model(tmp_path)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (BartConfig(architectures=["BartForCausalLM"]), "BartForCausalLM, a model with an encoder and a decoder"),
            (T5Config(), "T5Config, a model with an encoder and a decoder; wanted a decoder model"),
            (BertConfig(architectures=["BertForMaskedLM"]), "BertForMaskedLM, an encoder; wanted a decoder model"),
            (ViTConfig(), "ViTConfig, which neither AutoModelForImageTextToText nor AutoModelForCausalLM"),
        ],
        ids=["bart", "t5", "bert", "vit"],
    )
    def test_no_decoder(self, tmp_path, config, message):
        config.save_pretrained(tmp_path)
        with pytest.raises(EASError, match=message):
            eas.load_model(tmp_path)

    def test_unknown_model_type(self, tmp_path):
        edit(save(tmp_path) / "config.json", model_type="from-the-future")
        with pytest.raises(EASError, match=r"transformers 5.* does not read its config.json \(model_type 'from-"):
            eas.load_model(tmp_path)

    def test_weights_that_are_not_all_there(self, tmp_path):
        torch.manual_seed(0)
        save(tmp_path, LlamaModel(toys.text_config()))
        with pytest.raises(EASError, match="lacks 1 of the weights of LlamaForCausalLM .the first: lm_head.weight"):
            eas.load_model(tmp_path)

    def test_damaged_weights_and_other_shapes(self, tmp_path):
        weights = save(tmp_path) / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(EASError, match="its weights cannot be loaded with AutoModelForCausalLM: "):
            eas.load_model(tmp_path)
        weights.write_bytes(whole)
        edit(tmp_path / "config.json", intermediate_size=59)
        with pytest.raises(EASError, match="its weights cannot be loaded with AutoModelForCausalLM: "):
            eas.load_model(tmp_path)

    def test_adapters_are_no_model(self, tmp_path):
        folder = tmp_path / "peft"
        folder.mkdir()
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "some/one"}')
        with pytest.raises(EASError, match=r"adapters of peft \(LORA for some/one\).*merge_and_unload"):
            eas.load_model(folder)
        base, _ = eas.load_model(save(tmp_path / "base"))
        eas.attach(base).save_pretrained(tmp_path / "ours")
        with pytest.raises(EASError, match=r"holds adapters of eas_kit: eas_kit.load\(.*ours'\) loads them with"):
            eas.load_model(tmp_path / "ours")


class Evil:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_pickle(value, path):
    path.write_bytes(pickle.dumps(value, protocol=2))


class TestNothingIsRun:
    def test_plain_bin_weights_load(self, tmp_path):
        saved = toys.make_llama()
        save(tmp_path, saved)
        (tmp_path / "model.safetensors").unlink()
        torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
        model, _ = eas.load_model(tmp_path)
        assert toys.Bits(dict(model.state_dict())) == toys.Bits(dict(saved.state_dict()))

    @pytest.mark.parametrize(
        "write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))]
    )
    def test_a_pickle_does_not_run(self, tmp_path, write):
        save(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        weights, marker = tmp_path / "pytorch_model.bin", tmp_path / "ran"
        write({"lm_head.weight": Evil(marker)}, weights)
        with pytest.raises(EASError, match="its weights cannot be loaded with AutoModelForCausalLM"):
            eas.load_model(tmp_path)
        assert not marker.exists()
        with pytest.raises(EASError, match="weights_only=False would run what a pickle says"):
            eas.load_model(tmp_path, weights_only=False)
        assert not marker.exists()
        torch.load(weights, weights_only=False) if write is torch.save else pickle.loads(weights.read_bytes())
        assert marker.exists()  # so that it would have been seen

    def write_code(self, folder, marker):
        (folder / "modeling.py").write_text(
            f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\n"
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            "class OurConfig(LlamaConfig):\n    model_type = 'ours'\n"
            "class OurModel(LlamaForCausalLM):\n    config_class = OurConfig\n"
        )

    def test_code_of_a_model(self, tmp_path, monkeypatch):
        import transformers.dynamic_module_utils

        monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked whether to run the code"))
        folder, marker = save(tmp_path / "model"), tmp_path / "ran"
        self.write_code(folder, marker)
        code = {"AutoConfig": "modeling.OurConfig", "AutoModelForCausalLM": "modeling.OurModel"}
        edit(folder / "config.json", model_type="ours", auto_map=code)
        for kwargs in ({}, {"trust_remote_code": False}, {"trust_remote_code": None}):
            with pytest.raises(EASError, match="needs Python code that comes with it.*trust_remote_code=True is yours"):
                eas.load_model(folder, **kwargs)
            assert not marker.exists()
        model, _ = eas.load_model(folder, trust_remote_code=True)
        assert marker.exists() and type(model).__name__ == "OurModel"

    def test_code_of_a_known_model_or_its_tokenizer(self, tmp_path, monkeypatch):
        monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked whether to run the code"))
        folder, marker = save(tmp_path / "model"), tmp_path / "ran"
        self.write_code(folder, marker)
        edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.OurModel"})
        assert type(eas.load_model(folder)[0]).__name__ == "LlamaForCausalLM"  # transformers has its own
        edit(
            folder / "tokenizer_config.json",
            tokenizer_class="OurTokenizer",
            auto_map={"AutoTokenizer": ["modeling.OurTokenizer", None]},
        )
        with pytest.raises(EASError, match=r"needs Python code that comes with it"):
            eas.load_model(folder)
        assert not marker.exists()
