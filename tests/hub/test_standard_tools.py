"""transformers, accelerate, PEFT and PyTorch's tools, used as with any model.

What transformers' own common tests of a model check (they are not in its package), and the tools around it. Each
test runs on a model of our own and on one of another architecture with our layers.
"""

from __future__ import annotations

import io
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch._inductor.utils import fresh_cache
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from s2moe import upcycle
from s2moe.data import ByteTokenizer
from s2moe.hub import save_tokenizer
from s2moe.hub.program import export_program
from tests.hub.foreign import foreign
from tests.models.decoder import tiny

VOCABULARY = 256
MODELS = pytest.mark.parametrize("name", ["smoe", "s2moe", "llama", "gpt2"])
COSTLY_MODELS = pytest.mark.parametrize(
    "name", ["smoe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("s2moe", "llama", "gpt2"))]
)
IDS = torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(5))


def build(name: str) -> Any:
    if name in ("llama", "gpt2"):
        dense = foreign(name, vocab_size=VOCABULARY, tie_word_embeddings=name == "gpt2")
        return upcycle(dense, "s2moe", experts=4, experts_per_token=2, noise=0.2).eval()
    return tiny(name, vocab_size=VOCABULARY).eval()


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture
def directory(name: str, tmp_path: Path) -> Path:
    """A saved model with a byte tokenizer."""
    build(name).save_pretrained(tmp_path)
    save_tokenizer(ByteTokenizer(), tmp_path, 64)
    return tmp_path


@MODELS
def test_attention_implementations_agree(name: str) -> None:
    model = build(name)
    wanted = model(IDS).logits
    for implementation in ("eager", "sdpa"):  # flex attention is one for GPUs
        model.set_attn_implementation(implementation)
        close(model(IDS).logits, wanted)


@MODELS
def test_hidden_states_attentions_and_the_forms_of_output(name: str) -> None:
    model = build(name)
    model.set_attn_implementation("eager")
    output = model(IDS, output_hidden_states=True, output_attentions=True, use_cache=True)
    assert [state.shape for state in output.hidden_states] == [(2, 7, 16)] * 4
    assert [attention.shape for attention in output.attentions] == [(2, 4, 7, 7)] * 3
    close(model.lm_head(output.hidden_states[-1]), output.logits)
    for attention in output.attentions:
        close(attention.sum(-1), torch.ones(2, 4, 7))
    plain = model(IDS, return_dict=False)
    assert isinstance(plain, tuple)
    close(plain[0], output.logits)
    model.config.output_hidden_states = model.config.output_attentions = True
    assert len(model(IDS).hidden_states) == 4
    assert len(model(IDS).attentions) == 3


@MODELS
def test_embeddings_can_be_read_replaced_and_resized(name: str) -> None:
    model = build(name)
    wanted = model(IDS).logits
    embedding = model.get_input_embeddings()
    close(model(inputs_embeds=embedding(IDS)).logits, wanted)
    model.resize_token_embeddings(260)
    resized = model(IDS).logits
    assert resized.shape == (2, 7, 260)
    close(resized[..., :VOCABULARY], wanted)
    assert model.config.vocab_size == 260
    model.resize_token_embeddings(VOCABULARY)
    close(model(IDS).logits, wanted)
    if model.config.tie_word_embeddings:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@MODELS
