"""The architecture: against an independent reference, GPT-2's counts, and nanoGPT's contract."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import python
from tiny_gpt import SHAPE, causal, ids, reference, reference_loss, tiny
from torch import Tensor

from folio import rng
from folio.model.config import GPTConfig
from folio.model.gpt import GPT

ONE_BLOCK = {
    "ln_1.weight": (8,),
    "ln_1.bias": (8,),
    "attn.c_attn.weight": (24, 8),
    "attn.c_attn.bias": (24,),
    "attn.c_proj.weight": (8, 8),
    "attn.c_proj.bias": (8,),
    "ln_2.weight": (8,),
    "ln_2.bias": (8,),
    "mlp.c_fc.weight": (32, 8),
    "mlp.c_fc.bias": (32,),
    "mlp.c_proj.weight": (8, 32),
    "mlp.c_proj.bias": (8,),
}


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"bias": False},
        {"activation": "gelu_tanh"},
        {"tie_weights": False},
        {"bias": False, "qkv_bias": True},
        {"bias": True, "qkv_bias": False, "activation": "gelu_tanh", "tie_weights": False},
        {"n_head": 1, "n_layer": 1},
        {"n_head": 8, "bias": False, "tie_weights": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("grad", [True, False])
def test_the_loss_is_gpt2s(shape: dict[str, object], grad: bool) -> None:
    """Logits and loss equal an independent float64 computation, on both attention paths."""
    model, x = tiny(**shape), ids(2, 9)
    y = ids(2, 9, seed=1)
    y[0, 3] = y[1, 0] = -1
    logits = reference(model, x)
    nats, counted = reference_loss(logits, y)
    with torch.set_grad_enabled(grad):
        found, mean = model(x, y)
        total, n = model.loss(x, y)
    torch.testing.assert_close(found.detach(), logits, rtol=1e-10, atol=1e-12)
    assert int(n) == counted == 16
    assert total.item() == pytest.approx(nats, rel=1e-6)  # the loss itself is taken in float32
    assert mean is not None
    assert mean.item() == pytest.approx(nats / counted, rel=1e-6)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_no_token_sees_a_later_one(grad: bool, masked: bool) -> None:
    """Changing token t leaves all logits before t as they were, and changes those from t on."""
    model, x = tiny(), ids(2, 12)
    model.train(grad)
    mask = causal(12) if masked else None
    with torch.set_grad_enabled(grad):
        before = model.lm_head(model.hidden(x, mask=mask))
        for t in (1, 6, 11):
            changed = x.clone()
            changed[:, t] = (x[:, t] + 1) % 17
            after = model.lm_head(model.hidden(changed, mask=mask))
            torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-12, atol=1e-12)
            assert ((after - before)[:, t:].abs().amax(-1) > 1e-9).all()


def test_dropout_is_for_training() -> None:
    """Training draws it from the global generator; evaluation has none."""
    model, x = tiny(dropout=0.5), ids(2, 12)
    y = x.roll(1)

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return model.loss(x, y)[0].item()

    assert loss(1) == loss(1) != loss(2)
    model.eval()
    assert loss(1) == loss(2)


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "parameters"),
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
)
def test_gpt2s_parameter_counts(n_layer: int, n_head: int, n_embd: int, parameters: int) -> None:
    """The four sizes as OpenAI released them."""
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=50257))
    assert model.get_num_params(non_embedding=False) == parameters
    assert model.get_num_params() == parameters - 1024 * n_embd
    assert n_layer > 12 or model.get_num_params() == 123_653_376


def test_nanogpts_parameter_count() -> None:
    """nanoGPT's class with its defaults, whose vocabulary is padded."""
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=12, n_head=12, n_embd=768))
    assert sum(p.numel() for p in model.parameters()) == 124_475_904


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_names_are_nanogpts(tied: bool) -> None:
    """So that its checkpoints and its users' code fit; a tied head is there once, as in the embedding."""
    model = GPT(GPTConfig(**SHAPE, tie_weights=tied))
    expected = {"transformer.wte.weight": (17, 8), "transformer.wpe.weight": (12, 8)}
    for n in range(2):
        expected |= {f"transformer.h.{n}.{name}": shape for name, shape in ONE_BLOCK.items()}
    expected |= {"transformer.ln_f.weight": (8,), "transformer.ln_f.bias": (8,)}
    if not tied:
        expected["lm_head.weight"] = (17, 8)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected
    assert set(model.state_dict()) == {*expected, "lm_head.weight"}
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied


def test_biases_are_optional() -> None:
    """bias=False leaves none; qkv_bias decides for its own projection."""
    names = {name for name, _ in GPT(GPTConfig(**SHAPE, bias=False)).named_parameters()}
    assert not any(name.endswith(".bias") for name in names)
    names = {name for name, _ in GPT(GPTConfig(**SHAPE, bias=False, qkv_bias=True)).named_parameters()}
    assert {name for name in names if name.endswith(".bias")} == {
        f"transformer.h.{n}.attn.c_attn.bias" for n in range(2)
    }


