import copy
import inspect

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.kernels.compare import assert_bitwise_equal, assert_two_references
from umedtrain.kernels import _dispatch
from umedtrain.kernels.patch import patch_llama, unpatch_llama

transformers = pytest.importorskip("transformers")
modeling_llama = pytest.importorskip("transformers.models.llama.modeling_llama")

VOCAB = 131


def config(**changed):
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return transformers.LlamaConfig(**sizes | changed)


def llama(dtype=torch.float32, kind=transformers.LlamaForCausalLM, **changed):
    torch.manual_seed(4)
    model = kind(config(**changed)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4.0)  # the library starts near zero, where logits say little
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model


def batch(rows=2, tokens=11):
    """Ids, a mask with padding on the left of the last row, labels without the padding and without a prompt."""
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    ids[-1, :3] = mask[-1, :3] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_and_gradients(model, **inputs):
    model.train()
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_near(ours, theirs, relative=1e-6, name="result"):
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max(), name


@pytest.mark.parametrize(
    "extra",
    (
        {},
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"ignore_index": 5},
        {"shift_labels": batch()["labels"].roll(-1, 1)},
    ),
    ids=lambda extra: ",".join(extra) or "mean",
)
def test_same_loss_and_gradients(extra):
    model, inputs = llama(), {**batch(), **extra}
    if "ignore_index" in extra:
        inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == -100, 5)
    theirs, their_gradients = loss_and_gradients(model, **inputs)
    ours, our_gradients = loss_and_gradients(patch_llama(model), **inputs)
    assert ours.logits is None
    assert ours.loss.dtype == torch.float32
    assert_near(ours.loss, theirs.loss, name="loss")
    for name, theirs in their_gradients.items():
        assert_near(our_gradients[name], theirs, 2e-6, name)


def test_kernels_give_what_the_twins_give(monkeypatch):
    model, inputs = patch_llama(llama(num_hidden_layers=1)), batch(rows=2, tokens=5)
    twin, twin_gradients = loss_and_gradients(model, **inputs)
    monkeypatch.setenv(_dispatch.VARIABLE, "triton")
    kernel, kernel_gradients = loss_and_gradients(model, **inputs)
    assert_near(kernel.loss, twin.loss, 1e-5)
    for name, gradient in twin_gradients.items():
        assert_near(kernel_gradients[name], gradient, 1e-5, name)


def test_evaluation_gives_logits_and_loss():
    model, inputs = llama().eval(), batch()
    with torch.no_grad():
        theirs = model(**inputs)
        ours = patch_llama(model)(**inputs)
        assert_near(ours.logits, theirs.logits)
        assert_near(ours.loss, theirs.loss)
        assert_near(
            model(inputs["input_ids"], logits_to_keep=1).logits,
            unpatch_llama(model)(inputs["input_ids"]).logits[:, -1:],
        )


def test_logits_with_labels():
    model, inputs = llama(), batch()
    theirs, their_gradients = loss_and_gradients(model, **inputs)
    ours, our_gradients = loss_and_gradients(patch_llama(model, logits_with_labels=True), **inputs)
    assert_near(ours.logits, theirs.logits)
    assert_near(ours.loss, theirs.loss)
    assert_near(our_gradients["lm_head.weight"], their_gradients["lm_head.weight"])


def test_tuples_and_the_output_of_layers():
    model, inputs = patch_llama(llama()), batch()
    loss, cache = model(**inputs, return_dict=False, use_cache=True)
    assert loss == model(**inputs).loss
    assert cache.get_seq_length() == 11
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == 3


def test_tied_head():
    model, inputs = llama(tie_word_embeddings=True), batch()
    _, theirs = loss_and_gradients(model, **inputs)
    _, ours = loss_and_gradients(patch_llama(model), **inputs)
    assert_near(ours["model.embed_tokens.weight"], theirs["model.embed_tokens.weight"], 2e-6)