def test_with_and_without_the_cache_and_padding_on_either_side(name: str) -> None:
    model = build(name)
    wanted = model(IDS, use_cache=False)
    assert wanted.past_key_values is None
    first = model(IDS[:, :4], use_cache=True)
    rest = model(IDS[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    close(torch.cat((first.logits, rest.logits), 1), wanted.logits)
    for padding, start in ((3, 3), (0, 0)):
        ids = torch.nn.functional.pad(IDS, (padding, 3 - padding))
        mask = torch.nn.functional.pad(torch.ones_like(IDS), (padding, 3 - padding))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = model(ids, attention_mask=mask, position_ids=positions).logits
        close(padded[:, start : start + 7], wanted.logits)


@MODELS
def test_greedy_search_with_a_batch_a_static_cache_and_without_any(name: str) -> None:
    model = build(name)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(IDS, **given)
    assert torch.equal(model.generate(IDS, **given, cache_implementation="static"), wanted)
    assert torch.equal(model.generate(IDS, **given, use_cache=False), wanted)
    alone = model.generate(IDS[:1, 3:], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(wanted[:1, 3:], alone)


@MODELS
def test_sampling_and_beams(name: str) -> None:
    model = build(name)
    given = {"max_new_tokens": 5, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(model.generate(IDS, do_sample=True, top_p=0.9, temperature=0.8, **given))
    assert torch.equal(*draws)
    assert model.generate(IDS, do_sample=True, num_return_sequences=3, **given).shape == (6, 12)

    def score(sequences: torch.Tensor) -> torch.Tensor:
        log_prob = model(sequences).logits[:, 6:-1].log_softmax(-1)
        return log_prob.gather(-1, sequences[:, 7:, None]).sum((1, 2))

    beams = model.generate(IDS, num_beams=6, do_sample=False, **given)
    greedy = model.generate(IDS, do_sample=False, **given)
    assert (score(beams) >= score(greedy) - 1e-4).all()


@MODELS
def test_the_auto_classes_and_a_pipeline_find_everything_in_a_directory(name: str, directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert type(AutoConfig.from_pretrained(directory)) is type(model.config)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token_id = 0  # bytes have no symbol for padding: any id does, under the attention mask
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["ab", "Zürich is"]
    settings = {"max_new_tokens": 6, "do_sample": False}
    alone = [generate(text, **settings)[0]["generated_text"] for text in texts]
    batched = [made[0]["generated_text"] for made in generate(texts, batch_size=2, **settings)]
    assert batched == alone
    for text, made in zip(texts, alone, strict=True):
        assert made.startswith(text)
        ids = model.generate(**tokenizer(text, return_tensors="pt"), **settings, pad_token_id=0)
        assert made == tokenizer.decode(ids[0], skip_special_tokens=True)


@MODELS
def test_shards_are_spread_by_a_device_map(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    weights = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert {path.name for path in shards} == set(weights.values())
    close(AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")(IDS).logits, model(IDS).logits)
    stem = "transformer.h" if name == "gpt2" else "model.layers"
    places = {
        ".".join(key.split(".")[:3]) if key.startswith(stem) else key.rsplit(".", 1)[0] for key in model.state_dict()
    }
    spread = {place: "disk" if place == f"{stem}.1" else "cpu" for place in places}
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=spread, offload_folder=tmp_path / "offload")
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    close(offloaded(IDS, attention_mask=mask).logits, model(IDS, attention_mask=mask).logits)


@MODELS
def test_lora_on_attention_and_experts(name: str, tmp_path: Path) -> None:
    model = build(name)
    wanted = model(IDS).logits
    lora = peft.LoraConfig(
        r=2,
        lora_alpha=8,
        # PEFT refuses parameters beside GPT-2's kind of linear layer in one adapter.
        target_modules=[] if name == "gpt2" else ["q_proj", "v_proj"],
        target_parameters=["experts.w1", "experts.w2"],
        task_type="CAUSAL_LM",
    )
    tuned = peft.get_peft_model(model, lora).eval()
    close(tuned(input_ids=IDS).logits, wanted)
    learned = [key for key, parameter in tuned.named_parameters() if parameter.requires_grad]
    assert any("experts" in key for key in learned)
    assert name == "gpt2" or any("v_proj" in key for key in learned)
    assert all("lora_" in key for key in learned)
    tuned.train()
    optimizer = torch.optim.SGD([parameter for parameter in tuned.parameters() if parameter.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        tuned(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    for key, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
    tuned.eval()
    got = tuned(input_ids=IDS).logits
    assert (got - wanted).abs().max() > 1e-2
    tuned.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build_again(name, model), tmp_path).eval()
    close(loaded(input_ids=IDS).logits, got)
    merged = loaded.merge_and_unload()
    assert type(merged) is type(model)
    close(merged(IDS).logits, got)


@MODELS
def test_lora_with_the_routers_trained_in_full(name: str) -> None:
    model = build(name)
    wanted = model(IDS).logits
    lora = peft.LoraConfig(r=2, target_modules=["c_attn" if name == "gpt2" else "v_proj"], modules_to_save=["router"])
    tuned = peft.get_peft_model(model, lora)
    close(tuned.eval()(input_ids=IDS).logits, wanted)
    tuned.train()(input_ids=IDS, labels=IDS).loss.backward()
    scores = [p for key, p in tuned.named_parameters() if "modules_to_save" in key and "scores" in key]
    assert len(scores) == 3
    assert all(parameter.grad.any() for parameter in scores)


def build_again(name: str, tuned: Any) -> Any:
    """The base model as it was before LoRA."""
    model = build(name)
    state = {key.replace(".base_layer", ""): value for key, value in tuned.state_dict().items() if "lora_" not in key}
    model.load_state_dict(state)
    return model


@MODELS
def test_activation_checkpointing_changes_no_gradient(name: str) -> None:
    model = build(name).train()
    gradients = []
    for _ in range(2):
        model._forwards = 0
        getattr(model, "model", model)._forwards = 0  # the same noise in both
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        gradients.append({key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None})
        model.activation_checkpointing_enable()
    assert gradients[0].keys() == gradients[1].keys()
    for key in gradients[0]:
        torch.testing.assert_close(*(gradient[key] for gradient in gradients), msg=key)


@COSTLY_MODELS
def test_a_compiled_model_computes_the_same(name: str) -> None:
    """Captured by torch.compile and run by PyTorch; code generation is the slow test's."""
    model = build(name)
    wanted = model(IDS).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    close(compiled(IDS).logits, wanted)
    other = IDS.flip(0, 1)  # which sends other numbers of rows to each expert
    torch._dynamo.config.error_on_recompile = True
    try:
        close(compiled(other).logits, model(other).logits)
    finally:
        torch._dynamo.config.error_on_recompile = False
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smoe", "llama"])
def test_generated_code_computes_the_same_and_learns(name: str) -> None:
    model = build(name)
    torch._dynamo.reset()
    # A kept cache does not ask for which instructions its code was made.
    with fresh_cache() if "ATEN_CPU_CAPABILITY" in os.environ else nullcontext():
        compiled = torch.compile(model)
        close(compiled(IDS).logits, model(IDS).logits)
        model.train()
        compiled(IDS, labels=IDS).loss.backward()
    assert all(value.grad is not None for key, value in model.named_parameters() if "router" in key)
    torch._dynamo.reset()


@COSTLY_MODELS
def test_an_exported_program_computes_the_same_for_any_shape(name: str) -> None:
    model = build(name)
    file = io.BytesIO()
    torch.export.save(export_program(model), file)
    file.seek(0)
    program = torch.export.load(file).module()
    for batch, length in ((2, 7), (3, 11), (1, 1)):
        ids = torch.randint(VOCABULARY, (batch, length))
        mask = torch.ones_like(ids)
        mask[0, : length // 2] = 0
        got, wanted = program(ids, mask), model(ids, attention_mask=mask).logits
        close(got[mask.bool()], wanted[mask.bool()])
    assert not model.training