def test_forward_keeps_nanogpts_contract() -> None:
    """All logits and the mean loss with targets; the last position's alone without."""
    model = tiny()
    x, y = ids(3, 7), ids(3, 7, seed=1)
    y[:, -2:] = -1
    logits, loss = model(x, y)
    assert (logits.shape, loss.shape) == ((3, 7, 17), ())
    nats, counted = model.loss(x, y)
    assert int(counted) == 15
    torch.testing.assert_close(loss, nats / counted)
    last, none = model(x)
    assert none is None
    torch.testing.assert_close(last, logits[:, [-1]])
    with pytest.raises(ValueError, match="13 tokens do not fit block_size=12"):
        model(ids(1, 13))


def test_it_overfits_one_batch() -> None:
    """A model that can learn anything learns four rows by heart."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=8, vocab_size=17, n_layer=2, n_head=2, n_embd=32))
    optimizer = model.configure_optimizers(0.0, 1e-2, (0.9, 0.95), "cpu")
    x = ids(4, 9)
    x[:, 0] = torch.arange(4)  # rows that begin alike cannot be told apart
    for _ in range(150):
        optimizer.zero_grad()
        _, loss = model(x[:, :-1], x[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01


def test_initial_weights() -> None:
    """Standard deviation 0.02, residual projections smaller by √(2 · layers), norms 1, biases 0."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=64, vocab_size=128, n_layer=3, n_head=2, n_embd=64))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert p.eq(0.0 if name.endswith(".bias") else 1.0).all(), name
        else:
            std = 0.02 / math.sqrt(6) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(p.mean().item()) < std / 10, name


def test_initial_weights_are_keyed_by_name() -> None:
    """A parameter starts the same, whatever else the model has and whatever was drawn before."""

    def weights(**shape: object) -> dict[str, Tensor]:
        torch.rand(3)
        return dict(GPT(GPTConfig(**{**SHAPE, **shape}), lambda name: rng.generator(5, name)).named_parameters())

    small, large = weights(bias=False), weights(n_layer=3, tie_weights=False)
    for name, p in small.items():
        if not name.endswith("c_proj.weight"):  # whose scale tells the number of layers
            assert torch.equal(p, large[name]), name
    once = torch.empty(24, 8).normal_(0.0, 0.02, generator=rng.generator(5, "transformer.h.1.attn.c_attn.weight"))
    assert torch.equal(small["transformer.h.1.attn.c_attn.weight"], once)


def test_crop_block_size() -> None:
    """Shorter contexts give what they gave; longer ones do not fit any more."""
    model, x = tiny(), ids(2, 5)
    before = model(x, x)[0]
    model.crop_block_size(5)
    assert model.config.block_size == 5
    assert dict(model.named_parameters())["transformer.wpe.weight"].shape == (5, 8)
    torch.testing.assert_close(model(x, x)[0], before)
    with pytest.raises(ValueError, match="do not fit block_size=5"):
        model(ids(1, 6))
    for wrong in (0, 6):
        with pytest.raises(ValueError, match=f"block_size={wrong} is not within 1 … 5"):
            model.crop_block_size(wrong)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"n_embd": 10, "n_head": 3}, "n_embd=10 is not divisible by n_head=3: choose n_head=2 or 5, or n_embd=9"),
        ({"vocab_size": "auto"}, "vocab_size='auto' is for the trainer"),
    ],
)
def test_shapes_that_cannot_be(shape: dict[str, object], message: str) -> None:
    """Refused by name, before anything is allocated."""
    with pytest.raises(ValueError, match=message):
        GPT(GPTConfig(**{**SHAPE, **shape}))


def test_nanogpts_users_code_runs(tmp_path: Path) -> None:
    """What people do with nanoGPT's model.py, from the clone's root."""
    script = tmp_path / "user.py"
    script.write_text(
        "import torch\n"
        "from model import GPTConfig, GPT\n"
        "torch.manual_seed(1)\n"
        "model = GPT(GPTConfig(**dict(n_layer=2, n_head=2, n_embd=32, vocab_size=64, block_size=16)))\n"
        "X, Y = torch.randint(64, (4, 16)), torch.randint(64, (4, 16))\n"
        "optimizer = model.configure_optimizers(1e-1, 1e-3, (0.9, 0.95), 'cpu')\n"
        "logits, loss = model(X, Y)\n"
        "assert logits.shape == (4, 16, 64) and loss.ndim == 0\n"
        "loss.backward()\n"
        "optimizer.step()\n"
        "optimizer.zero_grad(set_to_none=True)\n"
        "assert model(X, Y)[1] < loss\n"
        "model.eval()\n"
        "assert model.generate(X[:1, :3], 20, temperature=0.8, top_k=5).shape == (1, 23)\n"
        "assert 0 < model.estimate_mfu(4, 0.01) < 1\n"
        "print('number of parameters', model.get_num_params())\n"
    )
    done = python("-W", "error", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "number of parameters 27520\n"


def test_the_same_size_copies_nothing() -> None:
    model = GPT(GPTConfig(block_size=8, vocab_size=7, n_layer=1, n_head=1, n_embd=4))
    before = dict(model.named_parameters())
    model.crop_block_size(8)
    model.grow_vocab_size(7)
    assert all(p is before[name] for name, p in model.named_parameters())
