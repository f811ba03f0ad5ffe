"""Adapters and models on a hub: a stand-in on this machine, to which huggingface_hub itself talks over HTTP."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import toys
import transformers.utils.hub
from hub_stand_in import Hub
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from test_load_model import save
from test_prompt import make_net
from toys import snapshot

import eas_kit as eas
from eas_kit.errors import ConfigError, EASError
from eas_kit.model import load
from eas_kit.models import load_processor

BASE, ADAPTERS = "someone/tiny-llama", "someone/tiny-adapters"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    yield server
    server.close()


@pytest.fixture
def base_commit(hub, tmp_path):
    return hub.commit_folder(BASE, save(tmp_path / "base"))


def logits(net):
    batch = toys.make_batch(images=None)
    with torch.no_grad():
        return net(**batch).logits


def push(**options):
    base, _ = eas.load_model(BASE)
    net = make_net((1, 3), model=base)
    return net, net.push_to_hub(ADAPTERS, token="hf_test", **options)


def test_push_then_load_by_name_alone(hub, base_commit, tmp_path):
    net, info = push(private=True)
    assert hub.private[ADAPTERS] == "private"
    assert info.oid == hub.repos[ADAPTERS][-1][0]
    files = hub.files(ADAPTERS)
    assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "mask.json"]
    about = json.loads(files["adapter_config.json"])
    assert (about["base_model_name_or_path"], about["revision"]) == (BASE, base_commit)
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == (BASE, "eas_kit")
    assert f'eas.load("{ADAPTERS}")' in card.text and base_commit in card.text
    sent = [token for method, path, token in hub.requests if method == "POST"]
    assert sent and set(sent) == {"Bearer hf_test"}

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load(ADAPTERS)
    assert again.mask == (1, 3) and again.base.name_or_path == BASE
    assert torch.equal(logits(again), logits(net))
    count = len(hub.requests)
    cached = load(ADAPTERS, local_files_only=True)  # from the caches of both
    assert torch.equal(logits(cached), logits(net)) and len(hub.requests) == count


def test_revisions(hub, base_commit, tmp_path):
    net, first = push()
    net.mask = (0,)
    net.push_to_hub(ADAPTERS)
    assert load(ADAPTERS).mask == (0,)
    other = hub.commit_folder(BASE, save(tmp_path / "other", toys.make_llama(seed=5)))
    again = load(ADAPTERS, revision=first.oid, token="hf_other", cache_dir=tmp_path / "elsewhere")
    assert again.mask == (1, 3)
    assert torch.equal(logits(again), logits(load(ADAPTERS, revision=first.oid)))  # the base it was trained on
    assert again.base.eas_kit_source["revision"] == base_commit
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} >= {
        "models--someone--tiny-adapters",
        "models--someone--tiny-llama",
    }
    assert "Bearer hf_other" in {token for _, _, token in hub.requests}

    newest, _ = eas.load_model(BASE)
    assert newest.eas_kit_source["revision"] == other
    with pytest.warns(UserWarning, match=f"trained on revision {base_commit} of {BASE}, this .* revision {other}"):
        load(ADAPTERS, base=newest)
    old, tokenizer = eas.load_model(BASE, revision=base_commit)
    assert not torch.equal(logits(old), logits(newest.eval()))
    assert tokenizer.get_vocab() == load_processor(BASE, revision=base_commit).get_vocab()


def test_folder_names_revision_of_its_base(hub, base_commit, tmp_path):
    base, _ = eas.load_model(BASE)
    make_net(model=base).save_pretrained(tmp_path / "net")
    other = hub.commit_folder(BASE, save(tmp_path / "other", toys.make_llama(seed=5)))
    assert load(tmp_path / "net").base.eas_kit_source["revision"] == base_commit
    with pytest.warns(UserWarning, match=f"trained on revision {base_commit}.*this base model is revision {other}"):
        load(tmp_path / "net", revision="main")


def test_an_edited_card_on_the_hub_is_kept(hub, base_commit):
    net, _ = push()
    net.mask = (0,)
    net.push_to_hub(ADAPTERS)
    assert b"| skipped (zero-based) | 0 |" in hub.files(ADAPTERS)["README.md"]
    hub.commit(ADAPTERS, {"README.md": b"Mine."})
    net.mask = (2,)
    net.push_to_hub(ADAPTERS, commit_message="The third")
    assert hub.files(ADAPTERS)["README.md"] == b"Mine."
    assert json.loads(hub.files(ADAPTERS)["mask.json"])["skipped"] == [2]
    assert hub.commits[-1]["summary"] == "The third"


def test_a_base_that_nobody_else_has(hub, tmp_path):
    base, _ = eas.load_model(save(tmp_path / "base"))
    net = make_net(model=base)
    with pytest.warns(UserWarning, match=r"was not loaded from the hub .*set net.base.name_or_path = \"user/name\""):
        net.push_to_hub(ADAPTERS)
    assert all(str(tmp_path).encode() not in data for data in hub.files(ADAPTERS).values())
    with pytest.raises(ConfigError, match="does not name its base model; pass it as"):
        load(ADAPTERS)
    assert load(ADAPTERS, base=toys.make_llama()).mask == (0, 2)


def test_what_is_not_there(hub, base_commit, tmp_path):
    base = toys.make_llama()
    before = snapshot(base)
    with pytest.raises(ConfigError, match="there is no folder some/one, and the Hugging Face hub has no such adapters"):
        load("some/one", base=base)
    with pytest.raises(ConfigError, match="has no adapter_config.json, adapter_model.safetensors, mask.json"):
        load(BASE, base=base)  # a model, not adapters; its weights are not downloaded
    assert not any(path.endswith("model.safetensors") for _, path, _ in hub.requests)
    net, _ = push()
    with pytest.raises(ConfigError, match="the Hugging Face hub has no such adapters: .*"):
        load(ADAPTERS, revision="f" * 40, base=base)
    with pytest.raises(EASError, match=f"'{ADAPTERS}' holds adapters of eas_kit: eas_kit.load"):
        eas.load_model(ADAPTERS)
    with pytest.raises(EASError, match="no model 'some/one': .*the Hugging Face hub gave: "):
        eas.load_model("some/one")
    with pytest.raises(HfHubHTTPError):  # as huggingface_hub says it
        net.push_to_hub(ADAPTERS, revision="no-such-branch")
    assert snapshot(base) == before
