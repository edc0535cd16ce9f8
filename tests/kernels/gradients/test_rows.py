"""Rows are known to be a sample's, or the loss falls back: both gradients equal two backwards whatever a model does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ssiuu_kernels as sk
from ssiuu_kernels.gradients.one_backward import graph
from ssiuu_kernels.gradients.one_backward.functions import RowFunction

from ...support.gradients import FORGET, TARGET, assert_equal_gradients, both_gradients, distances
from ...support.models import logits_of, tiny_batch, tiny_model
from ...support.torch_llama import VOCABULARY, WIDTH

SAMPLES, LENGTH = 4, 6


def batch_of(samples=SAMPLES, length=LENGTH):
    ids = torch.randint(1, VOCABULARY, (samples, length))
    labels = ids.clone()
    labels[:, : length // 2] = -100
    return ids, labels


class Model(nn.Module):
    """An embedding, what is under test on `[B, S, D]`, and a layer that makes the logits."""

    def __init__(self, inner):
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(VOCABULARY, WIDTH), inner, nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids):
        return self.head(self.inner(self.embedding(ids)))


def engine_of(model, run=None, samples=SAMPLES, **options):
    """The engine that one backward took, once both gradients are seen to be those of two."""
    model = model.double()
    ids, labels = batch_of(samples)
    forget = torch.arange(samples) % 2 == 0
    found, path = {}, None
    for engine in ("one-backward", "two-backward"):
        copied = copy.deepcopy(model)
        handle = sk.patch(copied, scope="all", engine=engine)
        logits = (run or Model.forward)(copied, ids)
        handle.unlearning_loss(logits, labels, forget, target=TARGET, **options).backward()
        found[engine] = both_gradients(copied)
        path = path or handle.gradient_path
    for actual, expected in zip(*found.values(), strict=True):
        worst = max(distances(actual, expected).items(), key=lambda item: item[1])
        assert worst[1] <= 1e-10, (path, worst)
    return path.engine


class Layer(nn.Module):
    """A linear layer between two functions."""

    def __init__(self, before=lambda x: x, after=lambda x: x):
        super().__init__()
        self.linear, self.before, self.after = nn.Linear(WIDTH, WIDTH), before, after

    def forward(self, x):
        return self.after(self.linear(self.before(x)).tanh())


def order(x):
    """Every sample in the place of another one."""
    return torch.arange(len(x)).roll(1)


APART = {
    "plain": Layer(),
    "flattened": Layer(lambda x: x.flatten(0, 1), lambda y: y.unflatten(0, (SAMPLES, LENGTH))),
    "time-major": Layer(lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1)),
    "time-major, flattened": Layer(
        lambda x: x.transpose(0, 1).reshape(-1, WIDTH), lambda y: y.view(LENGTH, SAMPLES, WIDTH).transpose(0, 1)
    ),
    "heads first": Layer(
        lambda x: x.unflatten(2, (2, WIDTH // 2)).permute(2, 0, 1, 3).repeat(1, 1, 1, 2),
        lambda y: y.mean(0),
    ),
    "tokens averaged": Layer(after=lambda y: y - y.mean(1, keepdim=True)),
    "tokens in another order": Layer(lambda x: x.flip(1), lambda y: y.roll(1, 1)),
    "a token of each sample": Layer(after=lambda y: y + y[:, :1]),
    "attention over tokens": Layer(after=lambda y: (y @ y.transpose(1, 2)).softmax(-1) @ y),
    "normalised": Layer(after=lambda y: F.normalize(F.layer_norm(y, (WIDTH,)), dim=-1)),
    "einsum over tokens": Layer(after=lambda y: torch.einsum("bsd,btd,bte->bse", y, y, y)),
    "gated": Layer(after=lambda y: F.glu(torch.cat([y, y], -1), -1) * torch.where(y > 0, y, 0.5)),
}
MIXING = {
    "samples averaged": Layer(after=lambda y: y - y.mean(0)),
    "samples averaged, weight 0": Layer(after=lambda y: y + 0 * y.mean(0)),
    "sorted": Layer(lambda x: x[x.sum((1, 2)).argsort()]),
    "sorted rows": Layer(lambda x: x.flatten(0, 1)[x.sum(-1).flatten().argsort()].view_as(x)),
    "another order": Layer(after=lambda y: y[order(y)]),
    "selected": Layer(after=lambda y: y.index_select(0, order(y))),
    "gathered": Layer(after=lambda y: y.gather(0, order(y)[:, None, None].expand_as(y))),
    "flipped": Layer(after=lambda y: y.flip(0)),
    "rolled": Layer(after=lambda y: y.roll(1, 0)),
    "rolled, flattened": Layer(after=lambda y: y.roll(3)),
    "softmax over samples": Layer(after=lambda y: y.softmax(0)),
    "attention across samples": Layer(after=lambda y: torch.einsum("bsd,csd,cse->bse", y, y, y)),
    "sdpa across samples": Layer(after=lambda y: attention(y.transpose(0, 1)).transpose(0, 1)),
    "batch norm": Layer(after=lambda y: F.batch_norm(y.flatten(0, 1), None, None, training=True).view_as(y)),
    "two of them joined": Layer(after=lambda y: torch.cat([y[:2], y[2:]])),
    "the first for all": Layer(after=lambda y: y + y[:1]),
    "cumulated": Layer(after=lambda y: y.cumsum(0)),
    "padded": Layer(after=lambda y: F.pad(y, (0, 0, 0, 0, 1, -1))),
    "matrix over samples": Layer(after=lambda y: torch.einsum("ab,bsd->asd", torch.ones(len(y), len(y)).to(y), y)),
    "split and swapped": Layer(after=lambda y: torch.cat(y.split(len(y) // 2)[::-1])),
    "written into": Layer(after=lambda y: y.clone().index_copy_(0, order(y), y)),
    "scattered": Layer(after=lambda y: torch.zeros_like(y).scatter(0, order(y)[:, None, None].expand_as(y), y)),
    "in place on a part": Layer(after=lambda y: _halved(y.clone())),
}  # fmt: skip


def attention(y):
    return F.scaled_dot_product_attention(y, y, y)


def _halved(y):
    y[:2] *= 0.5
    return y


@pytest.mark.parametrize("layer", APART.values(), ids=APART)
def test_layers_that_keep_samples_apart_take_one_backward(layer):
    assert engine_of(Model(layer)) == "one-backward"


@pytest.mark.parametrize("samples", [SAMPLES, LENGTH], ids=["B!=S", "B==S"])
@pytest.mark.parametrize("layer", MIXING.values(), ids=MIXING)
def test_layers_that_do_not_fall_back(layer, samples):
    assert engine_of(Model(layer), samples=samples) == "two-backward"


def test_rows_taken_for_tokens_of_other_samples_fall_back():
    swapped = Layer(after=lambda y: y.reshape(LENGTH, SAMPLES, WIDTH).transpose(0, 1))
    assert engine_of(Model(swapped)) == "two-backward"


@pytest.mark.parametrize("layer", [*MIXING.values()][:3])
def test_one_sample_has_all_rows(layer):
    assert engine_of(Model(layer), samples=1) == "one-backward"


REORDERED = {
    "taken in another order": lambda model, ids: model(ids[order(ids)])[order(ids).argsort()],
    "flipped": lambda model, ids: model(ids.flip(0)).flip(0),
    "joined of two forwards": lambda model, ids: torch.cat([model(ids[:2]), model(ids[2:])]),
    "of the samples twice": lambda model, ids: model(torch.cat([ids, ids]))[:SAMPLES],
    "of time-major ids": lambda model, ids: model(ids.T).transpose(0, 1),
    "stacked": lambda model, ids: torch.stack([model(row[None])[0] for row in ids]),
}


@pytest.mark.parametrize("run", REORDERED.values(), ids=REORDERED)
def test_logits_in_another_order_than_the_forwards(run):
    engine_of(Model(Layer()), run)


def test_logits_of_time_major_ids_take_one_backward():
    assert engine_of(Model(Layer()), REORDERED["of time-major ids"]) == "one-backward"


class Positions(nn.Module):
    """Adds a learned position, looked up by ids of any shape, as GPT-2, nanoGPT and Blenderbot do."""

    def __init__(self, ids_of, places=8):
        super().__init__()
        self.table, self.ids_of, self.linear = nn.Embedding(places, WIDTH), ids_of, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.linear(x + self.table(self.ids_of(x)))


@pytest.mark.parametrize("samples", [SAMPLES, LENGTH], ids=["B!=S", "B==S"])
@pytest.mark.parametrize(
    "ids_of",
    [
        lambda x: torch.arange(x.shape[1]),
        lambda x: torch.arange(x.shape[1])[None],
        lambda x: torch.arange(x.shape[1]).expand(x.shape[:2]),
        lambda x: torch.zeros(1, 1, dtype=torch.long),
    ],
    ids=["[S]", "[1, S]", "[B, S]", "[1, 1]"],
)
def test_positions_that_samples_share(ids_of, samples):
    assert engine_of(Model(Positions(ids_of)), samples=samples) == "one-backward"


def test_positions_used_twice_fall_back():
    class Twice(Positions):
        def forward(self, x):
            table = self.table(torch.arange(x.shape[1]))
            return self.linear(x + table) * table

    assert engine_of(Model(Twice(None))) == "two-backward"


def test_a_padding_row_counted_from_the_end_gets_no_gradient():
    model = Model(Layer())
    model.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=-1)
    ids, labels = batch_of()
    ids[:, 0] = VOCABULARY - 1
    handle = sk.patch(model, scope="all")
    handle.unlearning_loss(model(ids), labels, FORGET).backward()
    assert not model.embedding.weight.grad[-1].any()
    assert not model.embedding.weight.target_grad[-1].any()


class Prompted(nn.Module):
    """As a vision model: rows of another kind, put among the tokens by value."""

    def __init__(self, place):
        super().__init__()
        self.projector, self.linear, self.place = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), place

    def forward(self, x):
        images = self.projector(torch.linspace(-1, 1, x.shape[0] * WIDTH).view(x.shape[0], 1, WIDTH).to(x))
        # All images belong to the first two samples.
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        mask[0, :2] = mask[1, : x.shape[0] - 2] = True
        return self.linear(self.place(x, mask, images.flatten(0, 1)))


@pytest.mark.parametrize(
    "place",
    [
        lambda x, mask, images: x.masked_scatter(mask[..., None], images),
        lambda x, mask, images: x.index_put(torch.where(mask), images),
    ],
    ids=["masked_scatter", "index_put"],
)
def test_as_many_images_as_samples_but_not_one_each(place):
    assert engine_of(Model(Prompted(place))) == "two-backward"


class LoRA(nn.Module):
    """As PEFT's: a frozen layer, and two small ones beside it."""

    def __init__(self):
        super().__init__()
        self.base_layer, self.lora_A = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2, bias=False)
        self.lora_B, self.dropout = nn.Linear(2, WIDTH, bias=False), nn.Dropout(0.0)
        self.base_layer.requires_grad_(False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(self.dropout(x))) * 2.0


