"""What people hand over by mistake is named in one line, before any work is done."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import toys

import eas_kit as eas
from eas_kit.errors import ConfigError, MergeError, PromptError, TaskError, UnsupportedModelError
from eas_kit.probe import single_site_sweep


@pytest.fixture(scope="module")
def net():
    return eas.attach(toys.make_llama(), eas.EASConfig(skip_rank=6, adapt_rank=4))


@pytest.mark.parametrize(
    "wrong,error,message",
    [
        (
            lambda net: ((net.base, None),),
            UnsupportedModelError,
            r"got a tuple: load_model returns \(model, processor\)",
        ),
        (lambda net: ("folder",), UnsupportedModelError, "wanted a model, got a str: load it with load_model first"),
        (lambda net: (net,), ConfigError, "is attached already"),
        (lambda net: (toys.make_llama(), {"skip_rank": 4}), ConfigError, r"wanted an EASConfig, got a dict: EASConfig"),
        (lambda net: (toys.make_llama(), {}), ConfigError, r"wanted an EASConfig, got a dict: EASConfig"),
    ],
    ids=["tuple", "name", "attached", "settings", "no settings"],
)
def test_attach(net, wrong, error, message):
    with pytest.raises(error, match=message):
        eas.attach(*wrong(net))


def test_generate_wants_token_ids(net):
    prompts = toys.make_prompts(images=None)
    for wrong, kind in (("hello", "str"), (["hello"], "list"), (prompts, "dict")):
        with pytest.raises(PromptError, match=rf"got a {kind}: .*processor or tokenizer.*generate\(\*\*inputs\)"):
            net.generate(wrong)
    with pytest.raises(PromptError, match="wanted token ids"):
        net.generate(input_ids="hello")
    assert net.generate(prompts["input_ids"], max_new_tokens=1).shape == (3, 12)


def test_check_merge_wants_a_mapping(net):
    with pytest.raises(MergeError, match="wanted the processor's inputs .a mapping with input_ids., got a Tensor"):
        eas.check_merge(net, toys.make_prompts(images=None)["input_ids"])


CALLS = {
    "fit": (eas.fit, ("train", "collate")),
    "search": (eas.search, ("train", "search", "collate")),
    "static_merge": (eas.static_merge, ("train", "collate", "evaluate", "val")),
    "probe_redundancy": (eas.probe_redundancy, ("score",)),
    "single_site_sweep": (single_site_sweep, ("score",)),
}


@pytest.mark.parametrize("name", CALLS)
def test_task_that_lacks_what_is_needed(net, name):
    """Every needed part is missed, and the others are not."""
    call, parts = CALLS[name]
    for missing in parts:
        task = SimpleNamespace(**{part: [] for part in parts if part != missing})
        with pytest.raises(TaskError, match=rf"{name}: .*this SimpleNamespace has no {missing}\. .*data/README.md"):
            call(net, task)
    with pytest.raises(TaskError, match=f"this str has no {', '.join(parts)}"):
        call(net, "definitions")