def test_bf16_norm_and_mlp_bit_for_bit():
    model = llama(torch.bfloat16)
    x = torch.randn(3, 7, 32).bfloat16()
    layer = model.model.layers[0]
    theirs = layer.input_layernorm(x), layer.mlp(x)
    patch_llama(model)
    for ours, their in zip((layer.input_layernorm(x), layer.mlp(x)), theirs, strict=True):
        assert_bitwise_equal(ours.detach(), their.detach())


def test_bf16_is_as_exact_as_the_library():
    inputs = batch()
    exact, theirs, ours = llama().bfloat16().double(), llama(torch.bfloat16), patch_llama(llama(torch.bfloat16))
    references = [loss_and_gradients(model, **inputs) for model in (exact, theirs)]
    loss, gradients = loss_and_gradients(ours, **inputs)
    assert (
        abs(loss.loss.double() - references[0][0].loss) <= 2 * abs(references[1][0].loss - references[0][0].loss) + 1e-3
    )
    for name, gradient in gradients.items():
        assert_two_references(gradient, references[0][1][name], references[1][1][name], name=name)
    with torch.no_grad():
        logits = [model.eval()(inputs["input_ids"]).logits for model in (ours, exact, theirs)]
    assert_two_references(*logits, name="logits")


def test_autocast():
    """fp32 weights, matrix products in bf16: the head's too."""
    model, inputs = llama(), batch()
    _, exact = loss_and_gradients(model, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, their_gradients = loss_and_gradients(model, **inputs)
        ours, our_gradients = loss_and_gradients(patch_llama(model), **inputs)
    assert_near(ours.loss, theirs.loss, 2e-3)
    for name, gradient in our_gradients.items():
        error, their_error = (abs(g - exact[name]).max() for g in (gradient, their_gradients[name]))
        assert gradient.dtype == torch.float32
        assert error <= 2 * their_error + 2**-8 * exact[name].abs().max(), name


def test_gradient_checkpointing():
    model, inputs = patch_llama(llama()), batch()
    plain, gradients = loss_and_gradients(model, **inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, checkpointed = loss_and_gradients(model, **inputs, use_cache=False)
    assert_bitwise_equal(plain.loss, again.loss)
    for name in gradients:
        assert_bitwise_equal(gradients[name], checkpointed[name], name)


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
def test_generate(attention):
    model, inputs = llama(attn_implementation=attention).eval(), batch()
    del inputs["labels"]
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    theirs = model.generate(**inputs, **settings)
    ours = patch_llama(model).generate(**inputs, **settings)
    assert torch.equal(theirs, ours)


def test_compiles_into_one_graph():
    model, inputs = patch_llama(llama(num_hidden_layers=1)).train(), batch()
    want = model(**inputs)
    torch._dynamo.reset()
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs)
    assert_near(got.loss, want.loss)
    gradients = [torch.autograd.grad(output.loss, list(model.parameters())) for output in (want, got)]
    for theirs, ours in zip(*gradients, strict=True):
        assert_near(ours, theirs)


def test_unpatching_leaves_nothing():
    model, other, inputs = llama(), llama(), batch()
    before = [dict(vars(module)) for module in model.modules()]
    forwards = [getattr(modeling_llama, name).forward for name in ("LlamaAttention", "LlamaMLP", "LlamaRMSNorm")]
    theirs, their_gradients = loss_and_gradients(model, **inputs)
    patch_llama(model)
    assert forwards == [
        getattr(modeling_llama, name).forward for name in ("LlamaAttention", "LlamaMLP", "LlamaRMSNorm")
    ]
    assert all("forward" not in vars(module) for module in other.modules())
    loss_and_gradients(model, **inputs)
    assert unpatch_llama(model) is model
    again, gradients = loss_and_gradients(model, **inputs)
    assert_bitwise_equal(theirs.loss.detach(), again.loss.detach())
    assert_bitwise_equal(theirs.logits.detach(), again.logits.detach())
    for name in gradients:
        assert_bitwise_equal(gradients[name], their_gradients[name], name)
    for module, attributes in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == attributes.keys()


def test_a_forward_of_its_own_is_called_and_given_back():
    model, inputs, calls = llama().eval(), batch(), []
    own = model.forward

    def forward(self, *args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    model.forward = bound = forward.__get__(model)
    patch_llama(model)
    model(**inputs)
    assert calls
    assert unpatch_llama(model).forward is bound


def test_names_weights_signature_and_copies_stay():
    model, inputs = llama(), batch()
    names, signature = list(model.state_dict()), inspect.signature(model.forward)
    patch_llama(model)
    assert list(model.state_dict()) == names
    assert inspect.signature(model.forward) == signature
    twin = copy.deepcopy(model)
    ours, theirs = (loss_and_gradients(m, **inputs) for m in (model, twin))
    assert_bitwise_equal(ours[0].loss.detach(), theirs[0].loss.detach())
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert loss_and_gradients(twin, **inputs)[0].loss != ours[0].loss
    assert "forward" not in vars(unpatch_llama(twin).lm_head)
    assert "forward" in vars(model.lm_head)


def test_where_the_library_is_left_to_it():
    model, inputs = patch_llama(llama()).train(), batch()
    assert model(inputs["input_ids"]).logits is not None
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    assert model(**inputs).loss == model(**inputs).logits.sum()
    model = patch_llama(llama())
    model.lm_head = torch.nn.Sequential(model.lm_head)  # as an adapter would
    assert model(**inputs).logits is not None
    biased = llama()
    biased.lm_head.bias = torch.nn.Parameter(torch.randn(VOCAB))
    assert_near(patch_llama(biased)(**inputs).loss, unpatch_llama(biased)(**inputs).loss)


def test_other_llamas():
    ids = batch()["input_ids"]
    for kind, what in (
        (transformers.LlamaModel, "last_hidden_state"),
        (transformers.LlamaForSequenceClassification, "logits"),
    ):
        model = llama(kind=kind).eval()
        with torch.no_grad():
            theirs = model(ids)[what]
            ours = patch_llama(model)(ids)[what]
        assert_near(ours, theirs)
        assert_bitwise_equal(unpatch_llama(model)(ids)[what].detach(), theirs)
    wrapped = torch.nn.ModuleDict({"policy": llama()})
    patch_llama(wrapped)
    assert wrapped["policy"](**batch()).logits is None


def test_long_context_scaling():
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = llama(rope_parameters=rope | {"original_max_position_embeddings": 16}).eval()
    with torch.no_grad():
        theirs = model(batch()["input_ids"]).logits
        assert_near(patch_llama(model)(batch()["input_ids"]).logits, theirs)


def test_fsdp2_with_the_head_sharded_by_itself():
    inputs = batch()
    want, gradients = loss_and_gradients(patch_llama(llama()), **inputs)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, model = init_device_mesh("cpu", (1,)), patch_llama(llama())
        for module in (*model.model.layers, model.lm_head, model):
            fully_shard(module, mesh=mesh)
        loss = model(**inputs).loss
        loss.backward()
        assert_near(loss, want.loss)
        for name, parameter in model.named_parameters():
            assert_near(parameter.grad.full_tensor(), gradients[name], 1e-6, name)
    finally:
        dist.destroy_process_group()


def test_errors():
    model = patch_llama(llama())
    for part in (model, model.model, torch.nn.ModuleList([model])):
        with pytest.raises(ValueError, match="patched already"):
            patch_llama(part)
    for part in (model.model, llama()):
        with pytest.raises(ValueError, match="model is not patched"):
            unpatch_llama(part)
    assert model(**batch()).logits is None
    gelu = llama(hidden_act="gelu")
    with pytest.raises(ValueError, match="hidden_act is 'gelu'; it must be 'silu'"):
        patch_llama(gelu)
    assert all("forward" not in vars(module) for module in gelu.modules())
    with pytest.raises(ValueError, match="Linear and contains no module of a transformers Llama"):
        patch_llama(torch.nn.Linear(2, 2))