def test_adapters_take_one_backward():
    model = Model(nn.Sequential(LoRA(), nn.Tanh(), LoRA()))
    model.embedding.requires_grad_(False)
    model.head.requires_grad_(False)
    assert engine_of(model) == "one-backward"


@pytest.mark.parametrize("apart", [True, False], ids=["a mask for each sample", "a mask of ones"])
def test_packed_samples_are_apart_where_the_mask_says_so(apart):
    model = tiny_model("torch_llama", torch.float64)
    ids, labels = torch.randint(1, VOCABULARY, (2, 12)), torch.randint(1, VOCABULARY, (2, 12))
    segments = torch.tensor([[0, 5], [5, 12], [12, 20], [20, 24]], dtype=torch.int32)
    sample = torch.tensor([0] * 5 + [1] * 7 + [2] * 8 + [3] * 4).view(2, 12)
    mask = (sample[:, :, None] == sample[:, None])[:, None] if apart else torch.ones(2, 1, 12, 12)
    found = {}
    for engine in ("one-backward", "two-backward"):
        copied = copy.deepcopy(model)
        handle = sk.patch(copied, scope="all", engine=engine)
        loss = handle.unlearning_loss(copied(ids, mask).logits, labels, FORGET, target=TARGET, segments=segments)
        loss.backward()
        found[engine] = both_gradients(copied)
        if engine == "one-backward":
            assert handle.gradient_path.engine == ("one-backward" if apart else "two-backward")
    for actual, expected in zip(*found.values(), strict=True):
        assert max(distances(actual, expected).values()) <= 1e-10


