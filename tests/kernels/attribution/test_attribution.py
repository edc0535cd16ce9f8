"""handle.attribute against gradients that autograd retains on every tensor, one sample at a time."""

from types import MappingProxyType

import pytest
import torch
import transformers

import ssiuu_kernels as sk

from ...support.models import FAMILIES, NAN_LEFT_PADDED, PARTS, logits_of, tiny_batch, tiny_model

# Of one sample: what its neurons are credited with, from its log-probabilities and logits at the answer's tokens
# `[T, V]`, these tokens, and those of a wrong answer, which parts from it at its third.
TARGETS = {
    "prob": lambda p, z, answer, other: at(p, answer).sum().exp(),
    "geometric_mean_prob": lambda p, z, answer, other: at(p, answer).mean().exp(),
    "log_prob": lambda p, z, answer, other: at(p, answer).sum(),
    "logit": lambda p, z, answer, other: at(z, answer).sum(),
    "margin": lambda p, z, answer, other: z[2, answer[2]] - z[2, other[2]],
}


def at(rows, tokens):
    return torch.stack([row[token] for row, token in zip(rows, tokens, strict=True)])


def with_other_labels(batch):
    """The same batch with a wrong answer to each sample, which differs from its third token on and ends after it."""
    other = batch["labels"].clone()
    for labels in other:
        third, fourth = (labels != -100).nonzero().flatten()[2:4]
        labels[third], labels[fourth] = labels[third] % 60 + 1, -100
    return {**batch, "other_labels": other}


def captured_tensors(model, family):
    """(name, kinds) -> tensor with retained gradient, filled by the next forward; from hooks on an unpatched model."""
    tensors = {}

    def keep(key):
        def hook(_module, _args, z):
            z.retain_grad()
            tensors[key] = z
            return z.clone()  # what Falcon then adds to in place is not z

        return hook

    for name, module in model.named_modules():
        for path, kinds in PARTS[family].items():
            if name.endswith(f".{path}"):
                owner = name.rpartition(".")[0]
                module.register_forward_hook(keep((owner, kinds)))
    return tensors


def brute_force(model, family, batch, target):
    """(name, kind) -> `[B, S, width]` attributions, zero on padding, in float64."""
    tensors, found = captured_tensors(model, family), {}
    for sample in range(len(batch["labels"])):
        one = {name: tensor[sample : sample + 1] for name, tensor in batch.items()}
        places = (one["labels"][0] != -100).nonzero().flatten()
        rows = logits_of(model, one)[0, places - 1]
        answer, other = (labels[0, places].tolist() for labels in (one["labels"], one["other_labels"]))
        TARGETS[target](rows.log_softmax(-1), rows, answer, other).backward()
        for (owner, kinds), z in tensors.items():
            product = (z * z.grad).detach().reshape(-1, z.shape[-1])[one["attention_mask"][0].bool()]
            halves = product.chunk(2, dim=-1) if isinstance(kinds, tuple) else [product]
            for kind, half in zip(kinds if isinstance(kinds, tuple) else [kinds], halves, strict=True):
                found.setdefault((owner, kind), []).append(half)
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_brute_force(family, padding, target):
    if padding == "left" and family in NAN_LEFT_PADDED:
        pytest.skip("the model's logits are NaN")
    model, batch = tiny_model(family, torch.float64), with_other_labels(tiny_batch(padding))
    with sk.patch(model, scope="all") as handle:
        found = handle.attribute(batch, target)
    expected = brute_force(model, family, batch, target)
    assert {(name, kind) for name, kinds in found.items() for kind in kinds} == set(expected)
    for (name, kind), samples in expected.items():
        scores = found[name][kind]
        for sample, product in enumerate(samples):
            wanted = torch.stack([product.amax(0), product.amin(0), product.sum(0)])
            actual = torch.stack([part[sample] for part in scores])
            # transformers normalises in float32 whatever the model's type, and scaling before or after it rounds apart.
            assert (actual - wanted).norm() <= 1e-6 * wanted.norm(), (name, kind, sample)


