"""Several LoRA adapters over one base, chosen by the model's name."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch

from litgpt.__main__ import main
from litgpt.adaptation.lora import LoRASettings, apply_lora, lora_layers, merge_lora, save_lora
from litgpt.generation.engine import Engine, Request
from litgpt.generation.sampling import Sampling
from litgpt.prompts import PromptStyle, save_prompt_style
from litgpt.serving.server import Server
from litgpt.sources.load import load_model
from tests.serving.conftest import running

SETTINGS = {
    "poet": LoRASettings(r=4, projection=True, mlp=True, head=True),
    "clerk": LoRASettings(r=2, key=True, dora=True),
}
MESSAGES = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def adapted(chat_directory, tmp_path_factory):
    """The adapters' directories, and for each model what it answers greedily when it is merged."""
    directories, models = {}, {"tiny-random": load_model(chat_directory, dtype=torch.float32)}
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        model = load_model(chat_directory, dtype=torch.float32)
        apply_lora(model, settings)
        torch.manual_seed(seed)
        for layer in lora_layers(model):
            torch.nn.init.normal_(layer.lora_B, std=0.5)
        directories[name] = tmp_path_factory.mktemp(name)
        weights = {key: value for key, value in model.state_dict().items() if "lora_" in key}
        save_lora(directories[name], weights, settings, str(chat_directory))
        merge_lora(model)
        models[name] = model
    save_prompt_style("alpaca", directories["clerk"])
    return directories, models


def test_each_name_answers_with_its_adapter_and_the_base_is_shared(chat_directory, adapted):
    directories, models = adapted
    with running(chat_directory, adapters=directories) as server:
        tokenizer, expected = server.model.codec.tokenizer, {}
        for name, model in models.items():
            style = PromptStyle.from_name("alpaca") if name == "clerk" else server.model.codec.style
            request = Request(style.encode(tokenizer, MESSAGES), 20, Sampling(0))
            expected[name] = tokenizer.decode(Engine(model).complete([request])[0])
        assert len(set(expected.values())) == 3
        assert [model.id for model in server.client.models.list()] == ["tiny-random", "poet", "clerk"]

        def ask(name: str) -> str:
            options = {"messages": MESSAGES, "temperature": 0, "max_tokens": 20, "extra_body": {"ignore_eos": True}}
            return server.client.chat.completions.create(model=name, **options).choices[0].message.content

        names = [*expected] * 5
        with ThreadPoolExecutor(15) as threads:
            assert list(threads.map(ask, names)) == [expected[name] for name in names]
        server.wait_until_idle()
        base, *others = (engine.model for engine in server.engines)
        for other in others:
            own = {p.data_ptr() for p in other.parameters()} - {p.data_ptr() for p in base.parameters()}
            assert len(own) == sum(len(list(layer.parameters(recurse=False))) for layer in lora_layers(other))
        assert not list(lora_layers(base))
        assert httpx.get(f"{server.url}/health").json()["models"] == ["tiny-random", "poet", "clerk"]
        with pytest.raises(openai.NotFoundError, match="Did you mean 'poet'"):
            ask("poets")


@pytest.fixture
def loaded(monkeypatch):
    """The models that `litgpt serve` with these words loads; they are not served."""
    served = []

    class Caught(Server):
        def serve_on(self, listener):
            listener.close()
            served.extend(self._load())

        def leave(self):
            """The process goes on."""

    def load(*words):
        assert main(["serve", *map(str, words), "--port", "0"]) == 0
        return served

    monkeypatch.setattr("litgpt.serving.server.Server", Caught)
    yield load
    for model in served:
        model.worker.close()


def test_models_of_one_server_share_the_memory_for_their_caches(chat_directory, adapted, loaded, monkeypatch):
    monkeypatch.setattr("litgpt.generation.engine.memory_free", lambda device: 3000)
    words = [word for name, path in adapted[0].items() for word in ("--adapter", f"{name}={path}")]
    assert [model.worker.engine.cache_bytes for model in loaded(chat_directory, *words)] == [500] * 3


def test_an_adapter_of_peft_is_served_as_ours_is(chat_directory, adapted, loaded, tmp_path):
    directories, models = adapted
    assert main(["convert", str(directories["poet"]), str(tmp_path / "peft"), "--to", "peft"]) == 0
    _, served = loaded(chat_directory, "--adapter", f"poet={tmp_path / 'peft'}", "--precision", "32-true")
    served.worker.close()
    request = Request([5, 6, 7], 20, Sampling(0))
    assert served.worker.engine.complete([request]) == Engine(models["poet"]).complete([request])


def test_adapters_that_cannot_be_served_are_refused(chat_directory, adapted, tmp_path, capsys):
    poet = adapted[0]["poet"]
    other = LoRASettings(r=4)
    save_lora(tmp_path, {"transformer.h.0.attn.qkv.lora_A": torch.zeros(8, 7)}, other, "elsewhere")
    for options, message in [
        (["--adapter", "poet"], "--adapter poet is not valid: write NAME=DIR"),
        (["--adapter", f"poet={chat_directory}"], "holds no LoRA weights"),
        (["--adapter", f"poet={poet}", "--adapter", f"poet={poet}"], "two have the same name"),
        (["--adapter", f"tiny-random={poet}", "--port", "0"], "that is the name of the model itself"),
        (["--adapter", f"other={tmp_path}", "--port", "0"], "do not belong to this model"),
    ]:
        assert main(["serve", str(chat_directory), *options]) in (1, 2)
        assert message in capsys.readouterr().err