def test_checked_compares_both_engines():
    model = tiny_model("torch_llama", torch.float64)
    assert_equal_gradients(model, tiny_batch(), tolerance=1e-12)
    with sk.patch(model, scope="all", engine="checked") as handle:
        batch = tiny_batch()
        for _ in range(2):  # the second time on top of gradients that are there
            handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET, target=TARGET).backward()
        twice = both_gradients(model)
        assert handle.gradient_path.engine == "one-backward"
    model.zero_grad()
    with sk.patch(model, scope="all") as handle:
        handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET, target=TARGET).backward()
        for found, once in zip(twice, both_gradients(model), strict=True):
            assert max(distances(found, {name: 2 * grad for name, grad in once.items()}).values()) <= 1e-12


def apart(_edge, axis):
    return axis


def test_checked_refuses_what_differs_and_leaves_gradients_alone(monkeypatch):
    # A rule that is wrong: a softmax over samples is taken for one of each sample.
    monkeypatch.setattr(
        graph, "_kind", lambda node: (issubclass(getattr(node, "_forward_cls", object), RowFunction), apart)
    )
    model = Model(Layer(after=lambda y: y.softmax(0))).double()
    ids, labels = batch_of()
    handle = sk.patch(model, scope="all", engine="checked")
    loss = handle.unlearning_loss(model(ids), labels, FORGET, target=TARGET)
    with pytest.raises(RuntimeError, match=r"one backward gave another grad of .* than autograd"):
        loss.backward()
    assert all(param.grad is None and param.target_grad is None for param in model.parameters())