def test_float32_on_native():
    model, batch = tiny_model(), with_other_labels(tiny_batch())
    with sk.patch(model, scope="all", backend="native") as handle:
        found = handle.attribute(batch)
    expected = brute_force(model.double(), "llama", batch, "prob")
    for (name, kind), samples in expected.items():
        wanted = torch.stack([product.sum(0) for product in samples])
        actual = found[name][kind].sum
        assert actual.dtype == torch.float32
        assert (actual - wanted).norm() / wanted.norm() < 1e-4, (name, kind)


def test_modules_come_in_the_model_s_order():
    model = tiny_model()
    with sk.patch(model, scope="all") as handle:
        found = list(handle.attribute(tiny_batch()))
    assert found == [f"model.layers.{layer}.{part}" for layer in range(2) for part in ("self_attn", "mlp")]


def test_scope_mlp_has_the_mlps_alone():
    with sk.patch(tiny_model()) as handle:
        found = handle.attribute(tiny_batch())
    assert {name: set(kinds) for name, kinds in found.items()} == {
        f"model.layers.{layer}.mlp": {"h", "gate"} for layer in range(2)
    }


def forward_hooks(model):
    return [list(module._forward_hooks) for module in model.modules()]


def test_leaves_the_model_as_it_was():
    model = tiny_model()
    model.lm_head.weight.requires_grad_(False)
    handle = sk.patch(model, scope="all")
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    hooks = forward_hooks(model)
    handle.attribute(tiny_batch())
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert all(parameter.grad is None for parameter in model.parameters())
    assert forward_hooks(model) == hooks


def test_a_failure_inside_leaves_the_model_as_it_was():
    model, batch = tiny_model(), tiny_batch()
    handle = sk.patch(model, scope="all")
    batch["input_ids"] = batch["input_ids"] + 1000
    hooks = forward_hooks(model)
    with pytest.raises(IndexError):
        handle.attribute(batch)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert forward_hooks(model) == hooks


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_with_gradient_checkpointing(use_reentrant):
    model, batch = tiny_model(), tiny_batch()
    handle = sk.patch(model, scope="all")
    expected = handle.attribute(batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    found = handle.attribute(batch)
    for name, kinds in expected.items():
        for kind, scores in kinds.items():
            assert torch.allclose(found[name][kind].sum, scores.sum, rtol=1e-5, atol=1e-12)


def test_mask_with_holes():
    batch = tiny_batch()
    batch["attention_mask"][2, 3] = 0
    with pytest.raises(ValueError, match="sample 2 has holes"):
        sk.patch(tiny_model()).attribute(batch)


def test_unpatched_handle():
    handle = sk.patch(tiny_model())
    handle.unpatch()
    with pytest.raises(ValueError, match="unpatched"):
        handle.attribute(tiny_batch())


@pytest.mark.parametrize("target", ["logit", "margin"])
def test_the_other_targets_of_samples_that_cannot_be_followed_are_proved(target):
    model, batch = tiny_model(), with_other_labels(tiny_batch())
    expected = brute_force(model, "llama", batch, target)
    model.model.layers[1].register_forward_hook(lambda _module, _args, x: Doubled.apply(x) / 2)
    with sk.patch(model, scope="all") as handle:
        found = handle.attribute(batch, target)
    for (name, kind), samples in expected.items():
        wanted = torch.stack([product.sum(0) for product in samples])
        assert (found[name][kind].sum - wanted).norm() <= 1e-4 * wanted.norm(), (name, kind)


@pytest.mark.parametrize("target", ["logit", "margin"])
def test_the_other_targets_of_a_model_that_mixes_samples_are_refused(target):
    batch = with_other_labels(tiny_batch())
    del batch["attention_mask"]
    with sk.patch(Plain(lambda x: x - x.mean(0))) as handle, pytest.raises(ValueError, match="mixes samples"):
        handle.attribute(batch, target)


def test_a_label_that_is_never_predicted_has_no_margin():
    model, batch = tiny_model(), with_other_labels(tiny_batch())
    with sk.patch(model) as handle:
        expected = handle.attribute(batch, "margin")["model.layers.0.mlp"]["h"].sum
        batch["labels"][:, 0], batch["other_labels"][:, 0] = 1, 2
        assert torch.equal(handle.attribute(batch, "margin")["model.layers.0.mlp"]["h"].sum, expected)


def test_a_margin_is_not_of_the_scale_of_the_probability():
    """Adding to every logit changes neither; making the answer impossible changes `prob` alone to nothing."""
    model, batch = tiny_model("opt", tie_word_embeddings=False), with_other_labels(tiny_batch())
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(61))
    unused = next(token for token in range(61) if not (batch["labels"] == token).any())
    found = []
    for bias in (0.0, 200.0):
        model.lm_head.bias.data[unused] = bias
        with sk.patch(model) as handle:
            found.append([handle.attribute(batch, t)["model.decoder.layers.0"]["h"].sum for t in ("margin", "prob")])
    (margin, prob), (margin_after, prob_after) = found
    assert torch.equal(margin, margin_after)
    assert prob.abs().max() > 0 == prob_after.abs().max()


