"""Models of transformers, tiny and randomly initialised: patched and as they were."""

import copy
import inspect
import io

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from cce_cupy.transformers import patch_transformers  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
VOCAB = 130
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
MODELS = {
    "Llama": {},
    "Llama, tied": {"tie_word_embeddings": True},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {},
    "Gemma2": {"final_logit_softcapping": 3.0},
    "Gemma3, no softcap": {"final_logit_softcapping": None},
    "Mistral": {},
    "Mixtral": {"num_local_experts": 4, "output_router_logits": True},
    "Phi": {"head_dim": None, "num_key_value_heads": 4},
    "Phi3": {"head_dim": None},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 3.0},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **NO_DROPOUT},
    "GPTNeoX": {},
}
CONFIGURATIONS = {"Gemma3": "Gemma3Text"}
CLASSES = {"GPT2": "GPT2LMHeadModel"}


def make(name, dtype=torch.float64, **options):
    kind = name.partition(",")[0]
    config = getattr(transformers, f"{CONFIGURATIONS.get(kind, kind)}Config")
    settings = {**TINY, **MODELS[name], **options}
    settings = {k: v for k, v in settings.items() if v is not None or "softcap" in k}
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES.get(kind, f"{kind}ForCausalLM"))(config(**settings))
    if kind == "Mixtral" and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the default has no float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype).train()


def batch(shape=(2, 12)):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCAB, shape, generator=generator)
    labels = tokens.clone()
    labels[torch.rand(shape, generator=generator) < 0.3] = -100
    return {"input_ids": tokens, "labels": labels}


def evaluate(model, **inputs):
    """Loss and every gradient."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output.loss.detach(), {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_equal(found, expected, rtol=1e-9):
    """Equal within rounding: relative to each gradient's largest entry, sums cancel within it."""
    torch.testing.assert_close(found[0].double(), expected[0].double(), rtol=rtol, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        atol = rtol * max(float(gradient.abs().max()), 1e-3)
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=atol, msg=name)


@pytest.fixture
def unrounded(monkeypatch):
    """Let transformers form the loss in float64 where the model is in float64.

    It rounds logits to float32, which is what a comparison in float64 would see.
    """
    from transformers.loss import loss_utils

    source = inspect.getsource(loss_utils.ForCausalLMLoss)
    assert "logits = logits.float()" in source
    namespace = vars(loss_utils).copy()
    exec(source.replace("logits = logits.float()", ""), namespace)
    monkeypatch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", namespace["ForCausalLMLoss"])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_loss_and_every_gradient(name, dtype, unrounded):
    model, inputs = make(name, dtype), batch()
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    expected = evaluate(model, **inputs)
    items = torch.tensor(37)
    expected_of_items = evaluate(model, **inputs, num_items_in_batch=items)
    undo = patch_transformers(model)
    output = model(**inputs)
    assert output.logits.shape == (*inputs["labels"].shape, 0)
    assert_equal(evaluate(model, **inputs), expected, rtol)
    assert_equal(evaluate(model, **inputs, num_items_in_batch=items), expected_of_items, rtol)
    undo()
    assert_equal(evaluate(model, **inputs), expected, 1e-15)


def test_scale_and_softcap_are_those_of_the_configuration(unrounded):
    for name, expected in (
        ("Llama", (1.0, None)),
        ("Gemma2", (1.0, 3.0)),
        ("Cohere", (0.3, None)),
        ("Granite", (1 / 3, None)),
    ):
        model = make(name)
        patch_transformers(model)
        scale, softcap = model.forward.__self__.treatment
        assert scale == pytest.approx(expected[0], rel=1e-14)
        assert (softcap is None) == (expected[1] is None)
        assert softcap is None or softcap == pytest.approx(expected[1], rel=1e-14)


def test_other_labels_and_ways_of_passing_them(unrounded):
    model, inputs = make("Llama"), batch()
    changed = inputs["labels"].masked_fill(inputs["labels"] == -100, 5)
    calls = [
        {"ignore_index": 5, "labels": changed},
        {"shift_labels": inputs["labels"].roll(-3, -1)},
        {"num_items_in_batch": 7},
    ]
    expected = [evaluate(model, **(inputs | call)) for call in calls]
    patch_transformers(model)
    for call, wanted in zip(calls, expected, strict=True):
        assert_equal(evaluate(model, **(inputs | call)), wanted)
    found = model(inputs["input_ids"], labels=inputs["labels"], return_dict=False)
    assert torch.equal(found[0], model(**inputs).loss)


def test_no_label_that_counts():
    model = make("Llama")
    patch_transformers(model)
    inputs = batch()
    inputs["labels"].fill_(-100)
    loss, gradients = evaluate(model, **inputs)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())
    assert model(input_ids=torch.ones(2, 1).long(), labels=torch.ones(2, 1).long()).loss == 0


def test_without_labels_nothing_changes():
    model, inputs = make("Gemma2").eval(), batch()
    tokens = inputs["input_ids"]
    logits = model(tokens).logits
    words = model.generate(tokens, max_new_tokens=5, do_sample=False)
    patch_transformers(model)
    assert torch.equal(model(tokens).logits, logits)
    model(**inputs)
    assert torch.equal(model(tokens).logits, logits)
    assert torch.equal(model.generate(tokens, max_new_tokens=5, do_sample=False), words)