BAD_OTHER_LABELS = {
    r"target='margin' needs other_labels in the batch": lambda labels: None,
    r"other_labels has shape \[4, 10\] and labels \[4, 11\]": lambda labels: labels[:, 1:],
    r"other_labels of samples \[0, 1, 2, 3\] do not part": lambda labels: labels,
    r"other_labels of samples \[2\] do not part": lambda labels: shorter(labels, 2),
    r"other_labels is torch.int32": lambda labels: labels.int(),
    r"labels has the token 61": lambda labels: labels.where(labels < 0, 61),
}


def shorter(labels, sample):
    """Another answer to every sample but one, where it is the start of the answer."""
    other = labels.where(labels < 0, labels % 60 + 1)
    other[sample] = labels[sample]
    other[sample, (labels[sample] != -100).nonzero().flatten()[-1]] = -100
    return other


@pytest.mark.parametrize(("message", "change"), BAD_OTHER_LABELS.items())
def test_a_wrong_answer_that_cannot_be_compared_is_refused(message, change):
    batch = tiny_batch()
    other = change(batch["labels"])
    with sk.patch(tiny_model()) as handle, pytest.raises((ValueError, TypeError), match=message):
        handle.attribute(batch if other is None else {**batch, "other_labels": other}, "margin")


def test_unknown_target():
    with pytest.raises(ValueError, match="likelihood"):
        sk.patch(tiny_model()).attribute(tiny_batch(), target="likelihood")


def per_sample(model, batch, options):
    """Attribution of one sample at a time, which cannot mix, stacked."""
    with sk.patch(model, **options) as handle:
        ones = [handle.attribute({k: v[b : b + 1] for k, v in batch.items()}, "log_prob") for b in range(4)]
    places = [(name, kind) for name, kinds in ones[0].items() for kind in kinds]
    return {(name, kind): torch.cat([one[name][kind].sum for one in ones]) for name, kind in places}


def assert_equals_per_sample(model, batch, options=MappingProxyType({"scope": "all"})):
    expected = per_sample(model, batch, options)
    with sk.patch(model, **options) as handle:
        found = handle.attribute(batch, "log_prob")
    assert {(name, kind) for name, kinds in found.items() for kind in kinds} == set(expected)
    for (name, kind), wanted in expected.items():
        assert (found[name][kind].sum - wanted).norm() <= 1e-4 * wanted.norm(), (name, kind)
    return found


def test_position_ids_reach_the_model():
    model, batch = tiny_model("gpt2"), tiny_batch()
    with sk.patch(model) as handle:
        plain = handle.attribute(batch)
        shifted = {**batch, "position_ids": torch.arange(11).expand(4, 11) + 7}
        found = handle.attribute(shifted)
    found, plain = (scores["transformer.h.0.mlp"]["h"].sum for scores in (found, plain))
    assert (found - plain).norm() > 1e-3 * plain.norm()
    assert_equals_per_sample(model, shifted)


def test_embeddings_in_place_of_ids():
    model, batch = tiny_model(), tiny_batch()
    with sk.patch(model, scope="all") as handle:
        expected = handle.attribute(batch)
        embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach()
        found = handle.attribute({**batch, "inputs_embeds": embeds})
    for name, kinds in expected.items():
        for kind, scores in kinds.items():
            assert torch.equal(found[name][kind].sum, scores.sum)