def test_no_logits_are_formed():
    """Of everything autograd saves, nothing is of the size tokens times vocabulary."""
    model, inputs = make("Gemma2"), batch()
    patch_transformers(model)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: sizes.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
    ):
        model(**inputs)
    assert sizes
    assert not [size for size in sizes if size[-1:] == (VOCAB,) and len(size) > 1]


@pytest.mark.parametrize("settings", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_gradient_checkpointing(settings, unrounded):
    model, inputs = make("Llama"), batch()
    expected = evaluate(model, **inputs)
    model.gradient_checkpointing_enable(settings)
    patch_transformers(model)
    assert_equal(evaluate(model, **inputs), expected)


def test_autocast():
    model, inputs = make("Llama", torch.float32), batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = evaluate(model, **inputs)
        patch_transformers(model, gradient_filter=None)
        # Unpatched, logits are rounded to bfloat16: a relative 2**-8 of each.
        assert_equal(evaluate(model, **inputs), expected, 2.0**-5)


def test_compiled(unrounded):
    model, inputs = make("Gemma2"), batch()
    expected = evaluate(model, **inputs)
    patch_transformers(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(**inputs, use_cache=False).loss
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert_equal((loss.detach(), gradients), expected)


def test_copies_have_a_patch_of_their_own():
    model, inputs = make("Llama"), batch()
    patch_transformers(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    assert other(**inputs).loss != model(**inputs).loss
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    assert torch.equal(again(**inputs).loss, model(**inputs).loss)


def test_undo():
    model, inputs = make("Llama"), batch()
    before = dict(model.__dict__), dict(model.lm_head.__dict__)
    state = set(model.state_dict())
    undo = patch_transformers(model)
    assert set(model.state_dict()) == state
    assert inspect.signature(model.forward) == inspect.signature(type(model)(model.config).forward)
    with pytest.raises(ValueError, match="patched already"):
        patch_transformers(model)
    undo()
    assert (model.__dict__, model.lm_head.__dict__) == before
    assert model(**inputs).logits.shape[-1] == VOCAB
    with pytest.raises(ValueError, match="undone already"):
        undo()
    patch_transformers(model)()


def lora(model, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0} | options)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted.double()


ADAPTERS = {
    "layers": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_peft(adapter, unrounded):
    model, inputs = lora(make("Cohere", tie_word_embeddings=False), **ADAPTERS[adapter]), batch()
    expected = evaluate(model, **inputs)
    assert expected[1]
    with model.disable_adapter(), torch.no_grad():
        plain = model(**inputs).loss
    patch_transformers(model)
    assert_equal(evaluate(model, **inputs), expected)
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(**inputs).loss, plain)


@pytest.mark.parametrize(
    ("options", "reason"), [({"lora_dropout": 0.1}, "dropout"), ({"use_dora": True}, "DoRA")]
)
def test_adapters_that_are_no_change_of_the_weight_are_refused(options, reason):
    model = lora(make("Llama"), target_modules=["lm_head"], **options)
    with pytest.raises(ValueError, match=rf"LlamaForCausalLM cannot be served.*{reason}"):
        patch_transformers(model)


def test_trainer(tmp_path):
    """The Trainer of transformers: accumulation, num_items_in_batch, evaluation; equal losses."""
    pytest.importorskip("accelerate")

    def losses(patched):
        model = make("Qwen2", torch.float32)
        if patched:
            patch_transformers(model)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(patched)),
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=4,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
        )
        rows = [{key: value[0] for key, value in batch((1, 10 + k % 2)).items()} for k in range(16)]
        rows = [{key: value[:10] for key, value in row.items()} for row in rows]
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
        trainer.train()
        history = trainer.state.log_history
        return [row[key] for row in history for key in ("loss", "eval_loss") if key in row]

    found, expected = losses(True), losses(False)
    assert len(found) >= 5
    assert found == pytest.approx(expected, rel=1e-4)


def refuse(model, reason, error=ValueError, **options):
    with pytest.raises(error, match=reason):
        patch_transformers(model, **options)


def test_what_cannot_be_served_is_refused():
    refuse(torch.nn.Linear(2, 3), "got torch.nn.modules.linear.Linear", TypeError)
    refuse(torch.nn.DataParallel(make("Llama")), "before it is wrapped", TypeError)
    refuse(make("Llama"), "reduction is not an option", TypeError, reduction="sum")
    refuse(transformers.LlamaModel(make("Llama").config), "no head")
    small = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": VOCAB}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**small))
    refuse(t5, "an encoder with a decoder")

    class Other(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = make("Llama")
    model.lm_head = Other(32, VOCAB)
    refuse(model, r"its head is a .*Other; accepted are torch.nn.Linear")

    class Clamped(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = self.lm_head(self.model(input_ids).last_hidden_state).clamp(-5, 5)
            return (self.loss_function(logits, labels, self.vocab_size, **kwargs),)

    refuse(Clamped(make("Llama").config), "neither a scale nor a softcap")

    class Inline(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None):
            logits = self.lm_head(self.model(input_ids).last_hidden_state)
            return torch.nn.functional.cross_entropy(logits[0], labels[0])

    refuse(Inline(make("Llama").config), "does not hand its logits to self.loss_function")
    model = make("Llama")
    model.loss_function = lambda logits, labels, **_: logits.mean()
    refuse(model, "not the cross-entropy of labels shifted by one")
    assert "_loss_function" in model.__dict__