class Plain(torch.nn.Module):
    """A language model of nobody's library, whose forward takes the ids alone and gives the logits."""

    def __init__(self, mix=None):
        super().__init__()
        inner = tiny_model("llama")
        self.tokens, self.norm = inner.model.embed_tokens, inner.model.norm
        self.mlps = torch.nn.ModuleList(layer.mlp for layer in inner.model.layers)
        self.head = inner.lm_head
        self.mix = mix or (lambda x: x)

    def forward(self, input_ids):
        x = self.tokens(input_ids)
        for mlp in self.mlps:
            x = x + self.mix(mlp(self.norm(x)).cumsum(1))
        return self.head(x)


class PlainTuple(Plain):
    def forward(self, input_ids):
        return super().forward(input_ids), None


def test_a_model_of_nobody_s_library():
    model, batch = PlainTuple(), tiny_batch()
    del batch["attention_mask"]
    assert_equals_per_sample(model, batch)


def test_a_tuple_of_transformers():
    batch = tiny_batch()
    with sk.patch(tiny_model()) as handle:
        expected = handle.attribute(batch)["model.layers.1.mlp"]["h"].sum
        assert torch.equal(handle.attribute({**batch, "return_dict": False})["model.layers.1.mlp"]["h"].sum, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3"], ids=["tied", "scaled"])
def test_frozen_embeddings(family):
    model = tiny_model(family)
    model.get_input_embeddings().weight.requires_grad_(False)
    assert_equals_per_sample(model, tiny_batch())


def test_embeddings_written_to_in_place():
    model, batch = tiny_model(), tiny_batch()
    expected = assert_equals_per_sample(model, batch)
    model.model.layers[0].register_forward_pre_hook(lambda _module, args: (args[0].mul_(1),))
    found = assert_equals_per_sample(model, batch)
    assert torch.equal(found["model.layers.0.mlp"]["h"].sum, expected["model.layers.0.mlp"]["h"].sum)


MIXED = {
    "mean over the batch": lambda x: x - x.mean(0),
    "another order": lambda x: x.flip(0),
    "two samples exchanged": lambda x: x[[0, 2, 1, 3]],
    "attention across samples": lambda x: torch.softmax(x @ x.mT, -1) @ x.flip(0),
    "a little of another": lambda x: x + 0.02 * x.roll(1, 0),
}


@pytest.mark.parametrize("mix", MIXED.values(), ids=MIXED)
def test_a_model_that_mixes_samples_is_refused(mix):
    batch = tiny_batch()
    del batch["attention_mask"]
    with sk.patch(Plain(mix)) as handle, pytest.raises(ValueError, match="mixes samples"):
        handle.attribute(batch)


class TimeMajor(Plain):
    def forward(self, input_ids):
        x = self.tokens(input_ids).transpose(0, 1)
        for mlp in self.mlps:
            x = x + mlp(self.norm(x)).cumsum(0)
        return self.head(x).transpose(0, 1)


@pytest.mark.parametrize(("samples", "message"), [(4, r"rows \[11, 4\]; expected"), (11, "mixes samples")])
def test_rows_in_another_order_are_refused(samples, message):
    """Where the sizes tell, and where the batch is as long as its samples."""
    batch = tiny_batch(samples=samples)
    del batch["attention_mask"]
    with sk.patch(TimeMajor()) as handle, pytest.raises(ValueError, match=message):
        handle.attribute(batch)


class Doubled(torch.autograd.Function):
    """An operation that is not known: it keeps samples apart, and only a proof can tell."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


@pytest.mark.parametrize("known", [True, False])
def test_rows_that_cannot_be_followed_are_proved_for_every_batch(known):
    model, passes = tiny_model(), []

    def watch(_module, _args, logits):
        logits.register_hook(lambda _grad: passes.append(1))

    model.lm_head.register_forward_hook(watch)
    if not known:
        model.model.layers[1].register_forward_hook(lambda _module, _args, x: Doubled.apply(x))
    with sk.patch(model) as handle:
        for batch, proved in ((tiny_batch(), True), (tiny_batch(), True), (tiny_batch(samples=1), False)):
            passes.clear()
            handle.attribute(batch)
            assert len(passes) == 1 + (proved and not known)


@pytest.mark.parametrize(
    ("compiled", "backend"), [("model", "eager"), ("model.layers.1", "aot_eager"), ("model.layers.0.mlp", "aot_eager")]
)
def test_compiled_modules_are_attributed(compiled, backend):
    torch._dynamo.reset()
    model, batch = tiny_model(), tiny_batch()
    handle = sk.patch(model, scope="all")
    expected = handle.attribute(batch)
    module = model if compiled == "model" else model.get_submodule(compiled)
    module.compile(backend=backend)
    with torch.no_grad():
        logits_of(model, batch)
    found = handle.attribute(batch)
    assert {name: set(kinds) for name, kinds in found.items()} == {name: set(kinds) for name, kinds in expected.items()}
    for name, kinds in expected.items():
        for kind, scores in kinds.items():
            assert torch.allclose(found[name][kind].sum, scores.sum, rtol=1e-4, atol=1e-12)


def without_gradients(model):
    layer = model.model.layers[0]
    layer.forward = torch.no_grad()(layer.forward)


def detached(model):
    model.model.layers[1].register_forward_pre_hook(lambda _module, args: (args[0].detach(), *args[1:]))


@pytest.mark.parametrize("cut", [without_gradients, detached])
def test_a_module_that_no_gradient_comes_back_to(cut):
    model = tiny_model()
    cut(model)
    with sk.patch(model) as handle, pytest.raises(ValueError, match=r"layers\.0\.mlp got no gradient back"):
        handle.attribute(tiny_batch())


def test_hooks_on_an_activation_are_refused_by_name():
    model, calls = tiny_model(), []
    handle = sk.patch(model)
    model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp cannot be attributed: its act_fn carries hooks"):
        handle.attribute(tiny_batch())


def test_nothing_to_attribute():
    handle = sk.patch(torch.nn.Sequential(torch.nn.Embedding(61, 8), torch.nn.Linear(8, 61)), scope="all")
    with pytest.raises(ValueError, match="nothing to attribute"):
        handle.attribute(tiny_batch())


def bad(**changes):
    return lambda batch: {**batch, **{key: change(batch) for key, change in changes.items()}}


BAD_BATCHES = {
    r"attention_mask has shape \[4, 1, 11, 11\]; expected that of labels": bad(
        attention_mask=lambda batch: torch.ones(4, 1, 11, 11)
    ),
    "attention_mask has other values than 0 and 1": bad(attention_mask=lambda batch: torch.full((4, 11), -1e9)),
    "batch has input_ids, attention_mask; expected input_ids": lambda batch: {
        key: value for key, value in batch.items() if key != "labels"
    },
    "batch has labels; expected input_ids": lambda batch: {"labels": batch["labels"]},
}


@pytest.mark.parametrize(("message", "change"), BAD_BATCHES.items(), ids=BAD_BATCHES)
def test_bad_batches(message, change):
    with sk.patch(tiny_model()) as handle, pytest.raises(ValueError, match=message):
        handle.attribute(change(tiny_batch()))


def test_keys_that_the_model_does_not_take_are_refused():
    batch = tiny_batch()
    with sk.patch(PlainTuple()) as handle:
        with pytest.raises(ValueError, match="batch has attention_mask, which PlainTuple"):
            handle.attribute(batch)
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])  # says nothing
        handle.attribute(batch)
        with pytest.raises(ValueError, match="batch has pixel_values, which PlainTuple"):
            handle.attribute({**batch, "pixel_values": torch.zeros(4, 3, 8, 8)})


def test_images_beside_the_tokens():
    """A vision tower's modules see no tokens and are left out; the others' attributions are of one sample each."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4, "vision_use_head": False}  # fmt: skip
    text = {**FAMILIES["gemma3"][1], "vocab_size": 70}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=65, boi_token_index=66,
        eoi_token_index=67,
    )  # fmt: skip
    model, batch = transformers.Gemma3ForConditionalGeneration(config).eval(), tiny_batch()
    batch["input_ids"][:, 1:5] = 65
    batch["attention_mask"][:] = 1
    batch["pixel_values"] = torch.randn(4, 3, 8, 8)
    batch["token_type_ids"] = (batch["input_ids"] == 65).long()
    found = assert_equals_per_sample(model, batch)
    assert found
    assert not any("vision" in name for name in found)
